// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/optim/fused_step_parts.h>

namespace ounce::optim {

FusedSteps::FusedSteps() : impl_(std::make_unique<Impl>()) {}
FusedSteps::~FusedSteps() = default;

bool FusedSteps::takes(const FusedTensor& t) {
  return is_hopper(t.parameter.device()) && is_known(t.parameter.scalar_type()) &&
         t.gradient.scalar_type() == t.parameter.scalar_type() && t.parameter.is_contiguous() &&
         is_known(t.exp_avg.scalar_type());
}

bool FusedSteps::takes(const FusedTensor& t, const FusedLowRank& how) {
  const auto& e = t.residual;
  return takes(t) && projects(t.parameter, how.basis, how.transposed, t.indices.size(0)) &&
         (!e.defined() || (e.is_contiguous() && is_aligned(e))) &&
         (!t.residual_scales.defined() ||
          (t.residual_scales.is_contiguous() && is_aligned(t.residual_scales) &&
           e.numel() / e.size(0) % 16 == 0));
}

void FusedSteps::count(const std::vector<Tensor>& steps, const FusedSettings& s) {
  if (steps.empty()) return;
  const c10::cuda::CUDAGuard guard(steps[0].device());
  impl_->count(steps, s.skip);
}

void FusedSteps::Impl::count(const std::vector<Tensor>& steps, const Tensor& skip) {
  std::vector<const void*> pointers;
  for (const auto& step : steps) pointers.push_back(step.const_data_ptr());
  const auto* all = table(steps[0], Use::kCount).upload<float*>(pointers, steps[0].device(), [&] {
    std::vector<float*> entries;
    for (const auto& step : steps) entries.push_back(step.data_ptr<float>());
    return entries;
  });
  C10_CUDA_CHECK(advance(all, static_cast<int>(steps.size()), floats(skip),
                         c10::cuda::getCurrentCUDAStream()));
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
  std::vector<Tensor> steps;
  for (const auto& t : tensors) steps.push_back(t.step);
  impl_->count(steps, s.skip);
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
  std::vector<const void*> pointers;
  for (const auto& matrix : matrices) pointers.push_back(matrix.const_data_ptr());
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
  std::vector<Tensor> gradients;
  for (const auto& m : matrices) gradients.push_back(m.gradient);
  Tensor scratch;
  if (type == at::kBFloat16) {
    for (const auto& m : matrices) sums.all.push_back(m.momentum);
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

Choice FusedSteps::Impl::choose(const LowRankShape& shape, const RankBatch& batch,
                                const at::Device& device, Basis basis, int64_t norm,
                                const Tensor& previous, bool rotates, const Tensor& skip) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const auto fp32 = at::TensorOptions(at::kFloat).device(device);
  const auto of_columns = [&] { return at::empty({shape.count, shape.n()}, fp32); };
  Choice choice{.squares = of_columns()};
  const auto absolutes = norm == 1 ? of_columns() : Tensor();
  auto scratch = at::empty({rank_scratch(rank_basis(basis), batch, norm == 1, processors)},
                           fp32.dtype(at::kByte));
  C10_CUDA_CHECK(optim::rank(rank_basis(basis), batch,
                             {.squares = choice.squares.data_ptr<float>(),
                              .absolutes = norm == 1 ? absolutes.data_ptr<float>() : nullptr,
                              .scratch = scratch.data_ptr()},
                             processors, stream));
  const auto chosen = [&] { return at::empty({shape.count, shape.rank}, fp32.dtype(at::kInt)); };
  choice.indices = previous.defined() ? previous : chosen();
  if (rotates) choice.source = chosen();
  C10_CUDA_CHECK(select({.count = shape.count,
                         .n = static_cast<int>(shape.n()),
                         .rank = shape.rank,
                         .keys = floats(norm == 1 ? absolutes : choice.squares),
                         .squares = floats(choice.squares),
                         .previous = previous.defined() ? previous.const_data_ptr<int>() : nullptr,
                         .skip = previous.defined() ? floats(skip) : nullptr,
                         .indices = choice.indices.data_ptr<int>(),
                         .source = rotates ? choice.source.data_ptr<int>() : nullptr},
                        stream));
  return choice;
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
                                   const Narrow& narrow) {
  const auto& to = narrow.bytes.empty() ? parameters : narrow.bytes;
  const auto element = element_of(to[0]);
  std::vector<const void*> pointers = {u.const_data_ptr(), q.const_data_ptr()};
  for (const auto* tensors : {&parameters, &to, &narrow.scales}) {
    for (const auto& tensor : *tensors) pointers.push_back(tensor.const_data_ptr());
  }
  const auto* matrices =
      table(to[0], Use::kBackproject)
          .upload<BackprojectMatrix>(pointers, parameters[0].device(), [&] {
            std::vector<BackprojectMatrix> entries(parameters.size());
            for (size_t i = 0; i < parameters.size(); ++i) {
              C10_CUDA_CHECK(fill(
                  shape, element,
                  {.p = parameters[i].data_ptr(),
                   .u = row(u, i),
                   .q = row(q, i),
                   .step = floats(steps[i]),
                   .seed = seeds[i],
                   .out = to[i].data_ptr(),
                   .scales = narrow.bytes.empty() ? nullptr : narrow.scales[i].data_ptr<float>()},
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

namespace {

// Adam on the projections `a` of gradients times `scale`: m, v in place -> u, which may be a.
void adam_batch(FusedSteps::Impl& impl, const LowRankShape& shape,
                std::span<const FusedTensor> tensors, const Tensor& a, const Tensor& u,
                const Tensor& scale, const FusedLowRank& how, const FusedSettings& s,
                const Choice& choice) {
  const bool fresh = choice.source.defined() && how.estimate_fresh_columns;
  std::vector<const void*> pointers;
  for (const auto& part : {a, u, choice.indices, choice.source, choice.squares}) {
    pointers.push_back(part.defined() ? part.const_data_ptr() : nullptr);
  }
  for (const auto& t : tensors) {
    pointers.insert(pointers.end(), {t.exp_avg.const_data_ptr(), t.exp_avg_sq.const_data_ptr()});
  }
  const auto* matrices =
      impl.table(tensors[0].parameter, FusedSteps::Impl::Use::kProjectedAdam)
          .upload<ProjectedAdamMatrix>(pointers, a.device(), [&] {
            std::vector<ProjectedAdamMatrix> all;
            for (size_t i = 0; i < tensors.size(); ++i) {
              const auto& t = tensors[i];
              all.push_back(
                  {.a = row(a, i),
                   .u = row(u, i),
                   .m = t.exp_avg.data_ptr(),
                   .v = t.exp_avg_sq.data_ptr(),
                   .step = floats(t.step),
                   .seed = t.seed,
                   .source = static_cast<const int*>(row(choice.source, i)),
                   .squares = fresh ? static_cast<const float*>(row(choice.squares, i)) : nullptr,
                   .chosen = fresh ? static_cast<const int*>(row(choice.indices, i)) : nullptr});
            }
            return all;
          });
  C10_CUDA_CHECK(adam({.count = shape.count,
                       .rank = shape.rank,
                       .longer = shape.longer(),
                       .moments_are_fp32 = tensors[0].exp_avg.scalar_type() == at::kFloat,
                       .matrices = matrices,
                       .scale = floats(scale),
                       .skip = floats(s.skip),
                       .beta1 = s.beta1,
                       .beta2 = s.beta2,
                       .eps = s.eps},
                      c10::cuda::getCurrentCUDAStream()));
}

// [count, 3]
Tensor measure(const Choice& choice, const Tensor& scale) {
  auto all = choice.squares.sum(1);
  auto held = choice.squares.gather(1, choice.indices.to(at::kLong)).sum(1);
  if (scale.defined()) {
    all = all * scale.square();
    held = held * scale.square();
  }
  return at::stack({held, all, choice.source.lt(0).sum(1).to(at::kFloat)}, 1);
}

// indices: of the matrices, [count, rank], in place.
Tensor low_rank_batch(FusedSteps::Impl& impl, std::span<const FusedTensor> tensors,
                      const Tensor& indices, const FusedLowRank& how, const FusedSettings& s) {
  const auto& first = tensors[0].parameter;
  const auto shape = shape_of(first, how.transposed, tensors[0].indices.size(0), tensors.size());
  const bool feeds_back = tensors[0].residual.defined();
  std::vector<Tensor> parameters, gradients, steps;
  std::vector<uint64_t> seeds, residual_seeds;
  std::vector<FusedMomentum> fed_back;
  FusedSteps::Impl::Narrow residuals;
  for (const auto& t : tensors) {
    parameters.push_back(t.parameter);
    gradients.push_back(t.gradient);
    steps.push_back(t.step);
    seeds.push_back(t.seed);
    residual_seeds.push_back(t.seed + kResidualSeed);
    if (!feeds_back) continue;
    fed_back.push_back({{}, t.gradient, t.residual, t.step, t.seed});
    residuals.bytes.push_back(t.residual);
    if (t.residual_scales.defined()) residuals.scales.push_back(t.residual_scales);
  }
  // What is projected; it counts that times `scale`.
  FusedSteps::Impl::Sums x;
  const auto scale = feeds_back ? Tensor() : s.grad_scale;
  if (feeds_back) {
    x = impl.add(shape, fed_back, residuals.scales, how.basis, how.norm, how.chooses,
                 kResidualSumSeed, s);
  } else if (how.chooses) {
    x.batch = impl.batch_of(shape, first, gradients);
  }
  Choice choice{.indices = indices};
  Tensor measured;
  if (how.chooses) {
    choice = impl.choose(shape, x.batch, first.device(), how.basis, how.norm, indices,
                         how.rotate || how.measures, s.skip);
    if (how.measures) measured = measure(choice, scale);
    if (!how.rotate) choice.source = Tensor();
  }
  impl.gather(shape, how.basis, choice);
  if (!feeds_back) {
    for (const auto& gradient : gradients) x.all.push_back(gradient.to(at::kBFloat16));
  }
  const bool narrow = !residuals.scales.empty(), kept = narrow && can_keep_rest(shape);
  const auto a = impl.project(shape, first, x.all, choice, s.skip,
                              kept ? residuals : FusedSteps::Impl::Narrow());
  const auto u = feeds_back && !kept ? at::empty_like(a) : a;
  adam_batch(impl, shape, tensors, a, u, scale, how, s, choice);
  if (feeds_back && !kept) {
    impl.backproject(shape, narrow ? x.all : residuals.bytes, a, choice.q, steps, residual_seeds,
                     {.keep = 1, .skip = s.skip, .rounding = Rounding::kStochastic},
                     narrow ? residuals : FusedSteps::Impl::Narrow());
  }
  impl.backproject(shape, parameters, u, choice.q, steps, seeds, FusedSteps::Impl::step_of(s, 1));
  return measured;
}

}  // namespace

Tensor FusedSteps::low_rank(std::vector<FusedTensor> tensors, const FusedLowRank& how,
                            const FusedSettings& given) {
  if (tensors.empty()) return {};
  const c10::cuda::CUDAGuard guard(tensors[0].parameter.device());
  // A gradient may share its memory with others, or with what backward still needs.
  auto s = given;
  for (auto& t : tensors) {
    t.gradient = read_by_boxes(t.gradient);
    s.consume_gradients = s.consume_gradients && t.gradient.scalar_type() == at::kBFloat16 &&
                          t.gradient.storage().use_count() == 1;
  }
  const auto& first = tensors[0];
  const auto rank = first.indices.size(0);
  const auto shape = shape_of(first.parameter, how.transposed, rank, tensors.size());
  const auto& e = first.residual;
  const bool narrow = first.residual_scales.defined();
  const bool copies = e.defined()
                          ? e.scalar_type() != at::kBFloat16 && !(narrow && s.consume_gradients)
                          : first.gradient.scalar_type() == at::kFloat;
  const auto of_u = e.defined() && !(narrow && can_keep_rest(shape)) ? shape.longer() : 0;
  const auto low = shape.rows + shape.columns + of_u;
  std::vector<Tensor> indices, steps, measured;
  for (const auto& t : tensors) {
    indices.push_back(t.indices);
    steps.push_back(t.step);
  }
  const auto chosen = at::cat(indices).view({-1, rank});
  int64_t done = 0;
  const auto most = most_at_once(2 * (low * rank + (copies ? shape.rows * shape.columns : 0)));
  const auto at_once = even_count(static_cast<int64_t>(tensors.size()), most);
  each_batch(tensors, at_once, [&](const auto& batch) {
    const auto count = static_cast<int64_t>(batch.size());
    measured.push_back(low_rank_batch(*impl_, batch, chosen.narrow(0, done, count), how, s));
    done += count;
  });
  if (how.chooses) at::_foreach_copy_(indices, chosen.unbind(0));
  impl_->count(steps, s.skip);
  return measured[0].defined() ? at::cat(measured) : Tensor();
}

}  // namespace ounce::optim
