// SPDX-License-Identifier: MIT
// Products over the tiles that a filter keeps: a persistent GEMM (cce_tiles.h) whose steps along
// the inner dimension come from a list. A cluster's blocks have tiles side by side, which share the
// left operand and the list.
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_filter.h>
#include <ounce/kernels/cce/cce_tiles.h>
#include <ounce/kernels/common/tma.h>

#include <cuda_bf16.h>

#include <algorithm>

namespace ounce::cce {
namespace {

constexpr int kBoxRows = 64,
              kBoxBytes = kBoxRows * kBoxColumns * 2;  // what the copy engine fetches
constexpr int kStepsOfTile = kFilterTile / kDepth;
static_assert(kTileRows == kFilterTile && kTileRows == 2 * kBoxRows && kDepth == kBoxRows);

using Memory = Ring<5, 0>;

struct Arguments {
  CUtensorMap left, right;
  KeptProduct product;
  int clusters, row_tiles, pairs;  // of tiles: along m, and two by two along n
};

// Pairs of tiles side by side that clusters work on at a time: few enough that what they read of
// `right` stays in the L2 cache while the row tiles pass by, each read once for all of them.
constexpr int kStrip = 2;

// The tiles of a cluster, in order.
struct Walk {
  const Arguments& a;
  int index, pair, row_tile, part;
  int position = 0;  // steps before this tile

  __device__ Walk(const Arguments& arguments, int cluster) : a(arguments), index(cluster) {
    find();
  }
  __device__ bool over() const { return part >= a.product.parts; }
  __device__ int column(uint32_t block) const {
    return (pair * 2 + static_cast<int>(block)) * kTileColumns;
  }
  // Of the row tile's list, this part's entries.
  __device__ const int* entries() const {
    return a.product.list + int64_t{row_tile} * a.product.list_stride + share(part);
  }
  __device__ int count() const { return share(part + 1) - share(part); }
  __device__ void next(int steps) {
    position += steps;
    index += a.clusters;
    find();
  }

 private:
  __device__ void find() {
    part = index / (a.pairs * a.row_tiles);
    const int place = index - part * a.pairs * a.row_tiles;
    const int first = place / (kStrip * a.row_tiles) * kStrip;
    const int width = min(kStrip, a.pairs - first), in_strip = place - first * a.row_tiles;
    pair = first + in_strip % width;
    row_tile = in_strip / width;
  }
  __device__ int share(int part_) const {
    return static_cast<int>(int64_t{__ldg(a.product.count + row_tile)} * part_ / a.product.parts);
  }
};

template <bool left_is_transposed>
__device__ void fetch(const Arguments& a, Memory memory, int cluster, uint32_t block) {
  Memory::Place place(0);
  for (Walk walk(a, cluster); !walk.over(); walk.next(0)) {
    const int* entries = walk.entries();
    const int outer = walk.row_tile * kTileRows + static_cast<int>(block) * kBoxRows;
    for (int step = 0, steps = walk.count() * kStepsOfTile; step < steps; ++step, place.next()) {
      const int inner =
          __ldg(entries + step / kStepsOfTile) * kFilterTile + step % kStepsOfTile * kDepth;
      memory.claim(place);
      const uint32_t full = memory.full(place.stage);
      tma::load_multicast(memory.left(place.stage) + block * kBoxBytes, &a.left,
                          left_is_transposed ? outer : inner, left_is_transposed ? inner : outer,
                          full, 0b11);
      for (int box = 0; box < kTileColumns / kBoxColumns; ++box) {
        tma::load(memory.right(place.stage) + box * kBoxBytes, &a.right,
                  walk.column(block) + box * kBoxColumns, inner, full);
      }
    }
  }
}

__device__ float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ float2 load_pair(const __nv_bfloat16* p) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
}
__device__ void store_pair(float* p, float2 x) { *reinterpret_cast<float2*>(p) = x; }
__device__ void store_pair(__nv_bfloat16* p, float2 x) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __float22bfloat162_rn(x);
}

