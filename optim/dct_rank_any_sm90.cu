// SPDX-License-Identifier: MIT
// Ranking without tables of shapes: lengths of small factors by stages in shared memory, the
// identity, and the sums of slots.
#include <cuda_runtime.h>

#include <algorithm>

#include <ounce/optim/dct_butterflies.h>
#include <ounce/optim/dct_rank_parts.h>
#include <ounce/optim/dct_rank_read.h>
#include <ounce/optim/dct_rank_shape.h>

namespace ounce::optim {
namespace {

constexpr int kThreads = 512, kMostFactors = 16;

// A block transforms `pairs` pairs of vectors at a time.
struct AnyLength {
  int n = 0, pairs = 0, sums = 1, factors = 0;
  int factor[kMostFactors] = {};
  int64_t shared = 0, together = 1;  // bytes of a block; blocks of a multiprocessor
};

// Bytes besides the points: roots, tangents, sums, reversed positions.
int64_t table_bytes(int n, int sums) { return int64_t{n} * (8 + 2 + 4 * sums + 2) + 16; }

AnyLength any_length(const RankBatch& batch, bool absolutes) {
  AnyLength a;
  a.n = static_cast<int>(batch.length());
  a.sums = absolutes ? 2 : 1;
  int rest = a.n;
  for (const int factor : {4, 2, 3, 5, 7, 11}) {
    for (; rest % factor == 0; rest /= factor) a.factor[a.factors++] = factor;
  }
  const int64_t tables = table_bytes(a.n, a.sums), pair = int64_t{a.n} * 8;
  // Columns are read in sectors of 32 bytes; rows only have to keep the threads busy.
  const int64_t most = batch.right ? (2 * kThreads + a.n - 1) / a.n : 8;
  a.pairs = 1;
  while (2 * a.pairs <= most && tables + 2 * a.pairs * pair <= kSharedLimit) a.pairs *= 2;
  a.shared = tables + a.pairs * pair;
  a.together = std::clamp<int64_t>(kSharedLimit / a.shared, 1, 3);
  return a;
}

__device__ int reversed(const AnyLength& a, int t) {
  int place = 0, length = a.n;
  for (int i = a.factors; i-- > 0; t /= a.factor[i]) {
    length /= a.factor[i];
    place += t % a.factor[i] * length;
  }
  return place;
}

// By definition.
template <int R>
__device__ void transform(float2 (&x)[R], const float2* roots, int step) {
  if constexpr (R == 2) {
    butterfly(x[0], x[1], false);
  } else if constexpr (R == 4) {
    float2 y[4] = {x[0], x[2], x[1], x[3]};
    Radix<4>::apply(y);
    for (int q = 0; q < 4; ++q) x[q] = y[q];
  } else if constexpr (R == 3) {
    dft3(x[0], x[1], x[2]);
  } else {
    float2 y[R];
#pragma unroll
    for (int q = 0; q < R; ++q) {
      y[q] = x[0];
#pragma unroll
      for (int j = 1; j < R; ++j) {
        const float2 term = multiply(x[j], roots[j * q % R * step]);
        y[q] = {y[q].x + term.x, y[q].y + term.y};
      }
    }
#pragma unroll
    for (int q = 0; q < R; ++q) x[q] = y[q];
  }
}

// Joins transforms of `length` points to those of R length.
template <int R>
__device__ void join(const AnyLength& a, int length, float2* points, const float2* roots) {
  const int each = a.n / R, step = each / length;
  for (int item = threadIdx.x; item < a.pairs * each; item += kThreads) {
    const int b = item % each, i = b % length;
    float2* at = points + item / each * a.n + b / length * length * R + i;
    float2 x[R];
#pragma unroll
    for (int j = 0; j < R; ++j) x[j] = multiply(at[j * length], roots[i * j * step]);
    transform(x, roots, each);
#pragma unroll
    for (int j = 0; j < R; ++j) at[j * length] = x[j];
  }
  __syncthreads();
}

struct AnyPlaces {
  float2 *points, *roots;
  float *tangents, *sums;  // [n / 2 + 1], [sums, n]
  uint16_t* reverse;

