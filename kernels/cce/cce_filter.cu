// SPDX-License-Identifier: MIT
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_filter.h>
#include <ounce/kernels/cce/cce_rows.h>

namespace ounce::cce {
namespace {

constexpr int kWarp = 32, kListThreads = 256;

__device__ float of_bf16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// A block a group of rows and a strip of tiles.
__global__ void find_kept_of(int64_t rows, int64_t vocab, const __grid_constant__ FilterRows f,
                             float eps, bool* kept, float* dropped) {
  const int64_t row = int64_t{blockIdx.x} * kFilterTile + threadIdx.x;
  const auto tiles = static_cast<int>(filter_tiles(vocab));
  const auto boxes = static_cast<int>((vocab + kBoxColumns - 1) / kBoxColumns);
  constexpr int kBoxesOfTile = kFilterTile / kBoxColumns;
  const bool counted = row < rows && f.counted[row];
  const float scale = counted ? exp2f(f.anchor[row] - f.lse[row] * kLog2e) : 0;
  const int target = counted ? f.target[row] : -1;
  float mass_dropped = 0;
  const int first = blockIdx.y * kStripTiles;
  for (int tile = first; tile < min(first + kStripTiles, tiles); ++tile) {
    float top = 0, mass = 0;
    if (counted) {
      for (int box = tile * kBoxesOfTile; box < min((tile + 1) * kBoxesOfTile, boxes); ++box) {
        const BoxMass found = f.boxes[box * rows + row];
        top = fmaxf(top, of_bf16(found.largest));
        mass += of_bf16(found.sum);
      }
    }
    // A target outside the vocabulary makes its gradients NaN: they are all kept.
    const bool here = target < 0 || target / kFilterTile == tile;
    const bool any = __syncthreads_or(counted && (here || !(top * scale < eps))) != 0;
    if (!any) mass_dropped += mass * scale;
    if (threadIdx.x == 0) kept[int64_t{blockIdx.x} * tiles + tile] = any;
  }
  if (row < rows) dropped[blockIdx.y * rows + row] = mass_dropped;
}

// A warp a row of the matrix.
__global__ void list_kept_of(const __grid_constant__ KeptMatrix m, int* list, int* count) {
  const int row = (blockIdx.x * kListThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= m.rows) return;
  int found = 0;
  for (int first = 0; first < m.columns; first += kWarp) {
    const int column = first + lane;
    const bool set = column < m.columns &&
                     m.kept[int64_t{row} * m.row_stride + int64_t{column} * m.column_stride];
    const uint32_t all = __ballot_sync(~0u, set);
    if (set) list[int64_t{row} * m.columns + found + __popc(all & ((1u << lane) - 1))] = column;
    found += __popc(all);
  }
  if (lane == 0) count[row] = found;
}

}  // namespace

cudaError_t find_kept(int64_t rows, int64_t vocab, const FilterRows& filter, float eps, bool* kept,
                      float* dropped, cudaStream_t stream) {
  const auto strips = (filter_tiles(vocab) + kStripTiles - 1) / kStripTiles;
  const dim3 blocks(static_cast<unsigned>(filter_tiles(rows)), static_cast<unsigned>(strips));
  find_kept_of<<<blocks, kFilterTile, 0, stream>>>(rows, vocab, filter, eps, kept, dropped);
  return cudaGetLastError();
}

cudaError_t list_kept(const KeptMatrix& matrix, int* list, int* count, cudaStream_t stream) {
  const auto rows_of_block = kListThreads / kWarp;
  const auto blocks = static_cast<unsigned>((matrix.rows + rows_of_block - 1) / rows_of_block);
  list_kept_of<<<blocks, kListThreads, 0, stream>>>(matrix, list, count);
  return cudaGetLastError();
}

}  // namespace ounce::cce