template <class Out>
__device__ void write_tile(const KeptProduct& p, const Walk& walk, const Lane& at, int first_column,
                           const Accumulators& d) {
  auto* out = static_cast<Out*>(p.out) + walk.part * p.m * p.n;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = int64_t{walk.row_tile} * kTileRows + at.row(half, h);
      if (row >= p.m) continue;
#pragma unroll
      for (int g = 0; g < kTileColumns / 8; ++g) {
        const int column = first_column + at.column(g, 0);
        if (column >= p.n) continue;
        Out* place = out + row * p.n + column;
        float2 pair{d[half][g * 4 + h * 2], d[half][g * 4 + h * 2 + 1]};
        if (p.add) {
          const float2 old = load_pair(place);
          pair = {pair.x + old.x, pair.y + old.y};
        }
        store_pair(place, pair);
      }
    }
  }
}

template <bool left_is_transposed, class Out>
__device__ void multiply(const Arguments& a, Memory memory, int cluster, uint32_t block) {
  const int thread = threadIdx.x % kGroup, turn = threadIdx.x / kGroup - 1;
  const Lane at{thread / 32, thread % 32};
  Accumulators d;
  if (turn == 1) ptx::named_arrive(kMultiplyTurn, 2 * kGroup);
  int tile = 0;
  for (Walk walk(a, cluster); !walk.over(); ++tile) {
    const int steps = walk.count() * kStepsOfTile;
    if (tile % kLanes == turn) {
      ptx::named_wait(kMultiplyTurn + turn, 2 * kGroup);
      multiply_tile(d, memory, walk.position, steps, block, [&](int stage, int add) {
        const auto left = wgmma::descriptor(memory.left(stage));
        const auto right = wgmma::descriptor(memory.right(stage), kBoxBytes);
        constexpr int step = left_is_transposed ? 128 : 2;
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          wgmma::multiply<left_is_transposed, true>(d[0], left + step * k, right + 128 * k,
                                                    add | k);
          wgmma::multiply<left_is_transposed, true>(d[1], left + step * k + kBoxBytes / 16,
                                                    right + 128 * k, add | k);
        }
      });
      if (steps == 0) each_element(d, [](float& x, int, int, int, int) { x = 0; });
      if (steps > 0 || !a.product.add) {
        write_tile<Out>(a.product, walk, at, walk.column(block), d);
      }
    }
    walk.next(steps);
  }
}

template <bool left_is_transposed, class Out>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    multiply_kept_of(const __grid_constant__ Arguments a) {
  extern __shared__ char raw[];
  const Memory memory(raw);
  const uint32_t block = ptx::block_in_cluster();
  const int cluster = blockIdx.x / 2;
  run_block(
      memory, [&] { fetch<left_is_transposed>(a, memory, cluster, block); },
      [&] { multiply<left_is_transposed, Out>(a, memory, cluster, block); });
}

template <bool left_is_transposed, class Out>
cudaError_t launch(const Arguments& a, cudaStream_t stream) {
  return launch_clusters<Memory>(multiply_kept_of<left_is_transposed, Out>, a, a.clusters, stream);
}

int row_tiles_of(int64_t m) { return static_cast<int>((m + kTileRows - 1) / kTileRows); }
int pairs_of(int64_t n) {
  return static_cast<int>((n + 2 * kTileColumns - 1) / (2 * kTileColumns));
}

cudaError_t map_of(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                   int64_t stride) {
  return tma::make_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, rows, columns, stride * 2,
                       kBoxRows);
}

}  // namespace

int parts_of(int64_t m, int64_t n, int clusters) {
  constexpr int kRounds = 8, kMost = 8;
  const int tiles = std::max(1, row_tiles_of(m) * pairs_of(n));
  return std::clamp((kRounds * clusters + tiles - 1) / tiles, 1, kMost);
}

cudaError_t multiply_kept(const KeptProduct& p, int clusters, cudaStream_t stream) {
  Arguments a;
  a.product = p;
  a.clusters = clusters;
  a.row_tiles = row_tiles_of(p.m);
  a.pairs = pairs_of(p.n);
  const bool transposed = p.left_is_transposed;
  auto error = map_of(&a.left, p.left, transposed ? p.inner : p.m, transposed ? p.m : p.inner,
                      p.left_stride);
  if (error != cudaSuccess) return error;
  error = map_of(&a.right, p.right, p.inner, p.n, p.right_stride);
  if (error != cudaSuccess) return error;
  if (!transposed) return p.out_is_fp32 ? launch<false, float>(a, stream) : cudaErrorInvalidValue;
  return p.out_is_fp32 ? launch<true, float>(a, stream) : launch<true, __nv_bfloat16>(a, stream);
}

}  // namespace ounce::cce
