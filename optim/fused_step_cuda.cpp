// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/optim/fused_step_parts.h>

namespace ounce::optim {

Tensor Choice::measured(const Tensor& scale) const {
  const auto held = squares.gather(1, indices.to(at::kLong)).sum(1);
  auto sums = at::stack({held, squares.sum(1)}, 1);
  if (scale.defined()) sums = sums * scale.square();
  if (!source.defined()) return sums;
  return at::cat({sums, source.lt(0).sum(1, /*keepdim=*/true).to(at::kFloat)}, 1);
}

FusedSteps::FusedSteps() : impl_(std::make_unique<Impl>()) {}
FusedSteps::~FusedSteps() = default;

std::string FusedSteps::why_not(const FusedTensor& t) {
  return refusal_of(t.parameter, t.gradient, t.exp_avg);
}

std::string FusedSteps::why_not(const FusedTensor& t, const FusedLowRank& how) {
  if (auto refusal = why_not(t); !refusal.empty()) return refusal;
  const auto shape = shape_of(t.parameter, how.transposed, t.indices.size(0), 1);
  if (auto refusal = refusal_of(shape, how.basis); !refusal.empty()) return refusal;
  if (t.residual_scales.defined() && !can_keep_rest(shape)) {
    return c10::str("int8 residuals of rows of ", shape.columns, ", which are not 16 n long");
  }
  const auto fits = [](const Tensor& x) {
    return !x.defined() || (x.is_contiguous() && is_aligned(x));
  };
  return fits(t.parameter) && fits(t.residual) && fits(t.residual_scales) ? "" : kNotAligned;
}

void FusedSteps::count(const std::vector<Tensor>& steps, const FusedSettings& s) {
  if (steps.empty()) return;
  const c10::cuda::CUDAGuard guard(steps[0].device());
  impl_->count(steps, s.skip);
}

void FusedSteps::Impl::count(const std::vector<Tensor>& steps, const Tensor& skip) {
  C10_CUDA_CHECK(advance(places_of<float>(steps, Use::kCount), static_cast<int>(steps.size()),
                         floats(skip), c10::cuda::getCurrentCUDAStream()));
}

void FusedSteps::adamw(const std::vector<FusedTensor>& tensors, const FusedSettings& s) {
  if (tensors.empty()) return;
  const c10::cuda::CUDAGuard guard(tensors[0].parameter.device());
  std::vector<Tensor> gradients;
  std::vector<const void*> pointers;
  for (const auto& t : tensors) {
    gradients.push_back(t.gradient.contiguous());
    for (const Tensor* part : std::initializer_list<const Tensor*>{
             &t.parameter, &gradients.back(), &t.exp_avg, &t.exp_avg_sq, &t.step}) {
      pointers.push_back(part->const_data_ptr());
    }
  }
  int blocks = 0;
  for (const auto& t : tensors) blocks += blocks_of_chunks(t.parameter.numel());
  const auto* table =
      impl_->table(tensors[0].parameter, Impl::Use::kAdam)
          .upload<AdamTensor>(pointers, tensors[0].parameter.device(), [&] {
            std::vector<AdamTensor> all;
            int first = 0;
            for (size_t i = 0; i < tensors.size(); ++i) {
              const auto& t = tensors[i];
              all.push_back({.parameter = t.parameter.data_ptr(),
                             .gradient = gradients[i].const_data_ptr(),
                             .exp_avg = t.exp_avg.data_ptr(),
                             .exp_avg_sq = t.exp_avg_sq.data_ptr(),
                             .step = floats(t.step),
                             .seed = t.seed,
                             .count = t.parameter.numel(),
                             .first_block = first,
                             .aligned = is_aligned(t.parameter) && is_aligned(gradients[i]) &&
                                        is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq)});
              first += blocks_of_chunks(t.parameter.numel());
            }
            return all;
          });
  C10_CUDA_CHECK(
      optim::adamw({.tensors = table,
                    .count = static_cast<int>(tensors.size()),
                    .blocks = blocks,
                    .parameters_are_fp32 = tensors[0].parameter.scalar_type() == at::kFloat,
                    .moments_are_fp32 = tensors[0].exp_avg.scalar_type() == at::kFloat,
                    .rounds_parameters = s.stochastic_rounding,
                    .lr = floats(s.lr),
                    .scale = floats(s.grad_scale),
                    .skip = floats(s.skip),
                    .beta1 = s.beta1,
                    .beta2 = s.beta2,
                    .eps = s.eps,
                    .weight_decay = s.weight_decay},
                   c10::cuda::getCurrentCUDAStream()));
  impl_->count(fields_of(std::span(tensors), &FusedTensor::step), s.skip);
}

namespace {

// Without what lies on the device.
RankBatch like(const LowRankShape& shape, const std::vector<Tensor>& matrices) {
  return {.count = shape.count,
          .rows = shape.rows,
          .columns = shape.columns,
          .right = shape.right,
          .gradient_is_fp32 = matrices[0].scalar_type() == at::kFloat,
          .aligned = std::all_of(matrices.begin(), matrices.end(), is_aligned)};
}

}  // namespace

