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
  return takes(t) && projects(t.parameter, how.basis, how.transposed, t.indices.size(0));
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

Choice FusedSteps::Impl::choose(const LowRankShape& shape, const Tensor& key,
                                const std::vector<Tensor>& matrices, Basis basis, int64_t norm,
                                const Tensor& previous, bool rotates, const Tensor& skip) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  std::vector<const void*> pointers;
  bool aligned = true;
  for (const auto& matrix : matrices) {
    pointers.push_back(matrix.const_data_ptr());
    aligned = aligned && is_aligned(matrix);
  }
  const auto device = matrices[0].device();
  const RankBatch batch = {
      .count = shape.count,
      .rows = shape.rows,
      .columns = shape.columns,
      .right = shape.right,
      .gradient =
          table(key, Use::kRank).upload<const void*>(pointers, device, [&] { return pointers; }),
      .gradient_is_fp32 = matrices[0].scalar_type() == at::kFloat,
      .aligned = aligned};
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
                                   const std::vector<uint64_t>& seeds, const Update& update) {
  const auto element = element_of(parameters[0]);
  std::vector<const void*> pointers = {u.const_data_ptr(), q.const_data_ptr()};
  for (const auto& parameter : parameters) pointers.push_back(parameter.const_data_ptr());
  const auto* matrices = table(parameters[0], Use::kBackproject)
                             .upload<BackprojectMatrix>(pointers, parameters[0].device(), [&] {
                               std::vector<BackprojectMatrix> entries(parameters.size());
                               for (size_t i = 0; i < parameters.size(); ++i) {
                                 C10_CUDA_CHECK(fill(shape, element,
                                                     {.p = parameters[i].data_ptr(),
                                                      .u = row(u, i),
                                                      .q = row(q, i),
                                                      .step = floats(steps[i]),
                                                      .seed = seeds[i]},
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

namespace {

// Adam on the projections: m, v in place -> u [count, longer, rank].
Tensor project_adam(FusedSteps::Impl& impl, const LowRankShape& shape,
                    const std::vector<FusedTensor>& tensors, const FusedLowRank& how,
                    const FusedSettings& s, const Choice& choice) {
  auto u = at::empty({shape.count, shape.longer(), shape.rank}, choice.q.options());
  const ProjectHow form = {.state = element_of(tensors[0].exp_avg)};
  const bool fresh = choice.source.defined() && how.estimate_fresh_columns;
  std::vector<Tensor> rounded;
  std::vector<ProjectTensors> all;
  std::vector<const void*> pointers;
  for (const auto& part : {u, choice.q, choice.indices, choice.source, choice.squares}) {
    pointers.push_back(part.defined() ? part.const_data_ptr() : nullptr);
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& t = tensors[i];
    rounded.push_back(t.gradient.to(at::kBFloat16));
    all.push_back({.gradient = rounded[i].const_data_ptr(),
                   .q = row(choice.q, i),
                   .out = row(u, i),
                   .m = t.exp_avg.data_ptr(),
                   .v = t.exp_avg_sq.data_ptr(),
                   .step = floats(t.step),
                   .seed = t.seed,
                   .source = static_cast<const int*>(row(choice.source, i)),
                   .squares = fresh ? static_cast<const float*>(row(choice.squares, i)) : nullptr,
                   .chosen = fresh ? static_cast<const int*>(row(choice.indices, i)) : nullptr});
    for (const void* part : {all[i].gradient, static_cast<const void*>(all[i].m),
                             static_cast<const void*>(all[i].v)}) {
      pointers.push_back(part);
    }
  }
  const auto* matrices = impl.table(tensors[0].parameter, FusedSteps::Impl::Use::kProject)
                             .upload<ProjectMatrix>(pointers, u.device(), [&] {
                               std::vector<ProjectMatrix> entries(all.size());
                               for (size_t i = 0; i < all.size(); ++i) {
                                 C10_CUDA_CHECK(fill(shape, form, all[i], &entries[i]));
                               }
                               return entries;
                             });
  C10_CUDA_CHECK(project({.shape = shape,
                          .how = form,
                          .matrices = matrices,
                          .scale = floats(s.grad_scale),
                          .skip = floats(s.skip),
                          .beta1 = s.beta1,
                          .beta2 = s.beta2,
                          .eps = s.eps},
                         c10::cuda::getCurrentCUDAStream()));
  return u;
}

// [count, 3]
Tensor measure(const Choice& choice, const FusedSettings& s) {
  auto all = choice.squares.sum(1);
  auto held = choice.squares.gather(1, choice.indices.to(at::kLong)).sum(1);
  if (s.grad_scale.defined()) {
    all = all * s.grad_scale.square();
    held = held * s.grad_scale.square();
  }
  return at::stack({held, all, choice.source.lt(0).sum(1).to(at::kFloat)}, 1);
}

Tensor low_rank_batch(FusedSteps::Impl& impl, const std::vector<FusedTensor>& tensors,
                      const FusedLowRank& how, const FusedSettings& s) {
  const auto& first = tensors[0].parameter;
  const auto shape = shape_of(first, how.transposed, tensors[0].indices.size(0), tensors.size());
  std::vector<Tensor> parameters, gradients, indices, steps;
  std::vector<uint64_t> seeds;
  for (const auto& t : tensors) {
    parameters.push_back(t.parameter);
    gradients.push_back(t.gradient);
    indices.push_back(t.indices);
    steps.push_back(t.step);
    seeds.push_back(t.seed);
  }
  Choice choice{.indices = at::stack(indices)};
  Tensor measured;
  if (how.chooses) {
    choice = impl.choose(shape, first, gradients, how.basis, how.norm, choice.indices,
                         how.rotate || how.measures, s.skip);
    at::_foreach_copy_(indices, choice.indices.unbind(0));
    if (how.measures) measured = measure(choice, s);
    if (!how.rotate) choice.source = Tensor();
  }
  impl.gather(shape, how.basis, choice);
  const auto u = project_adam(impl, shape, tensors, how, s, choice);
  impl.backproject(shape, parameters, u, choice.q, steps, seeds, FusedSteps::Impl::step_of(s, 1));
  impl.count(steps, s.skip);
  return measured;
}

}  // namespace

Tensor FusedSteps::low_rank(const std::vector<FusedTensor>& given, const FusedLowRank& how,
                            const FusedSettings& s) {
  if (given.empty()) return {};
  const c10::cuda::CUDAGuard guard(given[0].parameter.device());
  auto tensors = given;
  for (auto& t : tensors) t.gradient = read_by_boxes(t.gradient);
  const auto& first = tensors[0];
  const auto rows = first.parameter.size(0), columns = first.parameter.numel() / rows;
  const auto copy = first.parameter.scalar_type() == at::kFloat ? rows * columns : 0;
  std::vector<Tensor> all;
  each_batch(tensors, 2 * ((rows + columns) * first.indices.size(0) + copy),
             [&](const auto& batch) {
               const auto measured = low_rank_batch(*impl_, batch, how, s);
               if (measured.defined()) all.push_back(measured);
             });
  return all.empty() ? Tensor() : at::cat(all);
}

}  // namespace ounce::optim
