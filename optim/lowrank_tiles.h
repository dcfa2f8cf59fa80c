// SPDX-License-Identifier: MIT
// What the two products of lowrank_kernels.h share: blocks in clusters of two, of one warpgroup
// that fetches and two that multiply, and a ring of stages between them. What both blocks of a
// cluster need, each fetches half of, for both. For .cu files.
#pragma once

#include <cuda_runtime.h>
#include <ounce/kernels/common/launch.h>
#include <ounce/kernels/common/ptx.h>
#include <ounce/kernels/common/tma.h>
#include <ounce/kernels/common/wgmma.h>

#include <ounce/optim/lowrank_kernels.h>
#include <ounce/optim/rounding_streams.h>
#include <ounce/optim/stochastic_rounding_device.h>

#include <cstdint>

namespace ounce::optim::lowrank {

constexpr int kGroup = 128;           // threads
constexpr int kThreads = 3 * kGroup;  // fetching, multiplying twice
constexpr int kGroupRows = 64, kBlockRows = 2 * kGroupRows, kPairRows = 2 * kBlockRows;
constexpr int kMemory = 227 * 1024;  // shared, of a block

// The turn of a stage: its number and the parity of its use.
template <int stages>
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void next() {
    if (++stage < stages) return;
    stage = 0;
    phase ^= 1;
  }
};

// Each multiplying warp of both blocks waits for every stage in turn and gives it back, as either
// block may write into it.
template <int stages, int stage_bytes>
struct Ring {
  static constexpr int kStages = stages, kStageBytes = stage_bytes;
  static constexpr int kBarrierBytes = 16 * stages;
  using Place = lowrank::Place<stages>;

  uint32_t data, barriers;

  __device__ uint32_t at(int stage) const { return data + stage * stage_bytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 16; }
  __device__ uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }

  __device__ void init(int warps = 16) const {
    for (int i = 0; i < stages; ++i) {
      ptx::init(full(i), 1);
      ptx::init(empty(i), warps);
    }
  }
  // By the fetching thread: the stage is empty and waits for `bytes`.
  __device__ void claim(const Place& place, uint32_t bytes) const {
    ptx::wait(empty(place.stage), place.phase ^ 1);
    ptx::arrive_and_expect(full(place.stage), bytes);
  }
  __device__ void wait(const Place& place) const { ptx::wait(full(place.stage), place.phase); }
  // By a warp that is through with it.
  __device__ void release(int stage, uint32_t block) const {
    if (threadIdx.x % 32 != 0) return;
    ptx::arrive(empty(stage));
    ptx::arrive_at(empty(stage), block ^ 1);
  }
};

// ---- tensor maps

// A matrix [rows, columns] in boxes of box_rows x 128 bytes. `wide`: a box is `wide` of these side
// by side, one after the other in shared memory; the columns are a multiple of their width.
inline cudaError_t make_map(CUtensorMap* map, Element element, const void* data, int64_t rows,
                            int64_t columns, int box_rows, int wide = 1) {
  const auto encode = tma::encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const int bytes = element == Element::kFp32 ? 4 : element == Element::kBf16 ? 2 : 1;
  const auto type = bytes == 4   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const auto width = static_cast<cuuint64_t>(tma::kRowBytes / bytes);
  const auto all = static_cast<cuuint64_t>(columns), row_bytes = all * bytes;
  const cuuint64_t sizes[] = {wide > 1 ? width : all, static_cast<cuuint64_t>(rows),
                              wide > 1 ? all / width : 1};
  const cuuint64_t strides[] = {row_bytes, static_cast<cuuint64_t>(tma::kRowBytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(width), static_cast<cuuint32_t>(box_rows),
                            static_cast<cuuint32_t>(wide)};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto result = encode(map, type, 3, const_cast<void*>(data), sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

constexpr int kColumns = 64;  // of a step

// Rows of boxes: what a warp has of a at once; of p; of u as a factor.
constexpr int kRowsAtOnce = 8, kWarpRows = 16, kFactorRows = 32;

// How a warp's rows [8, rank] of a are copied: in boxes of 64 columns, all at once where they come
// out even.
struct Copies {
  int count, wide;
};
inline Copies copies_of(int rank) {
  if (rank % 64 == 0) return {1, rank / 64};
  return {(rank + 63) / 64, 1};
}

// A map in global memory may have been written since the block's copy engine read it.
__device__ inline void refresh(const CUtensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

__device__ inline void load(uint32_t to, const CUtensorMap* map, int column, int row,
                            uint32_t full) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, 0}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(full)
      : "memory");
}
// For both blocks of the cluster.
__device__ inline void load_for_both(uint32_t to, const CUtensorMap* map, int column, int row,
                                     uint32_t full) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, 0}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(full), "h"(uint16_t{0b11})
      : "memory");
}
__device__ inline void store(const CUtensorMap* map, uint32_t from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, 0}], [%3];" ::"l"(map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
// Of this thread's committed stores all but the last `pending` have read their shared memory.
template <int pending>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// ---- shared memory by address