RankBatch FusedSteps::Impl::batch_of(const LowRankShape& shape, const Tensor& key,
                                     const std::vector<Tensor>& matrices) {
  const auto pointers = pointers_of(matrices);
  auto batch = like(shape, matrices);
  batch.gradient =
      table(key, Use::kRank).upload<const void*>(pointers, key.device(), [&] { return pointers; });
  return batch;
}

FusedSteps::Impl::Sums FusedSteps::Impl::add(const LowRankShape& shape,
                                             std::span<const FusedMomentum> matrices,
                                             const std::vector<Tensor>& scales, Basis basis,
                                             int64_t norm, bool ranked, uint64_t seed,
                                             const FusedSettings& s) {
  const auto& first = matrices[0].momentum;
  const auto type = first.scalar_type();
  Sums sums;
  const auto gradients = fields_of(matrices, &FusedMomentum::gradient);
  Tensor scratch;
  if (type == at::kBFloat16) {
    sums.all = fields_of(matrices, &FusedMomentum::momentum);
  } else if (type == at::kChar && s.consume_gradients) {
    sums.all = gradients;
  } else {
    scratch =
        at::empty({shape.count, shape.rows, shape.columns}, first.options().dtype(at::kBFloat16));
    sums.all = scratch.unbind(0);
  }
  const auto scales_of = [&](size_t i) { return scales.empty() ? nullptr : floats(scales[i]); };
  const auto upload = [&]<class Entry>(Use use, const auto& entry_of) {
    std::vector<const void*> pointers;
    for (size_t i = 0; i < matrices.size(); ++i) {
      for (const Tensor* part : std::initializer_list<const Tensor*>{
               &matrices[i].momentum, &gradients[i], &sums.all[i], &matrices[i].step}) {
        pointers.push_back(part->const_data_ptr());
      }
      pointers.push_back(scales_of(i));
    }
    return table(first, use).upload<Entry>(pointers, first.device(), [&] {
      std::vector<Entry> entries;
      for (size_t i = 0; i < matrices.size(); ++i) entries.push_back(entry_of(i));
      return entries;
    });
  };
  if (ranked && type != at::kFloat &&
      can_add(rank_basis(basis), like(shape, gradients), norm == 1)) {
    sums.batch = batch_of(shape, first, gradients);
    sums.batch.addends = upload.operator()<RankAddend>(Use::kAdd, [&](size_t i) -> RankAddend {
      return {.e = matrices[i].momentum.const_data_ptr(),
              .scales = scales_of(i),
              .sum = sums.all[i].data_ptr(),
              .step = floats(matrices[i].step),
              .seed = matrices[i].seed + seed};
    });
    sums.batch.addends_are_int8 = type == at::kChar;
    sums.batch.scale = floats(s.grad_scale);
    sums.batch.skip = floats(s.skip);
    return sums;
  }
  if (type == at::kChar) {
    const int each = blocks_of_chunks(shape.rows * shape.columns);
    const auto* table =
        upload.operator()<FeedbackTensor>(Use::kMomentum, [&](size_t i) -> FeedbackTensor {
          return {.residual = matrices[i].momentum.const_data_ptr<int8_t>(),
                  .scales = scales_of(i),
                  .gradient = gradients[i].const_data_ptr(),
                  .sum = sums.all[i].data_ptr(),
                  .count = shape.rows * shape.columns,
                  .first_block = static_cast<int>(i) * each};
        });
    C10_CUDA_CHECK(feed_back({.tensors = table,
                              .count = shape.count,
                              .blocks = shape.count * each,
                              .gradients_are_fp32 = gradients[0].scalar_type() == at::kFloat,
                              .columns = static_cast<uint32_t>(shape.columns),
                              .scale = floats(s.grad_scale)},
                             c10::cuda::getCurrentCUDAStream()));
  } else {
    add_gradients(matrices, s, 1, false, seed, scratch);
  }
  if (ranked) sums.batch = batch_of(shape, first, sums.all);
  return sums;
}

Choice FusedSteps::Impl::rank(const LowRankShape& shape, const RankBatch& batch,
                              const at::Device& device, Basis basis, int64_t norm) {
  const auto processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const auto fp32 = at::TensorOptions(at::kFloat).device(device);
  const auto of_columns = [&] { return at::empty({shape.count, shape.n()}, fp32); };
  Choice choice{.squares = of_columns()};
  choice.keys = norm == 1 ? of_columns() : choice.squares;
  auto scratch = at::empty({rank_scratch(rank_basis(basis), batch, norm == 1, processors)},
                           fp32.dtype(at::kByte));
  C10_CUDA_CHECK(optim::rank(rank_basis(basis), batch,
                             {.squares = choice.squares.data_ptr<float>(),
                              .absolutes = norm == 1 ? choice.keys.data_ptr<float>() : nullptr,
                              .scratch = scratch.data_ptr()},
                             processors, c10::cuda::getCurrentCUDAStream()));
  return choice;
}