  __device__ AnyPlaces(const AnyLength& a, unsigned char* shared) {
    points = reinterpret_cast<float2*>(shared);
    roots = points + a.pairs * a.n;
    sums = reinterpret_cast<float*>(roots + a.n);
    tangents = sums + a.sums * a.n;
    reverse = reinterpret_cast<uint16_t*>(tangents + a.n / 2 + 1);
  }
};

__device__ void add_vectors(const AnyLength& a, const AnyPlaces& places) {
  int length = 1;
  for (int f = 0; f < a.factors; length *= a.factor[f++]) {
    switch (a.factor[f]) {
      case 2:
        join<2>(a, length, places.points, places.roots);
        break;
      case 3:
        join<3>(a, length, places.points, places.roots);
        break;
      case 4:
        join<4>(a, length, places.points, places.roots);
        break;
      case 5:
        join<5>(a, length, places.points, places.roots);
        break;
      case 7:
        join<7>(a, length, places.points, places.roots);
        break;
      default:
        join<11>(a, length, places.points, places.roots);
    }
  }
  for (int k = threadIdx.x; 2 * k <= a.n; k += kThreads) {
    float squares[2] = {}, sums[2] = {};
    for (int pair = 0; pair < a.pairs; ++pair) {
      const float2* point = places.points + pair * a.n;
      add_pair<true>(point[k], point[k == 0 ? 0 : a.n - k], places.tangents[k], squares, sums);
    }
    places.sums[k] += squares[0];
    if (a.sums == 2) places.sums[a.n + k] += sums[0];
    if (k == 0 || 2 * k == a.n) continue;
    places.sums[a.n - k] += squares[1];
    if (a.sums == 2) places.sums[2 * a.n - k] += sums[1];
  }
  __syncthreads();
}

__device__ void read_points(const AnyLength& a, const AnyPlaces& places, const RankJob& job,
                            int matrix, int unit) {
  const auto put = [&](int vector, int t, float value) {
    float2& point = places.points[vector / 2 * a.n + places.reverse[makhoul(t, a.n)]];
    (vector % 2 == 0 ? point.x : point.y) = value;
  };
  const Reading reading = {job.batch.right, a.n, a.pairs, kThreads};
  read_vectors<1>(job.batch, matrix, int64_t{unit} * 2 * a.pairs, reading, threadIdx.x, put);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    any_length_of(const __grid_constant__ RankJob job, const __grid_constant__ AnyLength a) {
  extern __shared__ __align__(16) unsigned char shared[];
  const AnyPlaces places(a, shared);
  for (int i = threadIdx.x; i < a.n; i += kThreads) {
    places.roots[i] = root_of_unity(i, a.n);
    places.reverse[i] = static_cast<uint16_t>(reversed(a, i));
    if (2 * i > a.n) continue;
    const float2 turn = root_of_unity(i, 4 * a.n);
    places.tangents[i] = -turn.y / turn.x;
  }
  int first = job.first_unit(blockIdx.x);
  const int end = job.first_unit(blockIdx.x + 1);
  while (first < end) {
    const int matrix = first / job.units, base = matrix * job.units;
    const int last = min(end, base + job.units);
    __syncthreads();
    for (int i = threadIdx.x; i < a.sums * a.n; i += kThreads) places.sums[i] = 0;
    __syncthreads();
    for (; first < last; ++first) {
      read_points(a, places, job, matrix, first - base);
      add_vectors(a, places);
    }
    float* slot = job.slots + (int64_t{blockIdx.x} + matrix) * a.sums * a.n;
    for (int i = threadIdx.x; i < a.sums * a.n; i += kThreads) {
      slot[i] = places.sums[i];
    }
  }
}

// Few registers, and for few sums few threads and blocks, so that they find room beside rank_of and
// wait there for its end. Registers would not hold all that should be on its way: slots come by way
// of shared memory, kAhead at a time.
constexpr int kSumRegisters = 32, kSumThreads = 128, kMostSumThreads = 512;
constexpr int kSumBlocks = 128, kMostLanes = 32, kAhead = 5;

// blockDim.x times `width` neighbours of a matrix a block, threadIdx.y a share of the slots.
template <int width>
__global__ void __launch_bounds__(kMostSumThreads, 65536 / kSumRegisters / kMostSumThreads)
    sum_slots_of(const __grid_constant__ SlotSums s) {
  using Few = Neighbours<float, width>;
  extern __shared__ __align__(16) float parts[];
  const RankJob& job = s.job;
  const int matrix = blockIdx.y, lanes = blockDim.y;
  int first = matrix * s.slots_of_matrix, last = first + s.slots_of_matrix;
  if (s.slots_of_matrix == 0) {
    const int unit = matrix * job.units;
    first = job.block_of(unit) + matrix;
    last = job.block_of(unit + job.units - 1) + matrix + 1;
  }
  const int n = static_cast<int>(job.batch.length()), sums = s.absolutes == nullptr ? n : 2 * n;
  const int threads = blockDim.x * lanes, thread = threadIdx.y * blockDim.x + threadIdx.x;
  auto* staged = reinterpret_cast<Few*>(parts) + thread;  // [kAhead, threads]
  const int block = blockIdx.x * blockDim.x * width;
  const int own = block + thread, at = block + threadIdx.x * width, step = lanes * sums;
  const float scale = s.slots_of_matrix == 0 ? scale_of(own, n) : 1;
  const float* from = job.slots + int64_t{first + threadIdx.y} * sums + at;
  int left = at < sums ? last - first - static_cast<int>(threadIdx.y) : 0;
  let_next_come();
  wait_for_previous();
  Few sum = {};
#pragma unroll 1
  for (; left > 0; left -= kAhead * lanes) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j, from += step) {
      const bool inside = j * lanes < left;
      copy<4 * width>(staged + j * threads, inside ? from : job.slots, inside);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int i = 0; i < width; ++i) sum.of[i] += staged[j * threads].of[i];
    }
  }
#pragma unroll 1
  for (unsigned other = 16; other >= blockDim.x; other /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) sum.of[i] += __shfl_xor_sync(~0u, sum.of[i], other);
  }
  *staged = sum;
  __syncthreads();
  if (thread >= blockDim.x * width || own >= sums) return;
  const int of_row = max(static_cast<int>(blockDim.x), 32) * width;
  float all = 0;
