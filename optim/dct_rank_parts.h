// SPDX-License-Identifier: MIT
// What the ranking kernels share: the job, how blocks divide it, and how elements are read. Device
// code only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ounce/kernels/common/launch.h>

#include <cstdint>

#include <ounce/optim/dct_rank_kernels.h>

namespace ounce::optim {

// A unit is as many vectors of one matrix as a group of threads transforms together. The first
// `longer` blocks get each + 1 units, the others `each`, in order. What block b sums of matrix m
// goes to slot b + m: no two blocks share one, and those of a matrix are neighbours.
struct RankJob {
  RankBatch batch;
  int units = 0;  // of a matrix
  int blocks = 0, each = 0, longer = 0;
  float* slots = nullptr;  // [blocks + count, sums, n]

  constexpr int first_unit(int block) const {
    return block * each + (block < longer ? block : longer);
  }
  // The block that holds a unit.
  constexpr int block_of(int unit) const {
    const int first = longer * (each + 1);
    return unit < first ? unit / (each + 1) : longer + (unit - first) / each;
  }
};
inline int blocks_for(int64_t all_units, int64_t most) {
  return static_cast<int>(all_units < most ? all_units : most);
}
inline RankJob make_job(const RankBatch& batch, int64_t units, int64_t most, void* slots) {
  const int64_t all = units * batch.count, blocks = blocks_for(all, most);
  return {batch,
          static_cast<int>(units),
          static_cast<int>(blocks),
          static_cast<int>(all / blocks),
          static_cast<int>(all % blocks),
          static_cast<float*>(slots)};
}

// squares, absolutes = the sums of each matrix's slots, in a fixed order. slots_of_matrix 0: of
// add_pair(), as RankJob says; else so many a matrix.
struct SlotSums {
  RankJob job;
  int slots_of_matrix = 0;
  float *squares = nullptr, *absolutes = nullptr;
};
cudaError_t sum_slots(const SlotSums& sums, cudaStream_t stream);

// Lengths of which dct_rank_sm90.cu has no kernel; and the identity.
int64_t any_length_blocks(const RankBatch& batch, bool absolutes, int processors);
cudaError_t rank_any_length(const RankBatch& batch, const RankOutput& out, int processors,
                            cudaStream_t stream);
int64_t identity_slots(const RankBatch& batch);
cudaError_t rank_identity(const RankBatch& batch, const RankOutput& out, cudaStream_t stream);

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, int width>
struct alignas(sizeof(T) * width) Neighbours {
  T of[width];
};

// x[0 .. width) of g from element `at` on.
template <int width>
__device__ inline void read(const void* g, bool is_fp32, int64_t at, float (&x)[width]) {
  const auto load = [&]<class T>(const T* from) {
    const auto pack = *reinterpret_cast<const Neighbours<T, width>*>(from + at);
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = to_float(pack.of[i]);
  };
  is_fp32 ? load(static_cast<const float*>(g)) : load(static_cast<const __nv_bfloat16*>(g));
}

// Which vectors to read: 2 pairs of n elements from `first` on, along rows, by `threads` threads.
struct Reading {
  bool right;
  int n, pairs, threads;
};
// put(vector, t, value) for element t; 0 behind the last vector.
template <int width, class Put>
__device__ inline void read_vectors(const RankBatch& batch, int matrix, int64_t first,
                                    const Reading& reading, int thread, Put put) {
  const void* g = batch.gradient[matrix];
  const auto [right, n, pairs, threads] = reading;
  const int row = right ? n : 2 * pairs;  // of the rectangle that is read
  const int all = 2 * pairs * n / width;
#pragma unroll 4
  for (int i = thread; i < all; i += threads) {
    const int y = i * width / row, x = i * width % row;
    const int64_t vector = first + (right ? y : x);
    float values[width] = {};
    if (vector < batch.vectors()) {
      const int64_t at = right ? vector * n + x : y * batch.columns + vector;
      read(g, batch.gradient_is_fp32, at, values);
    }
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (right) {
        put(y, x + j, values[j]);
      } else {
        put(x + j, y, values[j]);
      }
    }
  }
}

// Where Makhoul's transform wants element t: evens ascending, then odds descending.
__device__ inline int makhoul(int t, int n) { return t % 2 == 0 ? t / 2 : n - 1 - t / 2; }

// p, q: the points at k and n - k of a + i b. With t the tangent of pi k / 2n, cos a_k =
// (Re A + t Im A) / 2 and so on; the cosine is left to scale_of().
template <bool absolutes>
__device__ inline void add_pair(float2 p, float2 q, float t, float (&squares)[2],
                                float (&sums)[2]) {
  const float a = p.x + q.x, a_im = p.y - q.y, b = p.y + q.y, b_im = q.x - p.x;
  const float a_low = fmaf(t, a_im, a), a_high = fmaf(t, a, -a_im);
  const float b_low = fmaf(t, b_im, b), b_high = fmaf(t, b, -b_im);
  squares[0] = fmaf(a_low, a_low, fmaf(b_low, b_low, squares[0]));
  squares[1] = fmaf(a_high, a_high, fmaf(b_high, b_high, squares[1]));
  if constexpr (absolutes) {
    sums[0] += fabsf(a_low) + fabsf(b_low);
    sums[1] += fabsf(a_high) + fabsf(b_high);
  }
}

// The factor that add_pair() leaves out of sum i of [squares or absolutes, n]: the square of
// c_k / sqrt(2 n) times the cosine of pi min(k, n - k) / 2n, or its root.
__device__ inline float scale_of(int64_t i, int64_t n) {
  const int64_t k = i < n ? i : i - n;
  const float cosine = cospif(static_cast<float>(min(k, n - k)) / static_cast<float>(n));
  const float scale = (k == 0 ? 0.125f : 0.25f) / static_cast<float>(n) * (1 + cosine);
  return i < n ? scale : sqrtf(scale);
}

}  // namespace ounce::optim