void FusedSteps::Impl::select(const LowRankShape& shape, Choice& choice,
                              const std::vector<Tensor>& previous, bool rotates,
                              const Tensor& skip) {
  const auto chosen = [&] {
    return at::empty({shape.count, shape.rank}, choice.keys.options().dtype(at::kInt));
  };
  choice.indices = chosen();
  int* const* lists = previous.empty() ? nullptr : places_of<int>(previous, Use::kLists);
  if (rotates) choice.source = chosen();
  C10_CUDA_CHECK(optim::select({.count = shape.count,
                                .n = static_cast<int>(shape.n()),
                                .rank = shape.rank,
                                .keys = floats(choice.keys),
                                .squares = floats(choice.squares),
                                .lists = lists,
                                .skip = lists != nullptr ? floats(skip) : nullptr,
                                .indices = choice.indices.data_ptr<int>(),
                                .source = rotates ? choice.source.data_ptr<int>() : nullptr},
                               c10::cuda::getCurrentCUDAStream()));
}

void FusedSteps::Impl::gather(const LowRankShape& shape, Basis basis, Choice& choice) {
  const auto n = shape.n();
  const auto options = choice.indices.options().dtype(at::kBFloat16);
  auto& all = bases[{basis, n, choice.indices.get_device()}];
  OUNCE_CHECK(
      all.defined() || !is_capturing(),
      "[optim] expected a step before the one that a CUDA graph captures: it makes the basis");
  if (!all.defined()) all = dct_basis(n, basis, options.dtype(at::kFloat)).to(at::kBFloat16);
  choice.q = at::empty({shape.count, shape.rank, n}, options);
  C10_CUDA_CHECK(gather_rows(all.const_data_ptr(), choice.indices.const_data_ptr<int>(),
                             choice.indices.numel(), n, choice.q.data_ptr(),
                             c10::cuda::getCurrentCUDAStream()));
}

void FusedSteps::Impl::backproject(const LowRankShape& shape, const std::vector<Tensor>& parameters,
                                   const Tensor& u, const Tensor& q,
                                   const std::vector<Tensor>& steps,
                                   const std::vector<uint64_t>& seeds, const Update& update,
                                   uint64_t stream) {
  const auto& first = parameters[0];
  const auto element = element_of(first);
  auto pointers = pointers_of(parameters);
  pointers.insert(pointers.end(), {u.const_data_ptr(), q.const_data_ptr()});
  const auto* matrices =
      table(first, Use::kBackproject).upload<BackprojectMatrix>(pointers, first.device(), [&] {
        std::vector<BackprojectMatrix> entries(parameters.size());
        for (size_t i = 0; i < parameters.size(); ++i) {
          C10_CUDA_CHECK(fill(shape, element,
                              {.p = parameters[i].data_ptr(),
                               .u = row(u, i),
                               .q = row(q, i),
                               .step = floats(steps[i]),
                               .seed = seeds[i] + stream},
                              &entries[i]));
        }
        return entries;
      });
  C10_CUDA_CHECK(optim::backproject({.shape = shape,
                                     .p = element,
                                     .rounding = update.rounding,
                                     .matrices = matrices,
                                     .lr = floats(update.lr),
                                     .skip = floats(update.skip),
                                     .decay = update.keep,
                                     .weight_decay = update.weight_decay,
                                     .factor = update.factor},
                                    c10::cuda::getCurrentCUDAStream()));
}

Tensor FusedSteps::Impl::project(const LowRankShape& shape, const Tensor& key,
                                 const std::vector<Tensor>& matrices, const Choice& choice,
                                 const Tensor& skip, const Narrow& rest) {
  const auto a = at::empty({shape.count, shape.longer(), shape.rank}, choice.q.options());
  const bool keeps_rest = !rest.bytes.empty();
  std::vector<const void*> pointers = {a.const_data_ptr(), choice.q.const_data_ptr()};
  for (const auto* tensors : {&matrices, &rest.bytes, &rest.scales}) {
    for (const auto& tensor : *tensors) pointers.push_back(tensor.const_data_ptr());
  }
  const auto* all = table(key, Use::kProject).upload<ProjectMatrix>(pointers, a.device(), [&] {
    std::vector<ProjectMatrix> entries(matrices.size());
    for (size_t i = 0; i < matrices.size(); ++i) {
      C10_CUDA_CHECK(fill(shape,
                          {.gradient = matrices[i].const_data_ptr(),
                           .q = row(choice.q, i),
                           .out = row(a, i),
                           .rest = keeps_rest ? rest.bytes[i].data_ptr() : nullptr,
                           .scales = keeps_rest ? rest.scales[i].data_ptr<float>() : nullptr},
                          &entries[i]));
    }
    return entries;
  });
  C10_CUDA_CHECK(
      optim::project({.shape = shape, .matrices = all, .rest = keeps_rest, .skip = floats(skip)},
                     c10::cuda::getCurrentCUDAStream()));
  return a;
}

}  // namespace ounce::optim