__device__ inline float2 load_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_u16(uint32_t address, uint32_t x) {
  ptx::store(address, static_cast<uint16_t>(x));
}
__device__ inline void store_u32(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ inline void store_float2(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool transposed>
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

// bf16 pairs, the first element in the lower half.
__device__ inline float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ inline uint32_t pack(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// ---- the work

// The device scalar, or what it is without.
__device__ inline float scalar(const float* p, float otherwise) {
  return p == nullptr ? otherwise : *p;
}

// Pieces of kPairRows of a dimension, of all matrices in turn: clusters work on neighbours at the
// same time, so that what these share stays in the L2 cache.
struct Walk {
  int pairs, item;

  __device__ int matrix() const { return item / pairs; }
  __device__ int row() const { return item % pairs * kPairRows; }
};

// A block's work: warps of the first warpgroup fetch, the others multiply.
template <class Fetch, class Multiply>
__device__ void run_block(const Fetch& fetch, const Multiply& multiply) {
  ptx::cluster_sync();
  // Together what the block was launched with: 3 x 168.
  if (threadIdx.x < kGroup) {
    ptx::give_registers<40>();
    fetch(threadIdx.x / 32, threadIdx.x % 32);
  } else {
    ptx::take_registers<232>();
    multiply(threadIdx.x / kGroup - 1, threadIdx.x % kGroup);
  }
  // A block's memory and barriers are used by the other one until both are through.
  ptx::cluster_sync();
}

template <class Arguments>
cudaError_t launch_clusters(void (*kernel)(Arguments), const Arguments& a, int memory,
                            cudaStream_t stream) {
  return launch_early(kernel, dim3(2 * a.clusters), dim3(kThreads), memory, stream, a);
}

// A step's product: d = the rows in `left` times the right factor in a stage, q with `right`, else
// u with its columns in rows.
template <bool right, int rank>
__device__ void multiply_step(float (&d)[32], const wgmma::Fragment (&left)[rank / 16],
                              uint32_t stage) {
  wgmma::fence();
#pragma unroll
  for (int k = 0; k < rank / 16; ++k) {
    const auto at = wgmma::descriptor(stage) + (right ? k * 128 : k / 4 * 512 + k % 4 * 2);
    wgmma::multiply<right>(d, left[k], at, k);
  }
  wgmma::commit();
}

inline bool is_valid(const LowRankShape& s) {
  return s.rows > 0 && s.columns > 0 && s.columns % 8 == 0 && s.n() % 8 == 0 && s.count > 0 &&
         s.rank > 0 && s.rank % 16 == 0 && s.rank <= 256 && s.rank <= s.n() &&
         s.rows < (int64_t{1} << 32) / s.columns && s.rows < (1 << 30);
}
inline int padded(int rank) { return rank <= 64 ? 64 : rank <= 128 ? 128 : 256; }
inline bool is_aligned(const void* p) {
  return p != nullptr && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace ounce::optim::lowrank
