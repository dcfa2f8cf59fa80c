// SPDX-License-Identifier: MIT
// Adam in the subspace. A block has some rows of one matrix: their moments come to shared memory
// whole, because columns change places in a row, and everything else goes straight through.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ounce/kernels/common/launch.h>
#include <ounce/kernels/common/ptx.h>
#include <ounce/optim/lowrank_kernels.h>
#include <ounce/optim/multi_tensor.h>
#include <ounce/optim/rounding_streams.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ounce::optim {
namespace {

using namespace multi;
using bf16 = __nv_bfloat16;

constexpr int kMomentBytes = 16384;  // of m, and of v, at most
constexpr int kMostRank = 256;
constexpr uint16_t kNew = 0xFFFF;  // as the place of a column: it was not there

struct Constants {
  float beta1, rest1, log_beta1, beta2, root_rest2, log_beta2, eps;

  explicit Constants(const ProjectedAdam& s)
      : beta1(static_cast<float>(s.beta1)),
        rest1(static_cast<float>(1 - s.beta1)),
        // Times no step at all it is 0, for beta = 0 too.
        log_beta1(static_cast<float>(std::max(std::log(s.beta1), -1e30))),
        beta2(static_cast<float>(s.beta2)),
        root_rest2(static_cast<float>(std::sqrt(1 - s.beta2))),
        log_beta2(static_cast<float>(std::max(std::log(s.beta2), -1e30))),
        eps(static_cast<float>(s.eps)) {}
};

template <class S>
struct Shared {
  S m[kMomentBytes / sizeof(S)], v[kMomentBytes / sizeof(S)];
  alignas(16) float fresh[kMostRank];  // what a new column's v begins with, 0 of others
  alignas(16) uint16_t place[kMostRank];
};

// `bytes`, a multiple of 16, by all threads of the block.
__device__ void copy_to_shared(void* to, const void* from, int bytes) {
  const auto at = ptx::shared_address(to);
  const auto* source = static_cast<const char*>(from);
  for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += kThreads * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at + i), "l"(source + i)
                 : "memory");
  }
}

// What the columns of the matrix need of the choice before.
template <class S>
__device__ void make_tables(Shared<S>& shared, const ProjectedAdamMatrix& t, int rank, float seen) {
  for (int j = static_cast<int>(threadIdx.x); j < rank; j += kThreads) {
    const int from = t.source == nullptr ? j : t.source[j];
    const bool fresh = from < 0 || from >= rank;
    shared.place[j] = fresh ? kNew : static_cast<uint16_t>(from);
    shared.fresh[j] =
        fresh && t.squares != nullptr ? seen * t.squares[t.chosen == nullptr ? j : t.chosen[j]] : 0;
  }
}

// m / (root2 sqrt(v) + eps) to 2^-21, in a few instructions.
__device__ inline float direction_of(float m, float v, float root2, float eps) {
  float root, inverse;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaf(root, root2, eps)));
  return m * inverse;
}

struct Terms {
  Constants c;
  float of_m, of_v;       // times a: what is added to m; whose square is added to v
  float inverse1, root2;  // 1 / (1 - beta1^t); the root of 1 / (1 - beta2^t)
  multi::Rounding m_bits, v_bits;

  template <class S>
  __device__ float one(float a, float old_m, float old_v, uint32_t position, S& m, S& v) const {
    const float root = a * of_v;
    m_bits.put(m, fmaf(c.beta1, old_m, a * of_m), position);
    v_bits.put(v, fmaf(root, root, c.beta2 * old_v), position);
    return direction_of(to_float(m) * inverse1, to_float(v), root2, c.eps);
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, 5)
    adam_of(const __grid_constant__ ProjectedAdam s, const __grid_constant__ Constants c,
            int elements) {
  __shared__ alignas(16) Shared<S> shared;
  let_next_come();
  wait_for_previous();
  if (s.skip != nullptr && *s.skip != 0) return;
  const ProjectedAdamMatrix& t = s.matrices[blockIdx.y];
  const int64_t first = int64_t{blockIdx.x} * elements;
  const int count = static_cast<int>(min(int64_t{elements}, s.longer * s.rank - first));
  auto *m = static_cast<S*>(t.m) + first, *v = static_cast<S*>(t.v) + first;
  copy_to_shared(shared.m, m, count * static_cast<int>(sizeof(S)));
  copy_to_shared(shared.v, v, count * static_cast<int>(sizeof(S)));
  const float scale = s.scale == nullptr ? 1 : *s.scale, step = *t.step;
  make_tables(shared, t, s.rank,
              -expm1f(step * c.log_beta2) * scale * scale / static_cast<float>(s.longer));
  const Terms terms = {c,
                       c.rest1 * scale,
                       c.root_rest2 * scale,
                       -1 / expm1f((step + 1) * c.log_beta1),
                       rsqrtf(-expm1f((step + 1) * c.log_beta2)),
                       rounding_of(true, step + 1, t.seed + kExpAvgSeed, 0),
                       rounding_of(true, step + 1, t.seed + kExpAvgSqSeed, 0)};
  const auto* a = static_cast<const bf16*>(t.a) + first;
  auto* u = static_cast<bf16*>(t.u) + first;
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) * kWidth; i < count; i += kThreads * kWidth) {
    const int column = i % s.rank, row = i - column;
    const auto aa = *reinterpret_cast<const Pack<bf16>*>(a + i);
    const auto places = *reinterpret_cast<const Pack<uint16_t>*>(shared.place + column);
    const auto fresh = *reinterpret_cast<const Pack<float>*>(shared.fresh + column);
    Pack<S> mm, vv;
    Pack<bf16> uu;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const bool is_new = places.of[j] == kNew;
      const int from = row + (is_new ? 0 : places.of[j]);
      const float was_m = to_float(shared.m[from]), was_v = to_float(shared.v[from]);
      const float old_m = is_new ? 0 : was_m, old_v = is_new ? fresh.of[j] : was_v;
      uu.of[j] =
          __float2bfloat16_rn(terms.one(to_float(aa.of[j]), old_m, old_v,
                                        static_cast<uint32_t>(first) + i + j, mm.of[j], vv.of[j]));
    }
    *reinterpret_cast<Pack<S>*>(m + i) = mm;
    *reinterpret_cast<Pack<S>*>(v + i) = vv;
    *reinterpret_cast<Pack<bf16>*>(u + i) = uu;
  }
}

}  // namespace

cudaError_t adam(const ProjectedAdam& s, cudaStream_t stream) {
  if (s.count == 0) return cudaSuccess;
  if (s.rank < 16 || s.rank % 16 != 0 || s.rank > kMostRank) return cudaErrorInvalidValue;
  const auto run = [&]<class S>(S) {
    const int elements = kMomentBytes / static_cast<int>(sizeof(S)) / s.rank * s.rank;
    const dim3 grid(static_cast<unsigned>((s.longer * s.rank + elements - 1) / elements),
                    static_cast<unsigned>(s.count));
    return launch_early(adam_of<S>, grid, dim3(kThreads), 0, stream, s, Constants(s), elements);
  };
  return s.moments_are_fp32 ? run(float()) : run(bf16());
}

}  // namespace ounce::optim
