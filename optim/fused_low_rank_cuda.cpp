// SPDX-License-Identifier: MIT
#include <ounce/optim/fused_step_parts.h>

namespace ounce::optim {

namespace {

using Impl = FusedSteps::Impl;

// Adam on the projections `a` of gradients times `scale`: m, v in place -> u, which may be a.
void adam_batch(Impl& impl, const LowRankShape& shape, std::span<const FusedTensor> tensors,
                const Tensor& a, const Tensor& u, const Tensor& scale, const FusedLowRank& how,
                const FusedSettings& s, const Choice& choice) {
  const bool fresh = choice.source.defined() && how.estimate_fresh_columns;
  std::vector<const void*> pointers;
  for (const auto& part : {a, u, choice.indices, choice.source, choice.squares}) {
    pointers.push_back(part.defined() ? part.const_data_ptr() : nullptr);
  }
  for (const auto& t : tensors) {
    pointers.insert(pointers.end(), {t.exp_avg.const_data_ptr(), t.exp_avg_sq.const_data_ptr()});
  }
  const auto* matrices =
      impl.table(tensors[0].parameter, Impl::Use::kProjectedAdam)
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

// What it measured, or undefined.
Tensor low_rank_batch(Impl& impl, std::span<const FusedTensor> tensors, const FusedLowRank& how,
                      const FusedSettings& s) {
  const auto& first = tensors[0].parameter;
  const auto shape = shape_of(first, how.transposed, tensors[0].indices.size(0), tensors.size());
  const bool feeds_back = tensors[0].residual.defined();
  const auto gradients = fields_of(tensors, &FusedTensor::gradient);
  // What is projected; it counts that times `scale`.
  Impl::Sums x;
  const auto scale = feeds_back ? Tensor() : s.grad_scale;
  Impl::Narrow residuals;
  if (feeds_back) {
    std::vector<FusedMomentum> fed_back;
    for (const auto& t : tensors) {
      fed_back.push_back({{}, t.gradient, t.residual, t.step, t.seed});
      residuals.bytes.push_back(t.residual);
      if (t.residual_scales.defined()) residuals.scales.push_back(t.residual_scales);
    }
    x = impl.add(shape, fed_back, residuals.scales, how.basis, how.norm, how.chooses,
                 kResidualSumSeed, s);
  } else if (how.chooses) {
    x.batch = impl.batch_of(shape, first, gradients);
  }
  // As early as it can be: the host catches up while it runs.
  Choice choice;
  if (how.chooses) choice = impl.rank(shape, x.batch, first.device(), how.basis, how.norm);
  const auto indices = fields_of(tensors, &FusedTensor::indices);
  Tensor measured;
  if (how.chooses) {
    impl.select(shape, choice, indices, how.rotate || how.measures, s.skip);
    if (how.measures) measured = choice.measured(scale);
    if (!how.rotate) choice.source = Tensor();
  } else {
    choice.indices = at::stack(indices);
  }
  impl.gather(shape, how.basis, choice);
  if (!feeds_back) {
    for (const auto& gradient : gradients) x.all.push_back(gradient.to(at::kBFloat16));
  }
  // What the projection leaves becomes the residual: with it in 8 bits, else behind Adam.
  const bool narrow = !residuals.scales.empty();
  const auto a =
      impl.project(shape, first, x.all, choice, s.skip, narrow ? residuals : Impl::Narrow());
  const auto u = feeds_back && !narrow ? at::empty_like(a) : a;
  const auto parameters = fields_of(tensors, &FusedTensor::parameter);
  const auto steps = fields_of(tensors, &FusedTensor::step);
  const auto seeds = fields_of(tensors, &FusedTensor::seed);
  adam_batch(impl, shape, tensors, a, u, scale, how, s, choice);
  if (feeds_back && !narrow) {
    impl.backproject(shape, residuals.bytes, a, choice.q, steps, seeds,
                     {.keep = 1, .skip = s.skip, .rounding = Rounding::kStochastic}, kResidualSeed);
  }
  impl.backproject(shape, parameters, u, choice.q, steps, seeds, Impl::step_of(s, 1));
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
  const auto of_u = e.defined() && !narrow ? shape.longer() : 0;
  const auto low = shape.rows + shape.columns + of_u;
  const auto most = most_at_once(2 * (low * rank + (copies ? shape.rows * shape.columns : 0)));
  const auto at_once = even_count(static_cast<int64_t>(tensors.size()), most);
  std::vector<Tensor> measured;
  each_batch(tensors, at_once,
             [&](const auto& batch) { measured.push_back(low_rank_batch(*impl_, batch, how, s)); });
  return measured[0].defined() ? at::cat(measured) : Tensor();
}

}  // namespace ounce::optim
