// SPDX-License-Identifier: MIT
#include <ounce/optim/momentum_kernels.h>
#include <ounce/optim/multi_tensor.h>

namespace ounce::optim {
namespace {

using namespace multi;
using bf16 = __nv_bfloat16;

template <class G, class M>
__global__ void __launch_bounds__(kThreads) momentum_of(const __grid_constant__ MomentumStep s) {
  const MomentumTensor& t = entry_of(s.tensors, s.count);
  const int64_t first = (int64_t{blockIdx.x} - t.first_block) * kChunk;
  const bool skips = s.skip != nullptr && *s.skip != 0;
  if (skips && t.direction == nullptr) return;
  const float scale = s.scale == nullptr ? 1 : *s.scale;
  const auto kept = rounding_of(true, *t.step + 1, t.seed, first);
  auto* m = static_cast<M*>(t.momentum);
  const auto* g = static_cast<const G*>(t.gradient);
  auto* d = static_cast<bf16*>(t.direction);
  const auto one = [&](int64_t i, M& momentum, G gradient) {
    const float x = to_float(gradient) * scale, b = to_float(momentum) + x, next = s.keep * b;
    if (!skips) kept.put(momentum, next, i);
    return __float2bfloat16_rn(skips ? 0 : s.nesterov ? x + next : b);
  };
  each_element(
      first, min(first + kChunk, t.count), t.aligned,
      [&](int64_t i) {
        auto mm = *reinterpret_cast<const Pack<M>*>(m + i);
        const auto gg = *reinterpret_cast<const Pack<G>*>(g + i);
        Pack<bf16> dd;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) dd.of[j] = one(i + j, mm.of[j], gg.of[j]);
        *reinterpret_cast<Pack<M>*>(m + i) = mm;
        if (d != nullptr) *reinterpret_cast<Pack<bf16>*>(d + i) = dd;
      },
      [&](int64_t i) {
        const auto direction = one(i, m[i], g[i]);
        if (d != nullptr) d[i] = direction;
      });
}

template <class G>
__global__ void __launch_bounds__(kThreads) feed_back_of(const __grid_constant__ Feedback s) {
  const FeedbackTensor& t = entry_of(s.tensors, s.count);
  const int64_t first = (int64_t{blockIdx.x} - t.first_block) * kChunk;
  const float scale = s.scale == nullptr ? 1 : *s.scale;
  const auto blocks = static_cast<uint32_t>((s.columns + kInt8Block - 1) / kInt8Block);
  const auto* g = static_cast<const G*>(t.gradient);
  each_element(
      first, min(first + kChunk, t.count), true,
      [&](int64_t i) {
        const auto at = static_cast<uint32_t>(i), row = at / s.columns;
        const auto block = (at - row * s.columns) / static_cast<uint32_t>(kInt8Block);
        const float by = t.scales[int64_t{row} * blocks + block];
        const auto gg = *reinterpret_cast<const Pack<G>*>(g + i);
        const auto ee = *reinterpret_cast<const Pack<int8_t>*>(t.residual + i);
        Pack<bf16> sum;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          sum.of[j] = __float2bfloat16_rn(fmaf(by, ee.of[j], to_float(gg.of[j]) * scale));
        }
        *reinterpret_cast<Pack<bf16>*>(static_cast<bf16*>(t.sum) + i) = sum;
      },
      [](int64_t) {});
}

template <class P>
__global__ void __launch_bounds__(kThreads) move_of(const __grid_constant__ Move s) {
  if (s.skip != nullptr && *s.skip != 0) return;
  const MovedTensor& t = entry_of(s.tensors, s.count);
  const int64_t first = (int64_t{blockIdx.x} - t.first_block) * kChunk;
  const float keep = 1 - *s.lr * s.weight_decay, by = *s.lr * s.factor;
  const auto rounding = rounding_of(s.stochastic_rounding, *t.step + 1, t.seed, first);
  auto* p = static_cast<P*>(t.parameter);
  const auto* d = static_cast<const bf16*>(t.direction);
  const auto one = [&](int64_t i, P& to, bf16 direction) {
    rounding.put(to, keep * to_float(to) - by * to_float(direction), i);
  };
  each_element(
      first, min(first + kChunk, t.count), t.aligned,
      [&](int64_t i) {
        auto pp = *reinterpret_cast<const Pack<P>*>(p + i);
        const auto dd = *reinterpret_cast<const Pack<bf16>*>(d + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) one(i + j, pp.of[j], dd.of[j]);
        *reinterpret_cast<Pack<P>*>(p + i) = pp;
      },
      [&](int64_t i) { one(i, p[i], d[i]); });
}

}  // namespace

cudaError_t momentum(const MomentumStep& step, cudaStream_t stream) {
  if (step.blocks == 0) return cudaSuccess;
  const auto kernel = step.gradients_are_fp32 ? step.momenta_are_fp32 ? momentum_of<float, float>
                                                                      : momentum_of<float, bf16>
                      : step.momenta_are_fp32 ? momentum_of<bf16, float>
                                              : momentum_of<bf16, bf16>;
  kernel<<<static_cast<unsigned>(step.blocks), kThreads, 0, stream>>>(step);
  return cudaGetLastError();
}

cudaError_t feed_back(const Feedback& feedback, cudaStream_t stream) {
  if (feedback.blocks == 0) return cudaSuccess;
  const auto kernel = feedback.gradients_are_fp32 ? feed_back_of<float> : feed_back_of<bf16>;
  kernel<<<static_cast<unsigned>(feedback.blocks), kThreads, 0, stream>>>(feedback);
  return cudaGetLastError();
}

cudaError_t move(const Move& move, cudaStream_t stream) {
  if (move.blocks == 0) return cudaSuccess;
  const auto kernel = move.parameters_are_fp32 ? move_of<float> : move_of<bf16>;
  kernel<<<static_cast<unsigned>(move.blocks), kThreads, 0, stream>>>(move);
  return cudaGetLastError();
}

}  // namespace ounce::optim
