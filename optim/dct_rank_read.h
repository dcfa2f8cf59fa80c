// SPDX-License-Identifier: MIT
// How a unit's elements come to the ranking kernel. Device code only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ounce/kernels/common/ptx.h>

#include <cstdint>
#include <type_traits>

#include <ounce/optim/dct_rank_parts.h>
#include <ounce/optim/dct_rank_shape.h>

namespace ounce::optim {

// `to` = count neighbours, or zeros.
template <int count>
__device__ void copy(__nv_bfloat16* to, const __nv_bfloat16* from, bool inside) {
  constexpr int kBytes = 2 * count;
  const auto at = ptx::shared_address(to);
  if constexpr (count == 8) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes),
                 "r"(inside ? kBytes : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes),
                 "r"(inside ? kBytes : 0)
                 : "memory");
  }
}

// Starts the copy of a unit's bf16 elements. Rows are one piece of memory, [vector, n]: one thread
// asks the copy engine for it.
template <class S>
__device__ void stage_rows(const Places<S>& places, const RankJob& job, int matrix, int unit) {
  const int64_t first = int64_t{unit} * S::kUnit;
  const auto count = static_cast<int>(min(int64_t{2 * S::P}, job.batch.rows - first)) * S::N;
  if (places.thread == 0) {
    const auto* g = static_cast<const __nv_bfloat16*>(job.batch.gradient[matrix]) + first * S::N;
    ptx::arrive_and_expect(places.landed, count * 2);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(ptx::shared_address(places.staged)),
        "l"(g), "r"(count * 2), "r"(places.landed)
        : "memory");
  }
  if (count == 2 * S::P * S::N) return;
#pragma unroll 1
  for (int i = count / 2 + places.thread; i < S::kStaged; i += S::T) places.staged[i] = 0;
  places.wait();  // the copy's barrier does not order other threads' zeros
}

// Of columns: even rows, then odd ones, [2, n / 2, 2 P]. In kParts parts, since so many narrow
// copies at once hold up the threads.
constexpr int kParts = 3;
template <class S>
struct ColumnCopy {
  static constexpr int kEach = S::P >= 4 ? 8 : 4, kAcross = 2 * S::P / kEach;
  static constexpr int kDown = S::T / kAcross, kSteps = S::N / kDown;
  static_assert(kDown % 2 == 0 && S::N % kDown == 0);
  const __nv_bfloat16* from = nullptr;
  int64_t step = 0;
  bool inside = false;

  __device__ ColumnCopy(const Places<S>& places, const RankJob& job, int matrix, int unit) {
    const auto* g = static_cast<const __nv_bfloat16*>(job.batch.gradient[matrix]);
    const int row = places.thread / kAcross, piece = places.thread % kAcross * kEach;
    const int64_t column = int64_t{unit} * S::kUnit + piece;
    inside = column < job.batch.columns;
    from = inside ? g + row * job.batch.columns + column : g;
    step = inside ? job.batch.columns * kDown : 0;
  }
  template <int part>
  __device__ void run(const Places<S>& places) {
    const int row = places.thread / kAcross, piece = places.thread % kAcross * kEach;
    auto* to = reinterpret_cast<__nv_bfloat16*>(places.staged) +
               (row % 2 * (S::N / 2) + row / 2) * (2 * S::P) + piece;
#pragma unroll
    for (int i = part * kSteps / kParts; i < (part + 1) * kSteps / kParts; ++i, from += step) {
      copy<kEach>(to + i * kDown * S::P, from, inside);
    }
    if constexpr (part == kParts - 1) {
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(places.landed)
                   : "memory");
    }
  }
};

// Puts a unit's elements of any kind where the first stage reads them.
template <class S>
__device__ void fill(const Places<S>& places, const RankJob& job, int matrix, int unit) {
  const auto put = [&](int vector, int t, float value) {
    const int point = makhoul(t, S::N);
    const int at = S::at(vector / 2, point / S::M1, point % S::M1);
    reinterpret_cast<float*>(places.exchange + at)[vector % 2] = value;
  };
  constexpr Reading kReading = {S::kRight, S::N, S::P, S::T};
  if (job.batch.aligned) {
    read_vectors<4>(job.batch, matrix, int64_t{unit} * S::kUnit, kReading, places.thread, put);
  } else {
    read_vectors<1>(job.batch, matrix, int64_t{unit} * S::kUnit, kReading, places.thread, put);
  }
  places.wait();
}

template <class T>
__device__ float2 two_of(const void* from, int64_t at) {
  const auto both = *reinterpret_cast<const Neighbours<T, 2>*>(static_cast<const T*>(from) + at);
  return {to_float(both.of[0]), to_float(both.of[1])};
}

// Elements of a pair of vectors.
template <class S, class G, class E>
struct Direct {
  const RankBatch& batch;
  const void *g, *e;
  float scale;
  int64_t first;  // vector

  __device__ float2 two(int64_t at) const {
    const float2 x = two_of<G>(g, at);
    if constexpr (std::is_void_v<E>) {
      return {x.x * scale, x.y * scale};
    } else {
      const float2 y = two_of<E>(e, at);
      return {fmaf(x.x, scale, y.x), fmaf(x.y, scale, y.y)};
    }
  }
  // Elements 2m and 2m + 1 of two rows.
  __device__ void rows(int m, float2& even, float2& odd) const {
    const int64_t at = first * S::N + 2 * m;
    const float2 a = first < batch.rows ? two(at) : float2{};
    const float2 b = first + 1 < batch.rows ? two(at + S::N) : float2{};
    even = {a.x, b.x};
    odd = {a.y, b.y};
  }
  // Element t of two columns.
  __device__ float2 columns(int t) const {
    return first < batch.columns ? two(t * batch.columns + first) : float2{};
  }
};

}  // namespace ounce::optim
