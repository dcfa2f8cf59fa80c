// SPDX-License-Identifier: MIT
#include <ounce/optim/fused_step_parts.h>
#include <ounce/optim/product_kernels.h>

#include <limits>

namespace ounce::optim {

namespace {

using Impl = FusedSteps::Impl;

}  // namespace

void Impl::add_gradients(std::span<const FusedMomentum> matrices, const FusedSettings& s,
                         double keep, bool nesterov, uint64_t seed, const Tensor& directions) {
  std::vector<const void*> pointers = {directions.defined() ? directions.const_data_ptr()
                                                            : nullptr};
  for (const auto& m : matrices) {
    for (const Tensor* part :
         std::initializer_list<const Tensor*>{&m.momentum, &m.gradient, &m.step}) {
      pointers.push_back(part->const_data_ptr());
    }
  }
  const int each = blocks_of_chunks(matrices[0].momentum.numel());
  const auto* table = this->table(matrices[0].momentum, Use::kMomentum)
                          .upload<MomentumTensor>(pointers, matrices[0].momentum.device(), [&] {
                            std::vector<MomentumTensor> all;
                            for (size_t i = 0; i < matrices.size(); ++i) {
                              const auto& m = matrices[i];
                              const bool aligned =
                                  is_aligned(m.momentum) && is_aligned(m.gradient) &&
                                  reinterpret_cast<uintptr_t>(row(directions, i)) % 16 == 0;
                              all.push_back({.momentum = m.momentum.data_ptr(),
                                             .gradient = m.gradient.const_data_ptr(),
                                             .direction = row(directions, i),
                                             .step = floats(m.step),
                                             .seed = m.seed + seed,
                                             .count = m.momentum.numel(),
                                             .first_block = static_cast<int>(i) * each,
                                             .aligned = aligned});
                            }
                            return all;
                          });
  C10_CUDA_CHECK(
      optim::momentum({.tensors = table,
                       .count = static_cast<int>(matrices.size()),
                       .blocks = static_cast<int>(matrices.size()) * each,
                       .gradients_are_fp32 = matrices[0].gradient.scalar_type() == at::kFloat,
                       .momenta_are_fp32 = matrices[0].momentum.scalar_type() == at::kFloat,
                       .nesterov = nesterov,
                       .keep = static_cast<float>(keep),
                       .scale = floats(s.grad_scale),
                       .skip = floats(s.skip)},
                      c10::cuda::getCurrentCUDAStream()));
}

namespace {

// Along directions [count, rows, columns] bf16.
void move_all(Impl& impl, std::span<const FusedMomentum> matrices, const Tensor& directions,
              const FusedSettings& s, double factor) {
  std::vector<const void*> pointers = {directions.const_data_ptr()};
  for (const auto& m : matrices) pointers.push_back(m.parameter.const_data_ptr());
  const int each = blocks_of_chunks(matrices[0].parameter.numel());
  const auto* table = impl.table(matrices[0].parameter, Impl::Use::kMove)
                          .upload<MovedTensor>(pointers, directions.device(), [&] {
                            std::vector<MovedTensor> all;
                            for (size_t i = 0; i < matrices.size(); ++i) {
                              const auto& m = matrices[i];
                              const bool aligned =
                                  is_aligned(m.parameter) &&
                                  reinterpret_cast<uintptr_t>(row(directions, i)) % 16 == 0;
                              all.push_back({.parameter = m.parameter.data_ptr(),
                                             .direction = row(directions, i),
                                             .step = floats(m.step),
                                             .seed = m.seed,
                                             .count = m.parameter.numel(),
                                             .first_block = static_cast<int>(i) * each,
                                             .aligned = aligned});
                            }
                            return all;
                          });
  C10_CUDA_CHECK(
      optim::move(Move{.tensors = table,
                       .count = static_cast<int>(matrices.size()),
                       .blocks = static_cast<int>(matrices.size()) * each,
                       .parameters_are_fp32 = matrices[0].parameter.scalar_type() == at::kFloat,
                       .stochastic_rounding = s.stochastic_rounding,
                       .lr = floats(s.lr),
                       .skip = floats(s.skip),
                       .weight_decay = static_cast<float>(s.weight_decay),
                       .factor = static_cast<float>(factor)},
                  c10::cuda::getCurrentCUDAStream()));
}

// How many matrices of `all` go together, up to `most`, so that the products of Newton-Schulz leave
// the fewest multiprocessors idle.
int64_t best_count(int64_t rows, int64_t columns, int64_t all, int64_t most) {
  const auto processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const auto n = std::min(rows, columns), longer = std::max(rows, columns);
  const auto turns = [&](int64_t count) {
    const auto of = [&](int64_t height, int64_t width, int64_t inner, bool symmetric) {
      return turns_of({.count = count, .m = height, .n = width, .k = inner, .symmetric = symmetric},
                      processors);
    };
    return of(n, n, longer, true) + of(n, n, n, true) + of(rows, columns, n, false);
  };
  int64_t best = 1;
  double fewest = std::numeric_limits<double>::infinity();
  for (int64_t count = 1; count <= std::min(all, most); ++count) {
    const double whole = static_cast<double>(all / count) * turns(count) + turns(all % count);
    if (whole <= fewest) {
      fewest = whole;
      best = count;
    }
  }
  return best;
}

void full_rank_step(Impl& impl, std::span<const FusedMomentum> matrices, const FusedTrion& how,
                    const FusedSettings& s) {
  const auto& first = matrices[0].parameter;
  const auto rows = first.size(0), columns = first.numel() / rows;
  auto directions = at::empty({static_cast<int64_t>(matrices.size()), rows, columns},
                              first.options().dtype(at::kBFloat16));
  impl.add_gradients(matrices, s, how.momentum, how.nesterov, kExpAvgSeed, directions);
  move_all(impl, matrices, newton_schulz(std::move(directions), how.ns_steps, how.iteration), s,
           how.factor);
}

// With how.measures what the columns hold and all, as of FusedSteps::trion().
Tensor low_rank_step(Impl& impl, std::span<const FusedMomentum> matrices, const FusedTrion& how,
                     const FusedSettings& s) {
  const auto& first = matrices[0].parameter;
  const auto shape = shape_of(first, how.transposed, how.rank, matrices.size());
  const auto parameters = fields_of(matrices, &FusedMomentum::parameter);
  const auto momenta = fields_of(matrices, &FusedMomentum::momentum);
  const auto steps = fields_of(matrices, &FusedMomentum::step);
  const auto seeds = fields_of(matrices, &FusedMomentum::seed);
  // The momentum is rounded twice, by different bits.
  const auto sums = impl.add(shape, matrices, {}, how.basis, how.norm, true, kExpAvgSqSeed, s);
  auto choice = impl.rank(shape, sums.batch, first.device(), how.basis, how.norm);
  impl.select(shape, choice, {}, false, {});
  impl.gather(shape, how.basis, choice);
  auto b = impl.project(shape, first, sums.all, choice);
  impl.backproject(shape, momenta, b, choice.q, steps, seeds,
                   {.factor = static_cast<float>(1 - how.momentum),
                    .skip = s.skip,
                    .rounding = Rounding::kStochastic},
                   kExpAvgSeed);
  const auto u = newton_schulz(std::move(b), how.ns_steps, how.iteration);
  impl.backproject(shape, parameters, u, choice.q, steps, seeds, Impl::step_of(s, how.factor));
  return how.measures ? choice.measured() : Tensor();
}

}  // namespace

std::string FusedSteps::why_not(const FusedMomentum& m, const FusedTrion& how) {
  if (auto refusal = refusal_of(m.parameter, m.gradient, m.momentum); !refusal.empty()) {
    return refusal;
  }
  if (how.rank == 0) return "";
  const auto shape = shape_of(m.parameter, how.transposed, how.rank, 1);
  if (auto refusal = refusal_of(shape, how.basis); !refusal.empty()) return refusal;
  return is_aligned(m.parameter) && is_aligned(m.momentum) ? "" : kNotAligned;
}

Tensor FusedSteps::trion(std::vector<FusedMomentum> matrices, const FusedTrion& how,
                         const FusedSettings& s) {
  if (matrices.empty()) return {};
  const c10::cuda::CUDAGuard guard(matrices[0].parameter.device());
  for (auto& m : matrices) m.gradient = read_by_boxes(m.gradient);
  const auto& first = matrices[0];
  const auto rows = first.parameter.size(0), columns = first.parameter.numel() / rows;
  const auto n = std::min(rows, columns), longer = std::max(rows, columns);
  if (how.rank == 0) {
    // Directions before and after, and four Gram matrices.
    const auto most = most_at_once(2 * (2 * rows * columns + 4 * n * n));
    each_batch(matrices, best_count(rows, columns, static_cast<int64_t>(matrices.size()), most),
               [&](const auto& batch) { full_rank_step(*impl_, batch, how, s); });
    return {};
  }
  const auto copy = first.momentum.scalar_type() == at::kFloat ? rows * columns : 0;
  const auto low = 2 * ((3 * longer + columns + 4 * how.rank) * how.rank + copy);
  std::vector<Tensor> measured;
  each_batch(matrices, even_count(static_cast<int64_t>(matrices.size()), most_at_once(low)),
             [&](const auto& batch) { measured.push_back(low_rank_step(*impl_, batch, how, s)); });
  return how.measures ? at::cat(measured) : Tensor();
}

}  // namespace ounce::optim
