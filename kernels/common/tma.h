// SPDX-License-Identifier: MIT
// Bulk copies of two-dimensional boxes between global and shared memory, in the 128-byte swizzle
// that wgmma reads: 16-byte chunk c of row r lies at chunk c ^ (r % 8).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <ounce/kernels/common/ptx.h>

#include <cstdint>

namespace ounce::tma {

constexpr int kRowBytes = 128;  // of a box

// cuTensorMapEncodeTiled, of the driver; null where it has none.
inline decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return encode;
}

// `count` matrices [rows, columns] of 16-bit elements, their rows `row_bytes` and they `bytes`
// apart, read or written in boxes of box_rows x 64. Elements outside read as 0 and are not written.
// Data and bytes are multiples of 16.
inline cudaError_t make_map(CUtensorMap* map, CUtensorMapDataType type, const void* data,
                            int64_t rows, int64_t columns, int64_t row_bytes, int box_rows,
                            int64_t count = 0, int64_t bytes = 0) {
  const auto encode = encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(count)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(bytes)};
  const cuuint32_t box[] = {kRowBytes / 2, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto result = encode(map, type, count > 0 ? 3 : 2, const_cast<void*>(data), sizes, strides,
                             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// One thread calls these. `column` and `row` are of the box's first element.
__device__ inline void load(uint32_t to, const CUtensorMap* map, int column, int row,
                            uint32_t full) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(full)
      : "memory");
}

// Into the same place of every block of the cluster whose bit is set; each one's barrier counts.
__device__ inline void load_multicast(uint32_t to, const CUtensorMap* map, int column, int row,
                                      uint32_t full, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(full), "h"(blocks)
      : "memory");
}

__device__ inline void store(const CUtensorMap* map, uint32_t from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
// The same in one of several matrices.
__device__ inline void load(uint32_t to, const CUtensorMap* map, int column, int row, int matrix,
                            uint32_t full) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(full)
      : "memory");
}
__device__ inline void load_multicast(uint32_t to, const CUtensorMap* map, int column, int row,
                                      int matrix, uint32_t full, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(full), "h"(blocks)
      : "memory");
}
__device__ inline void store(const CUtensorMap* map, uint32_t from, int column, int row,
                             int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
      "r"(column), "r"(row), "r"(matrix), "r"(from)
      : "memory");
}

__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Of this thread: their shared memory may be used again.
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace ounce::tma
