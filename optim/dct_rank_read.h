// SPDX-License-Identifier: MIT
// How a unit's elements come to the ranking kernel. Device code only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ounce/kernels/common/ptx.h>

#include <cstdint>

#include <ounce/optim/dct_rank_parts.h>
#include <ounce/optim/dct_rank_shape.h>
#include <ounce/optim/stochastic_rounding_device.h>

namespace ounce::optim {

// Starts the copy of neighbours, or zeros.
template <int bytes>
__device__ void copy(void* to, const void* from, bool inside) {
  const auto at = ptx::shared_address(to);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(bytes),
                 "r"(inside ? bytes : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(bytes),
                 "r"(inside ? bytes : 0)
                 : "memory");
  }
}

// Asks the L2 cache for a unit's rows. All writes meet there, so kernels in front may still run.
template <class S>
__device__ void prefetch_rows(const Places<S>& places, const RankJob& job, int matrix, int unit) {
  if (places.thread != 0) return;
  const int64_t first = int64_t{unit} * S::kUnit;
  const auto rows = static_cast<int>(min(int64_t{S::kUnit}, job.batch.rows - first));
  const auto* from = static_cast<const char*>(job.batch.gradient[matrix]) + first * 2 * S::N;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(rows * 2 * S::N)
               : "memory");
}

// Starts the copy of a unit's bf16 elements, and of the addend's. Rows are one piece of memory,
// [vector, n]: one thread asks the copy engine for it.
template <class S>
__device__ void stage_rows(const Places<S>& places, const RankJob& job, int matrix, int unit) {
  const int64_t first = int64_t{unit} * S::kUnit;
  const auto rows = static_cast<int>(min(int64_t{S::kUnit}, job.batch.rows - first));
  if (places.thread == 0) {
    const auto copy_rows = [&](void* to, const void* from, int row_bytes) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(ptx::shared_address(to)),
          "l"(static_cast<const char*>(from) + first * row_bytes), "r"(rows * row_bytes),
          "r"(places.landed)
          : "memory");
    };
    ptx::arrive_and_expect(places.landed, rows * (2 * S::N + S::kAddedRow));
    copy_rows(places.staged, job.batch.gradient[matrix], 2 * S::N);
    if constexpr (S::kAdded > 0) {
      const RankAddend& addend = job.batch.addends[matrix];
      copy_rows(places.addend, addend.e, S::kAdded * S::N);
      if constexpr (S::kScales > 0) copy_rows(places.scales(), addend.scales, 4 * S::kScales);
    }
  }
  if (rows == S::kUnit) return;
  const auto clear = [&](auto* to, int row) {
#pragma unroll 1
    for (int i = rows * row + places.thread; i < S::kUnit * row; i += S::T) to[i] = 0;
  };
  clear(places.staged, S::N / 2);
  if constexpr (S::kAdded == 1) clear(places.scales(), S::kScales);
  if constexpr (S::kAdded == 2) clear(reinterpret_cast<uint32_t*>(places.addend), S::N / 2);
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
      copy<2 * kEach>(to + i * kDown * S::P, from, inside);
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

__device__ inline float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ inline float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// scale g + e of a matrix, on the way from the copies into the first stage.
template <class S>
struct Adding {
  const Places<S>& places;
  const RankBatch& batch;
  uint32_t* sum;  // of the matrix, two elements each; null where nothing is stored
  float scale;
  uint32_t odds = 0;  // rounding::row_of()
  int64_t first = 0;  // row of the unit

  __device__ Adding(const Places<S>& at, const RankBatch& of, int matrix) : places(at), batch(of) {
    const RankAddend& addend = batch.addends[matrix];
    const bool skips = batch.skip != nullptr && *batch.skip != 0;
    sum = skips ? nullptr : static_cast<uint32_t*>(addend.sum);
    scale = batch.scale == nullptr ? 1 : *batch.scale;
    if constexpr (S::kAdded == 2) {
      const auto step = static_cast<uint32_t>(*addend.step + 1);
      odds = rounding::row_of(rounding::stream_of(step, addend.seed), 0);
    }
  }
  // Two elements of a row of the unit.
  __device__ uint32_t operator()(uint32_t word, int row, int in_row) const {
    const int at = row * (S::N / 2) + in_row;
    const int64_t to = (first + row) * (S::N / 2) + in_row;
    const float x = scale * low_half(word), y = scale * high_half(word);
    if constexpr (S::kAdded == 1) {
      // A byte b + 128 under the exponent of 2^23 is 2^23 + 128 + b.
      constexpr float kZero = 8388608 + 128;
      const uint32_t bytes = reinterpret_cast<const uint16_t*>(places.addend)[at] ^ 0x8080u;
      const float by = places.scales()[at / (kInt8Block / 2)];
      const float low = __uint_as_float(__byte_perm(bytes, 0x4B000000, 0x7540)) - kZero;
      const float high = __uint_as_float(__byte_perm(bytes, 0x4B000000, 0x7541)) - kZero;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
          : "=r"(word)
          : "f"(fmaf(by, high, y)), "f"(fmaf(by, low, x)));
    } else {
      const uint32_t e = reinterpret_cast<const uint32_t*>(places.addend)[at];
      const auto position = static_cast<uint32_t>(2 * to);
      word = rounding::to_bf16(x + low_half(e), odds, position) |
             rounding::to_bf16(y + high_half(e), odds, position + 1) << 16;
    }
    if (sum != nullptr && first + row < batch.rows) sum[to] = word;
    return word;
  }
};

// fp32 elements of a pair of vectors.
struct Direct {
  const RankBatch& batch;
  const float* g;
  int64_t first;  // vector

  __device__ float2 two(int64_t at) const { return *reinterpret_cast<const float2*>(g + at); }
  // Elements 2m and 2m + 1 of two rows of n.
  __device__ void rows(int n, int m, float2& even, float2& odd) const {
    const int64_t at = first * n + 2 * m;
    const float2 a = first < batch.rows ? two(at) : float2{};
    const float2 b = first + 1 < batch.rows ? two(at + n) : float2{};
    even = {a.x, b.x};
    odd = {a.y, b.y};
  }
  // Element t of two columns.
  __device__ float2 columns(int t) const {
    return first < batch.columns ? two(t * batch.columns + first) : float2{};
  }
};

}  // namespace ounce::optim