#pragma unroll 1
  for (int i = thread; i < threads * width; i += of_row) all += parts[i];
  float* to =
      own < n ? s.squares + int64_t{matrix} * n + own : s.absolutes + int64_t{matrix} * n + own - n;
  *to = all * scale;
}

constexpr int kChunk = 512, kLanes = 8;  // rows of a slot; rows at a time

// A block 32 width columns of a chunk of rows.
template <int width>
__global__ void __launch_bounds__(32 * kLanes)
    columns_of(const __grid_constant__ RankJob job, bool absolutes) {
  __shared__ float parts[2][kLanes][32 * width];
  const RankBatch& batch = job.batch;
  const int matrix = blockIdx.z;
  const void* g = batch.gradient[matrix];
  const int64_t column = (int64_t{blockIdx.x} * 32 + threadIdx.x) * width;
  const int64_t row = int64_t{blockIdx.y} * kChunk, end = min(batch.rows, row + kChunk);
  float squares[width] = {}, sums[width] = {};
  if (column < batch.columns) {
#pragma unroll 4
    for (int64_t y = row + threadIdx.y; y < end; y += kLanes) {
      float x[width];
      read(g, batch.gradient_is_fp32, y * batch.columns + column, x);
      for (int j = 0; j < width; ++j) {
        squares[j] = fmaf(x[j], x[j], squares[j]);
        sums[j] += fabsf(x[j]);
      }
    }
  }
  for (int j = 0; j < width; ++j) {
    parts[0][threadIdx.y][threadIdx.x * width + j] = squares[j];
    parts[1][threadIdx.y][threadIdx.x * width + j] = sums[j];
  }
  __syncthreads();
  const int64_t n = batch.columns;
  float* slot = job.slots + (int64_t{matrix} * gridDim.y + blockIdx.y) * (absolutes ? 2 : 1) * n;
  for (int i = threadIdx.y * 32 + threadIdx.x; i < 32 * width; i += 32 * kLanes) {
    const int64_t k = int64_t{blockIdx.x} * 32 * width + i;
    if (k >= n) break;
    for (int kind = 0; kind < (absolutes ? 2 : 1); ++kind) {
      float sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += parts[kind][lane][i];
      slot[kind * n + k] = sum;
    }
  }
}

