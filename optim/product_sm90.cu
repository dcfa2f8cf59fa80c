// SPDX-License-Identifier: MIT
// A persistent GEMM (tiles.h). A cluster's blocks have tiles one below the other and fetch what
// they share, of b, for both. The addend lands in the memory of the output, while the tile is
// multiplied.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ounce/kernels/common/launch.h>
#include <ounce/kernels/common/tiles.h>
#include <ounce/kernels/common/tma.h>

#include <ounce/optim/product_kernels.h>

namespace ounce::optim {
namespace {

using tiles::kGroup, tiles::kRows, tiles::kDepth, tiles::kBoxColumns, tiles::kLanes;
using tiles::kMultiplyTurn, tiles::Lane;

constexpr int kPairRows = 2 * kRows;
constexpr int kBoxBytes = kDepth * tma::kRowBytes;  // of a transposed operand: 64 inner, 64 outer

// Columns of a tile, which operands are transposed, and whether they are fp16.
template <int columns, bool a_transposed_, bool b_transposed_, bool half_>
struct FormOf {
  static constexpr bool half = half_;
  static constexpr int kColumns = columns, kBoxes = columns / kBoxColumns;
  static constexpr int kOutBytes = kRows * columns * 2;
  static constexpr bool a_transposed = a_transposed_, b_transposed = b_transposed_;
  using Memory = tiles::Ring<columns, columns == 192 ? 4 : 5, kOutBytes + 16>;
  // Of the addend.
  __device__ static uint32_t landed(const Memory& memory) { return memory.out() + kOutBytes; }
};

struct Arguments {
  CUtensorMap a, b, c, d;
  BatchedProduct product;
  int clusters, pairs, columns;  // tiles of a matrix: two by two along m, and along n
};

// The tiles of a cluster, in order. Of a symmetric matrix those that reach the diagonal.
template <class Form>
struct Walk {
  const Arguments& a;
  int matrix = 0, column = 0;
  int index;      // among the pairs of the column
  int count = 0;  // tiles before this one

  __device__ Walk(const Arguments& arguments, int cluster) : a(arguments), index(cluster) {
    find();
  }
  __device__ bool over() const { return matrix >= a.product.count; }
  __device__ int row(uint32_t block) const {
    return (first() + index) * kPairRows + static_cast<int>(block) * kRows;
  }
  __device__ int first_column() const { return column * Form::kColumns; }
  __device__ void next() {
    ++count;
    index += a.clusters;
    find();
  }

