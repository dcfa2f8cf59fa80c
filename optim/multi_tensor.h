// SPDX-License-Identifier: MIT
// What kernels over many tensors at once share: each block has a chunk of one tensor of a table.
// For .cu files.
#pragma once

#include <cuda_runtime.h>
#include <ounce/optim/stochastic_rounding_device.h>

#include <cuda_bf16.h>

#include <cstdint>

namespace ounce::optim::multi {

constexpr int kThreads = 256, kWidth = 8;  // elements of a thread at a time

template <class T>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Pack {
  T of[kWidth];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// How results of a tensor are rounded to bf16.
struct Rounding {
  bool stochastic;
  uint32_t row;

  __device__ void put(float& to, float x, int64_t) const { to = x; }
  __device__ void put(__nv_bfloat16& to, float x, int64_t position) const {
    const auto bits = rounding::to_bf16(x, row, static_cast<uint32_t>(position));
    to = stochastic ? __ushort_as_bfloat16(static_cast<uint16_t>(bits)) : __float2bfloat16_rn(x);
  }
};

// Of a tensor's chunk that begins at `first`; `step`: of the step that is under way.
__device__ inline Rounding rounding_of(bool stochastic, float step, uint64_t seed, int64_t first) {
  const auto stream = rounding::stream_of(static_cast<uint32_t>(step), seed);
  return {stochastic, rounding::row_of(stream, static_cast<uint32_t>(first >> 32))};
}

// The entry that a block works on: the last that begins no later.
template <class Entry>
__device__ const Entry& entry_of(const Entry* table, int count) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table[middle].first_block <= block ? low : high) = middle;
  }
  return table[low];
}

// wide(i) for the first of every kWidth elements from `first` on, one(i) for those that are left.
template <class Wide, class One>
__device__ void each_element(int64_t first, int64_t end, bool aligned, const Wide& wide,
                             const One& one) {
  const int64_t last = aligned ? first + (end - first) / kWidth * kWidth : first;
  for (int64_t i = first + threadIdx.x * kWidth; i < last; i += kThreads * kWidth) wide(i);
  for (int64_t i = last + threadIdx.x; i < end; i += kThreads) one(i);
}

}  // namespace ounce::optim::multi
