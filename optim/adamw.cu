// SPDX-License-Identifier: MIT
#include <ounce/optim/adamw_kernels.h>
#include <ounce/optim/multi_tensor.h>

#include <cmath>

namespace ounce::optim {
namespace {

using namespace multi;

struct Element {
  float p, m, v;
};

// Of a step, in the precision that its options have: 1 - 0.999f is not 0.001f.
struct Constants {
  float beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay;

  explicit Constants(const AdamStep& s)
      : beta1(static_cast<float>(s.beta1)),
        rest1(static_cast<float>(1 - s.beta1)),
        log_beta1(static_cast<float>(std::log(s.beta1))),
        beta2(static_cast<float>(s.beta2)),
        rest2(static_cast<float>(1 - s.beta2)),
        log_beta2(static_cast<float>(std::log(s.beta2))),
        eps(static_cast<float>(s.eps)),
        weight_decay(static_cast<float>(s.weight_decay)) {}
};

// What a step needs of a tensor.
struct Terms {
  Constants c;
  float scale, keep, rate, root;

  __device__ Terms(const AdamStep& s, const Constants& constants, float t) : c(constants) {
    scale = s.scale == nullptr ? 1 : *s.scale;
    keep = 1 - *s.lr * c.weight_decay;
    rate = *s.lr / -expm1f(t * c.log_beta1);
    root = rsqrtf(-expm1f(t * c.log_beta2));
  }
  __device__ Element operator()(float p, float g, float m, float v) const {
    g *= scale;
    m = c.beta1 * m + c.rest1 * g;
    v = c.beta2 * v + c.rest2 * (g * g);
    return {keep * p - rate * __fdividef(m, sqrtf(v) * root + c.eps), m, v};
  }
};

template <class P, class S>
__device__ void step_chunk(const AdamTensor& t, const Terms& terms, const Rounding (&roundings)[3],
                           int64_t first, int64_t end) {
  auto* p = static_cast<P*>(t.parameter);
  const auto* g = static_cast<const P*>(t.gradient);
  auto *m = static_cast<S*>(t.exp_avg), *v = static_cast<S*>(t.exp_avg_sq);
  const auto put = [&](int64_t i, const Element& e, P& p_out, S& m_out, S& v_out) {
    roundings[0].put(p_out, e.p, i);
    roundings[1].put(m_out, e.m, i);
    roundings[2].put(v_out, e.v, i);
  };
  each_element(
      first, end, t.aligned,
      [&](int64_t i) {
        auto pp = *reinterpret_cast<const Pack<P>*>(p + i);
        const auto gg = *reinterpret_cast<const Pack<P>*>(g + i);
        auto mm = *reinterpret_cast<const Pack<S>*>(m + i);
        auto vv = *reinterpret_cast<const Pack<S>*>(v + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          put(i + j,
              terms(to_float(pp.of[j]), to_float(gg.of[j]), to_float(mm.of[j]), to_float(vv.of[j])),
              pp.of[j], mm.of[j], vv.of[j]);
        }
        *reinterpret_cast<Pack<P>*>(p + i) = pp;
        *reinterpret_cast<Pack<S>*>(m + i) = mm;
        *reinterpret_cast<Pack<S>*>(v + i) = vv;
      },
      [&](int64_t i) {
        put(i, terms(to_float(p[i]), to_float(g[i]), to_float(m[i]), to_float(v[i])), p[i], m[i],
            v[i]);
      });
}

template <class P, class S>
__global__ void __launch_bounds__(kThreads)
    adamw_of(const __grid_constant__ AdamStep s, const __grid_constant__ Constants constants) {
  if (s.skip != nullptr && *s.skip != 0) return;
  const AdamTensor& t = entry_of(s.tensors, s.count);
  const int64_t first = (int64_t{blockIdx.x} - t.first_block) * kChunk;
  const float now = *t.step + 1;
  const Rounding roundings[] = {rounding_of(s.rounds_parameters, now, t.seed, first),
                                rounding_of(true, now, t.seed + kExpAvgSeed, first),
                                rounding_of(true, now, t.seed + kExpAvgSqSeed, first)};
  step_chunk<P, S>(t, Terms(s, constants, now), roundings, first, min(first + kChunk, t.count));
}

__global__ void advance_all(float* const* steps, int count, const float* skip) {
  if (skip != nullptr && *skip != 0) return;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) *steps[i] += 1;
}

}  // namespace

cudaError_t adamw(const AdamStep& step, cudaStream_t stream) {
  if (step.blocks == 0) return cudaSuccess;
  using bf16 = __nv_bfloat16;
  const auto kernel = step.parameters_are_fp32
                          ? step.moments_are_fp32 ? adamw_of<float, float> : adamw_of<float, bf16>
                      : step.moments_are_fp32 ? adamw_of<bf16, float>
                                              : adamw_of<bf16, bf16>;
  kernel<<<static_cast<unsigned>(step.blocks), kThreads, 0, stream>>>(step, Constants(step));
  return cudaGetLastError();
}

cudaError_t advance(float* const* steps, int count, const float* skip, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  advance_all<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      steps, count, skip);
  return cudaGetLastError();
}

}  // namespace ounce::optim