 private:
  __device__ int first() const {
    return a.product.symmetric ? column * Form::kColumns / kPairRows : 0;
  }
  __device__ void find() {
    while (!over() && index >= a.pairs - first()) {
      index -= a.pairs - first();
      if (++column < a.columns) continue;
      column = 0;
      ++matrix;
    }
  }
};

template <class Form>
__device__ void fetch(const Arguments& a, typename Form::Memory memory, int steps, int cluster,
                      uint32_t block) {
  typename Form::Memory::Place place(0);
  for (Walk<Form> walk(a, cluster); !walk.over(); walk.next()) {
    const int row = walk.row(block), column = walk.first_column();
    for (int step = 0; step < steps; ++step, place.next()) {
      memory.claim(place);
      const uint32_t full = memory.full(place.stage);
      const uint32_t left = memory.left(place.stage), right = memory.right(place.stage);
      const int inner = step * kDepth;
      if constexpr (Form::a_transposed) {
        tma::load(left, &a.a, row, inner, walk.matrix, full);
        tma::load(left + kBoxBytes, &a.a, row + kBoxColumns, inner, walk.matrix, full);
      } else {
        tma::load(left, &a.a, inner, row, walk.matrix, full);
      }
      if constexpr (Form::b_transposed) {
        constexpr int kHalf = Form::kColumns / 2;
        tma::load_multicast(right + block * kHalf * tma::kRowBytes, &a.b, inner,
                            column + static_cast<int>(block) * kHalf, walk.matrix, full, 0b11);
      } else {
        for (int box = 0; box < Form::kBoxes; ++box) {
          tma::load_multicast(
              right + box * kBoxBytes + block * (kBoxBytes / 2), &a.b, column + box * kBoxColumns,
              inner + static_cast<int>(block) * (kDepth / 2), walk.matrix, full, 0b11);
        }
      }
    }
  }
}

// The output in shared memory, as the copy engine reads it: boxes of 64 columns.
template <int rows>
__device__ uint32_t place_of(uint32_t out, int row, int column) {
  const int chunk = (column / 8 & 7) ^ (row & 7);
  return out + column / kBoxColumns * (rows * tma::kRowBytes) + row * tma::kRowBytes + chunk * 16 +
         column % 8 * 2;
}

__device__ float2 unpacked(uint32_t pair, bool half) {
  return half ? __half22float2(reinterpret_cast<const __half2&>(pair))
              : __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
__device__ uint32_t packed(float first, float second, bool half) {
  if (half) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

// d += beta c, c from where the output goes.
template <bool half, int n>
__device__ void add_addend(const Lane& at, uint32_t out, float beta, float (&d)[2][n]) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
#pragma unroll
    for (int g = 0; g < n / 4; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto place = place_of<kRows>(out, at.row(lower, h), at.column(g, 0));
        const float2 c = unpacked(ptx::load(place), half);
        float* pair = d[lower] + g * 4 + h * 2;
        pair[0] = fmaf(beta, c.x, pair[0]);
        pair[1] = fmaf(beta, c.y, pair[1]);
      }
    }
  }
}

template <bool mirrored, int n>
__device__ void stage(const Lane& at, uint32_t out, bool half, const float (&d)[2][n]) {
  constexpr int kColumns = 2 * n;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int first = lower * 64 + at.warp * 16;
#pragma unroll
    for (int g = 0; g < kColumns / 8; g += 2) {
      const float* x = d[lower] + g * 4;
      const uint32_t pairs[] = {packed(x[0], x[1], half), packed(x[2], x[3], half),
                                packed(x[4], x[5], half), packed(x[6], x[7], half)};
      if constexpr (mirrored) {
        const int row = (g + (at.lane >> 4)) * 8 + (at.lane & 7);
        ptx::store_transposed_matrices(place_of<kColumns>(out, row, first + (at.lane >> 3 & 1) * 8),
                                       pairs[0], pairs[1], pairs[2], pairs[3]);
      } else {
        ptx::store_matrices(place_of<kRows>(out, first + (at.lane & 15), (g + (at.lane >> 4)) * 8),
                            pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
}

// Of the named barriers: the turn of a warpgroup to use the output's memory; its tile is staged.
constexpr int kOutTurn = kMultiplyTurn + kLanes, kStaged = kOutTurn + kLanes;

// What is staged, rows x columns, to `row` and `column` of a matrix, in the boxes of 64 x 64 that
// wanted(row, column) of their first element; then its memory is free.
template <int rows, int columns, class F>
__device__ void store_boxes(const Arguments& a, uint32_t out, int row, int column, int matrix,
                            const F& wanted) {
  for (int c = 0; c < columns; c += kBoxColumns) {
    for (int r = 0; r < rows; r += kBoxColumns) {
      if (row + r >= a.product.m || column + c >= a.product.n) continue;
      if (!wanted(row + r, column + c)) continue;
      tma::store(&a.d, out + (c / kBoxColumns * rows + r) * tma::kRowBytes, column + c, row + r,
                 matrix);
    }
  }
  tma::commit_stores();
  tma::wait_stores_read();
}

template <class Form>
__device__ void fetch_addend(const Arguments& a, const typename Form::Memory& memory,
                             const Walk<Form>& walk, uint32_t block) {
  if (a.product.c == nullptr || walk.over()) return;
  const uint32_t landed = Form::landed(memory);
  ptx::arrive_and_expect(landed, Form::kOutBytes);
  for (int box = 0; box < Form::kBoxes; ++box) {
    tma::load(memory.out() + box * kRows * tma::kRowBytes, &a.c,
              walk.first_column() + box * kBoxColumns, walk.row(block), walk.matrix, landed);
  }
}

// A tile's epilogue; then it is the other warpgroup's turn.
template <class Form>
__device__ void finish(const Arguments& a, const typename Form::Memory& memory,
                       const Walk<Form>& walk, uint32_t block, const Lane& at, int turn,
                       tiles::Accumulators<Form::kColumns>& d) {
  const BatchedProduct& p = a.product;
  const uint32_t out = memory.out();
  const int row = walk.row(block), column = walk.first_column();
  const bool first = threadIdx.x % kGroup == 0;
  tiles::each_element(d, [&](float& x, int lower, int g, int h, int c) {
    x *= p.alpha;
    if (p.diagonal != 0 && row + at.row(lower, h) == column + at.column(g, c)) x += p.diagonal;
  });
  ptx::named_wait(kOutTurn + turn, 2 * kGroup);
  if (p.c != nullptr) {
    ptx::wait(Form::landed(memory), walk.count & 1);
    add_addend<Form::half>(at, out, p.beta, d);
  }
  stage<false>(at, out, p.out_is_half, d);
  ptx::fence_shared_for_async();
  ptx::named_wait(kStaged + turn, kGroup);
  // Each box of a symmetric matrix is written once: the lower half and the diagonal as they are.
  if (first) {
    store_boxes<kRows, Form::kColumns>(a, out, row, column, walk.matrix,
                                       [&](int r, int c) { return !p.symmetric || r >= c; });
  }
  if (p.symmetric) {
    ptx::named_wait(kStaged + turn, kGroup);
    stage<true>(at, out, p.out_is_half, d);
    ptx::fence_shared_for_async();
    ptx::named_wait(kStaged + turn, kGroup);
    if (first) {
      store_boxes<Form::kColumns, kRows>(a, out, column, row, walk.matrix,
                                         [](int r, int c) { return r < c; });
    }
  }
  if (first) {
    Walk<Form> following = walk;
    following.next();
    fetch_addend<Form>(a, memory, following, block);
  }
  __syncwarp();
  ptx::named_arrive(kOutTurn + 1 - turn, 2 * kGroup);
}

template <class Form>
__device__ void multiply_tiles(const Arguments& a, typename Form::Memory memory, int steps,
                               int cluster, uint32_t block) {
  const int thread = threadIdx.x % kGroup, turn = threadIdx.x / kGroup - 1;
  const Lane at{thread / 32, thread % 32};
  tiles::Accumulators<Form::kColumns> d;
  Walk<Form> walk(a, cluster);
  if (turn == 1) {
    if (thread == 0) fetch_addend<Form>(a, memory, walk, block);
    __syncwarp();
    ptx::named_arrive(kMultiplyTurn, 2 * kGroup);
    ptx::named_arrive(kOutTurn, 2 * kGroup);
  }
  for (; !walk.over(); walk.next()) {
    if (walk.count % kLanes != turn) continue;
    ptx::named_wait(kMultiplyTurn + turn, 2 * kGroup);
    multiply_tile(d, memory, walk.count * steps, steps, block, [&](int stage, int add) {
      constexpr bool kA = Form::a_transposed, kB = !Form::b_transposed;  // as wgmma names them
      const auto left = wgmma::descriptor(memory.left(stage));
      const auto right = kB ? wgmma::descriptor(memory.right(stage), kBoxBytes)
                            : wgmma::descriptor(memory.right(stage));
      constexpr int kLeftStep = kA ? 128 : 2, kRightStep = kB ? 128 : 2;
      constexpr int kLower = 64 * tma::kRowBytes / 16;  // from the upper 64 rows to the lower
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const auto b = right + kRightStep * k;
        wgmma::multiply<kA, kB, Form::half>(d[0], left + kLeftStep * k, b, add | k);
        wgmma::multiply<kA, kB, Form::half>(d[1], left + kLeftStep * k + kLower, b, add | k);
      }
    });
    finish<Form>(a, memory, walk, block, at, turn, d);
  }
  if (thread == 0) tma::wait_stores();
}

template <class Form>
__global__ void __cluster_dims__(2) __launch_bounds__(tiles::kThreads, 1)
    multiply_of(const __grid_constant__ Arguments a) {
  extern __shared__ char raw[];
  const typename Form::Memory memory(raw);
  const uint32_t block = ptx::block_in_cluster();
  const int cluster = blockIdx.x / 2;
  const int steps = static_cast<int>((a.product.k + kDepth - 1) / kDepth);
  if (threadIdx.x == 0) ptx::init(Form::landed(memory), 1);
  let_next_come();
  wait_for_previous();
  tiles::run_block(
      memory, [&] { fetch<Form>(a, memory, steps, cluster, block); },
      [&] { multiply_tiles<Form>(a, memory, steps, cluster, block); });
}

int64_t pieces(int64_t side, int64_t size) { return (side + size - 1) / size; }

// Wider tiles read less; an eighth of their columns may be empty before narrower ones pay.
int columns_of(const BatchedProduct& p) {
  return 7 * 192 * pieces(p.n, 192) <= 8 * 128 * pieces(p.n, 128) ? 192 : 128;
}

cudaError_t map_of(CUtensorMap* map, const void* data, const BatchedProduct& p, int64_t rows,
                   int64_t columns, int box_rows) {
  return tma::make_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, data, rows, columns, columns * 2,
                       box_rows, p.count, rows * columns * 2);
}

template <class Form>
cudaError_t launch(const BatchedProduct& p, cudaStream_t stream) {
  Arguments a;
  a.product = p;
  a.pairs = static_cast<int>(pieces(p.m, kPairRows));
  a.columns = static_cast<int>(pieces(p.n, Form::kColumns));
  auto status = count_clusters(p.count * a.pairs * a.columns, &a.clusters);
  const auto map = [&](CUtensorMap* to, const void* data, int64_t rows, int64_t columns, int box) {
    if (status == cudaSuccess) status = map_of(to, data, p, rows, columns, box);
  };
  Form::a_transposed ? map(&a.a, p.a, p.k, p.m, kDepth) : map(&a.a, p.a, p.m, p.k, kRows);
  Form::b_transposed ? map(&a.b, p.b, p.n, p.k, Form::kColumns / 2)
                     : map(&a.b, p.b, p.k, p.n, kDepth / 2);
  if (p.c != nullptr) map(&a.c, p.c, p.m, p.n, kRows);
  map(&a.d, p.d, p.m, p.n, kBoxColumns);
  if (status != cudaSuccess) return status;
  return launch_early(multiply_of<Form>, dim3(2 * a.clusters), dim3(tiles::kThreads),
                      Form::Memory::kBytes, stream, a);
}

template <int columns, bool half>
cudaError_t launch_with(const BatchedProduct& p, cudaStream_t stream) {
  if (p.a_transposed) return launch<FormOf<columns, true, false, half>>(p, stream);
  return p.b_transposed ? launch<FormOf<columns, false, true, half>>(p, stream)
                        : launch<FormOf<columns, false, false, half>>(p, stream);
}
template <bool half>
cudaError_t launch_with(const BatchedProduct& p, cudaStream_t stream) {
  return columns_of(p) == 192 ? launch_with<192, half>(p, stream)
                              : launch_with<128, half>(p, stream);
}

}  // namespace

bool can_multiply(const BatchedProduct& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool known = !p.a_transposed || !p.b_transposed;
  const bool square = !p.symmetric || p.m == p.n;
  const auto fits = [](int64_t side) { return side > 0 && side % 8 == 0 && side < kMost; };
  return known && square && p.count > 0 && p.count < kMost && fits(p.m) && fits(p.n) && fits(p.k);
}

double turns_of(const BatchedProduct& p, int processors) {
  const int columns = columns_of(p);
  const auto pairs = pieces(p.m, kPairRows);
  int64_t tiles = 0;
  for (int64_t i = 0; i < pieces(p.n, columns); ++i) {
    tiles += pairs - (p.symmetric ? i * columns / kPairRows : 0);
  }
  return static_cast<double>(pieces(p.count * tiles, processors / 2) * columns * p.k);
}

cudaError_t multiply(const BatchedProduct& p, cudaStream_t stream) {
  if (!can_multiply(p)) return cudaErrorInvalidValue;
  return p.is_half ? launch_with<true>(p, stream) : launch_with<false>(p, stream);
}

}  // namespace ounce::optim