// A warp a row.
template <int width>
__global__ void __launch_bounds__(32 * kLanes)
    rows_of(const __grid_constant__ RankJob job, float* squares, float* absolutes) {
  const RankBatch& batch = job.batch;
  const int matrix = blockIdx.z;
  const int64_t row = int64_t{blockIdx.x} * kLanes + threadIdx.y;
  if (row >= batch.rows) return;
  const void* g = batch.gradient[matrix];
  float square = 0, sum = 0;
#pragma unroll 4
  for (int64_t at = threadIdx.x * width; at < batch.columns; at += 32 * width) {
    float x[width];
    read(g, batch.gradient_is_fp32, row * batch.columns + at, x);
    for (int j = 0; j < width; ++j) {
      square = fmaf(x[j], x[j], square);
      sum += fabsf(x[j]);
    }
  }
  for (int step = 16; step > 0; step /= 2) {
    square += __shfl_xor_sync(~0u, square, step);
    sum += __shfl_xor_sync(~0u, sum, step);
  }
  if (threadIdx.x != 0) return;
  squares[matrix * batch.rows + row] = square;
  if (absolutes != nullptr) absolutes[matrix * batch.rows + row] = sum;
}

unsigned blocks_of(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

}  // namespace

cudaError_t sum_slots(const SlotSums& sums, cudaStream_t stream) {
  const RankJob& job = sums.job;
  const int64_t all = job.batch.length() * (sums.absolutes == nullptr ? 1 : 2);
  const int slots =
      sums.slots_of_matrix == 0 ? job.blocks / job.batch.count + 2 : sums.slots_of_matrix;
  int lanes = 1;
  while (lanes < kMostLanes && 4 * lanes < slots) lanes *= 2;
  const int64_t width = lanes >= 4 && job.batch.length() % 4 == 0 ? 4 : 1;
  const bool few = all * job.batch.count * lanes <= kSumBlocks * kSumThreads * width;
  const dim3 block((few ? kSumThreads : kMostSumThreads) / lanes, lanes);
  const dim3 grid(blocks_of(all, block.x * width), static_cast<unsigned>(job.batch.count));
  return launch_early(width == 4 ? sum_slots_of<4> : sum_slots_of<1>, grid, block,
                      kAhead * block.x * block.y * width * 4, stream, sums);
}

int64_t any_length_blocks(const RankBatch& batch, bool absolutes, int processors) {
  const auto a = any_length(batch, absolutes);
  const int64_t units = (batch.vectors() + 2 * a.pairs - 1) / (2 * a.pairs);
  return blocks_for(units * batch.count, a.together * processors);
}

cudaError_t rank_any_length(const RankBatch& batch, const RankOutput& out, int processors,
                            cudaStream_t stream) {
  const auto a = any_length(batch, out.absolutes != nullptr);
  if (a.shared > kSharedLimit) return cudaErrorInvalidValue;
  const int64_t units = (batch.vectors() + 2 * a.pairs - 1) / (2 * a.pairs);
  const auto job = make_job(batch, units, a.together * processors, out.scratch);
  const auto status = cudaFuncSetAttribute(
      any_length_of, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedLimit));
  if (status != cudaSuccess) return status;
  any_length_of<<<job.blocks, kThreads, a.shared, stream>>>(job, a);
  if (const auto launched = cudaGetLastError(); launched != cudaSuccess) return launched;
  return sum_slots({job, 0, out.squares, out.absolutes}, stream);
}

int64_t identity_slots(const RankBatch& batch) {
  return batch.right ? blocks_of(batch.rows, kChunk) : 0;
}

cudaError_t rank_identity(const RankBatch& batch, const RankOutput& out, cudaStream_t stream) {
  const RankJob job = make_job(batch, 1, 1, out.scratch);
  const auto count = static_cast<unsigned>(batch.count);
  const dim3 block(32, kLanes);
  if (!batch.right) {
    const auto kernel = batch.aligned ? rows_of<4> : rows_of<1>;
    kernel<<<dim3(blocks_of(batch.rows, kLanes), 1, count), block, 0, stream>>>(job, out.squares,
                                                                                out.absolutes);
    return cudaGetLastError();
  }
  const auto chunks = static_cast<unsigned>(identity_slots(batch));
  const auto kernel = batch.aligned ? columns_of<4> : columns_of<1>;
  const dim3 grid(blocks_of(batch.columns, batch.aligned ? 128 : 32), chunks, count);
  kernel<<<grid, block, 0, stream>>>(job, out.absolutes != nullptr);
  if (const auto status = cudaGetLastError(); status != cudaSuccess) return status;
  return sum_slots({job, static_cast<int>(chunks), out.squares, out.absolutes}, stream);
}

}  // namespace ounce::optim
