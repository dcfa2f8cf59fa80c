// SPDX-License-Identifier: MIT
// The passes over the logits on Hopper: a persistent GEMM whose epilogue is the pass. One warp
// fetches tiles with the copy engine, the classifier's to both blocks of a cluster at once; two
// warpgroups multiply in turn, so that one's epilogue runs under the other's products.
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_kernels.h>
#include <ounce/kernels/common/tma.h>
#include <ounce/kernels/common/wgmma.h>

#include <cuda_bf16.h>

namespace ounce::cce {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kGroup = 128;  // threads
constexpr int kThreads = 3 * kGroup;
constexpr int kHiddenBytes = kTileRows * kDepth * 2, kWeightBytes = kTileColumns * kDepth * 2;
constexpr int kHalfColumns = kTileColumns / 2;  // fetched by each block for both
constexpr int kOutBytes = kTileRows * kTileColumns * 2;
constexpr int kBoxColumns = 64, kBoxBytes = kTileRows * kBoxColumns * 2;  // of the output

enum class Pass { kSum, kGradient };

// A block's shared memory: stages of the two operands, the output, barriers of the stages.
template <Pass pass>
struct Memory {
  static constexpr int kStages = pass == Pass::kSum ? 5 : 4;
  static constexpr int kStageBytes = kHiddenBytes + kWeightBytes;
  static constexpr int kOutAt = kStages * kStageBytes;
  static constexpr int kFullAt = kOutAt + (pass == Pass::kSum ? 0 : kOutBytes);
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static constexpr int kBytes = kEmptyAt + kStages * 8 + 1024;  // to begin at a multiple of 1024

  uint32_t base;

  __device__ uint32_t hidden(int stage) const { return base + stage * kStageBytes; }
  __device__ uint32_t weight(int stage) const { return hidden(stage) + kHiddenBytes; }
  __device__ uint32_t out() const { return base + kOutAt; }
  __device__ uint32_t full(int stage) const { return base + kFullAt + stage * 8; }
  __device__ uint32_t empty(int stage) const { return base + kEmptyAt + stage * 8; }
};

struct Arguments {
  CUtensorMap hidden, weight, out;
  Logits logits;
  LogitGradient gradient;
  Partial* partials;    // of Pass::kSum
  float* target_logit;  // of Pass::kSum
  float* rounding;      // of Pass::kGradient
};

// The tiles of a cluster, in order.
struct Walk {
  const Schedule& schedule;
  int cluster, form = 0, sweep = 0;  // of the form
  int first_pair = 0;                // of the sweep
  int partials = 0;                  // of the sweeps before
  int tile = 0;                      // along the vocabulary
  int count = 0;                     // tiles before this one

  __device__ Walk(const Schedule& s, int cluster_) : schedule(s), cluster(cluster_) { enter(); }
  __device__ const Sweeps& now() const { return schedule.forms[form]; }
  __device__ bool over() const { return form == Schedule::kForms || now().count == 0; }
  __device__ int pair() const { return first_pair + cluster % now().pairs; }
  __device__ int column() const { return cluster / now().pairs; }
  // Of the partial values of this pair of tiles.
  __device__ int slot(int turn) const {
    return partials +
           ((column() * kLanes + turn) * now().pairs + cluster % now().pairs) * kPairRows;
  }
  // True while the tokens stay the same.
  __device__ bool next() {
    ++count;
    tile += now().columns;
    if (tile < schedule.tiles) return true;
    leave();
    enter();
    return false;
  }

 private:
  __device__ void leave() {
    first_pair += now().pairs;
    partials += now().partials();
    if (++sweep == now().count) {
      sweep = 0;
      ++form;
    }
  }
  // Passes sweeps that have nothing for this cluster.
  __device__ void enter() {
    while (!over() && column() >= now().columns) leave();
    if (!over()) tile = column();
  }
};

template <Pass pass>
__device__ void fetch(const Arguments& a, Memory<pass> memory, int depth_steps, int cluster,
                      uint32_t block) {
  int stage = 0;
  uint32_t phase = 0;
  for (Walk walk(a.logits.schedule, cluster); !walk.over(); walk.next()) {
    const int row = walk.pair() * kPairRows + static_cast<int>(block) * kTileRows;
    const int column = walk.tile * kTileColumns + static_cast<int>(block) * kHalfColumns;
    for (int step = 0; step < depth_steps; ++step) {
      ptx::wait(memory.empty(stage), phase ^ 1);
      ptx::arrive_and_expect(memory.full(stage), kHiddenBytes + kWeightBytes);
      tma::load(memory.hidden(stage), &a.hidden, step * kDepth, row, memory.full(stage));
      tma::load_multicast(memory.weight(stage) + block * (kWeightBytes / 2), &a.weight,
                          step * kDepth, column, memory.full(stage), 0b11);
      if (++stage == memory.kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
  }
}

// A thread's four rows of a tile: [half of 64 rows][8 rows further].
using Rows = float[2][2];
using Accumulators = float[2][kTileColumns / 2];

struct Lane {
  int warp, lane;
  __device__ int row(int half, int h) const { return half * 64 + warp * 16 + h * 8 + lane / 4; }
  __device__ int column(int g, int c) const { return g * 8 + (lane & 3) * 2 + c; }
};

template <class F>
__device__ void each_element(Accumulators& d, const F& f) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int c = 0; c < 2; ++c) f(d[half][g * 4 + h * 2 + c], half, g, h, c);
      }
    }
  }
}

__device__ inline float tanh_of(float x) {
  const float e = ptx::exp2(fabsf(x) * (2 * kLog2e));
  return copysignf(1 - __fdividef(2.f, e + 1), x);
}

// A logit whose exponential is 0, and whose square is finite.
constexpr float kNothing = -1e15f;

// x C^T -> z / k; columns outside become kNothing. Returns k (> 0).
__device__ float finish_logits(const Logits& p, const Lane& at, int first, Accumulators& d) {
  const bool plain = p.bias == nullptr && p.softcap == 0 && p.scale > 0;
  if (!plain) {
#pragma unroll
    for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = first + at.column(g, c);
        const float bias = p.bias != nullptr && column < p.vocab ? __ldg(p.bias + column) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& z = d[half][g * 4 + h * 2 + c];
            z = (z + bias) * p.scale;
            if (p.softcap > 0) z = p.softcap * tanh_of(z / p.softcap);
          }
        }
      }
    }
  }
  if (first + kTileColumns > p.vocab) {
    each_element(d, [&](float& z, int, int g, int, int c) {
      if (first + at.column(g, c) >= p.vocab) z = kNothing;
    });
  }
  return plain ? p.scale : 1;
}

// Takes the targets out of the tile: kNothing stays. Calls f(row, z) in the thread
// that has one. Selections instead of branches keep the tile in registers.
template <class F>
__device__ void take_targets(const Logits& p, const Lane& at, int first_row, int first,
                             Accumulators& d, const F& f) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + at.row(half, h);
      if (row >= static_cast<int>(p.rows)) continue;
      const int target = __ldg(p.target + row) - first;
      if (target < 0 || target >= kTileColumns || (target >> 1 & 3) != (at.lane & 3)) continue;
      float logit = 0;
#pragma unroll
      for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& z = d[half][g * 4 + h * 2 + c];
          const bool here = target == at.column(g, c);
          logit = here ? z : logit;
          z = here ? kNothing : z;
        }
      }
      f(row, logit);
    }
  }
}

// Of the four threads that share a row.
__device__ float over_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The sum of a row's exponentials without the target's, so that a loss near 0 keeps its precision.
struct RunningSum {
  Rows largest, sum;

  __device__ void clear() {
    for (auto& half : largest) half[0] = half[1] = -INFINITY;
    for (auto& half : sum) half[0] = half[1] = 0;
  }

  // `k`: from d to powers of two.
  __device__ void add(Accumulators& d, float k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = d[half][h * 2];
#pragma unroll
        for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
          for (int c = 0; c < 2; ++c) top = fmaxf(top, d[half][g * 4 + h * 2 + c]);
        }
        const float now = fmaxf(largest[half][h], top * k), base = fmaxf(now, kNothing / 2);
        float part[2] = {sum[half][h] * ptx::exp2(largest[half][h] - base), 0};
#pragma unroll
        for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            part[c] += ptx::exp2(fmaf(d[half][g * 4 + h * 2 + c], k, -base));
          }
        }
        largest[half][h] = now;
        sum[half][h] = part[0] + part[1];
      }
    }
  }

  // Over the four threads of a row; the first writes.
  __device__ void write(const Lane& at, Partial* out) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = largest[half][h];
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float base = top == -INFINITY ? 0 : top;
        const float all = over_row(sum[half][h] * ptx::exp2(largest[half][h] - base));
        if ((at.lane & 3) == 0) out[at.row(half, h)] = {top, all};
      }
    }
  }
};

// The output in shared memory: three boxes of 64 columns, as the copy engine reads them.
__device__ inline uint32_t place_of(uint32_t out, int row, int column) {
  const int chunk = (column / 8 & 7) ^ (row & 7);
  return out + column / kBoxColumns * kBoxBytes + row * tma::kRowBytes + chunk * 16 +
         column % 8 * 2;
}

// z / k of two neighbours in a row -> their gradients, rounded to bf16. Adds up what the rounding
// changed.
__device__ inline uint32_t gradient_pair(float z0, float z1, float factor, float lse, float k2,
                                         float slope_of, float& rounding) {
  float v0 = factor * ptx::exp2(fmaf(z0, k2, -lse)), v1 = factor * ptx::exp2(fmaf(z1, k2, -lse));
  v0 *= fmaf(-(z0 * slope_of), z0 * slope_of, 1);
  v1 *= fmaf(-(z1 * slope_of), z1 * slope_of, 1);
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v0, v1);
  const auto bits = reinterpret_cast<const uint32_t&>(pair);
  rounding += (__uint_as_float(bits << 16) - v0) + (__uint_as_float(bits & 0xFFFF0000u) - v1);
  return bits;
}

// z / k -> its gradient, into `out`.
__device__ void stage_gradient(const Arguments& a, const Lane& at, int first_row, float k,
                               const Accumulators& d, uint32_t out, Rows& rounding) {
  const float slope_of = a.logits.softcap > 0 ? k / a.logits.softcap : 0, k2 = k * kLog2e;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float factor[2], lse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + at.row(half, h);
      factor[h] = row < static_cast<int>(a.logits.rows) ? __ldg(a.gradient.factor + row) : 0;
      // Rows that do not count have any lse.
      lse[h] = factor[h] != 0 ? __ldg(a.gradient.lse + row) * kLog2e : INFINITY;
    }
    const int row = half * 64 + at.warp * 16 + (at.lane & 15);
#pragma unroll
    for (int g = 0; g < kTileColumns / 8; g += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* z = d[half] + g * 4 + i * 2;
        pairs[i] = gradient_pair(z[0], z[1], factor[i & 1], lse[i & 1], k2, slope_of,
                                 rounding[half][i & 1]);
      }
      ptx::store_matrices(place_of(out, row, (g + (at.lane >> 4)) * 8), pairs[0], pairs[1],
                          pairs[2], pairs[3]);
    }
  }
}

// Of the rows of this warp, once they are staged.
__device__ void put_targets(const Arguments& a, const Lane& at, int first_row, int first,
                            uint32_t out, Rows& rounding) {
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + at.row(half, h);
      if ((at.lane & 3) != 0 || row >= static_cast<int>(a.logits.rows)) continue;
      const int target = __ldg(a.logits.target + row) - first;
      if (target < 0 || target >= kTileColumns) continue;
      const float value = __ldg(a.gradient.at_target + row);
      const auto rounded = __float2bfloat16_rn(value);
      ptx::store(place_of(out, at.row(half, h), target), __bfloat16_as_ushort(rounded));
      rounding[half][h] += __bfloat162float(rounded) - value;
    }
  }
}

// Of the named barriers: the turn of a warpgroup to multiply, and to use the output's memory.
constexpr int kMultiplyTurn = 1, kOutTurn = 3, kStaged = 5;

// One tile's products: D = X C^T, over stages in ring order from `position` on.
template <Pass pass>
__device__ void multiply_tile(Accumulators& d, Memory<pass> memory, int position, int depth_steps,
                              uint32_t block) {
  const int thread = threadIdx.x % kGroup;
  int stage = position % memory.kStages, previous = 0;
  auto phase = static_cast<uint32_t>(position / memory.kStages) & 1;
  // To the blocks that fetch into this stage.
  const auto release = [&] {
    if (thread == 0) ptx::arrive(memory.empty(previous));
    if (thread == 32) ptx::arrive_at(memory.empty(previous), block ^ 1);
  };
  for (int step = 0; step < depth_steps; ++step) {
    ptx::wait(memory.full(stage), phase);
    const auto x = wgmma::descriptor(memory.hidden(stage));
    const auto c = wgmma::descriptor(memory.weight(stage));
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      wgmma::multiply(d[0], x + 2 * k, c + 2 * k, step | k);
      wgmma::multiply(d[1], x + 2 * k + 512, c + 2 * k, step | k);
    }
    wgmma::commit();
    if (step > 0) {
      wgmma::wait<1>();
      release();
    }
    previous = stage;
    if (++stage == memory.kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  const int other = 2 - threadIdx.x / kGroup;
  ptx::named_arrive(kMultiplyTurn + other, 2 * kGroup);
  wgmma::wait<0>();
  release();
}

// A staged tile to global memory; then it is the other warpgroup's turn to stage one.
__device__ void store_out(const Arguments& a, uint32_t out, int first_row, int first, int turn) {
  ptx::fence_shared_for_async();
  ptx::named_wait(kStaged + turn, kGroup);
  if (threadIdx.x % kGroup == 0) {
    for (int box = 0; box < kTileColumns / kBoxColumns; ++box) {
      const int column = first + box * kBoxColumns;
      if (column < a.logits.vocab) tma::store(&a.out, out + box * kBoxBytes, column, first_row);
    }
    tma::commit_stores();
    tma::wait_stores_read();
  }
  __syncwarp();
  ptx::named_arrive(kOutTurn + 1 - turn, 2 * kGroup);
}

template <Pass pass>
__device__ void multiply(const Arguments& a, Memory<pass> memory, int depth_steps, int cluster,
                         uint32_t block) {
  const int thread = threadIdx.x % kGroup, turn = threadIdx.x / kGroup - 1;
  const Lane at{thread / 32, thread % 32};
  const Logits& p = a.logits;
  Accumulators d;
  RunningSum running;
  Rows rounding = {};
  running.clear();
  if (turn == 1) {
    ptx::named_arrive(kMultiplyTurn, 2 * kGroup);
    ptx::named_arrive(kOutTurn, 2 * kGroup);
  }
  for (Walk walk(p.schedule, cluster); !walk.over();) {
    const int first_row = walk.pair() * kPairRows + static_cast<int>(block) * kTileRows;
    const int first = walk.tile * kTileColumns;
    if (walk.count % kLanes == turn) {
      ptx::named_wait(kMultiplyTurn + turn, 2 * kGroup);
      multiply_tile(d, memory, walk.count * depth_steps, depth_steps, block);
      const float k = finish_logits(p, at, first, d);
      if constexpr (pass == Pass::kSum) {
        take_targets(p, at, first_row, first, d,
                     [&](int row, float z) { a.target_logit[row] = z * k; });
        running.add(d, k * kLog2e);
      } else {
        take_targets(p, at, first_row, first, d, [](int, float) {});
        ptx::named_wait(kOutTurn + turn, 2 * kGroup);
        stage_gradient(a, at, first_row, k, d, memory.out(), rounding);
        put_targets(a, at, first_row, first, memory.out(), rounding);
        store_out(a, memory.out(), first_row, first, turn);
      }
    }
    const int slot = walk.slot(turn) + static_cast<int>(block) * kTileRows;
    if (walk.next()) continue;
    // The tokens change.
    if constexpr (pass == Pass::kSum) {
      running.write(at, a.partials + slot);
      running.clear();
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float sum = over_row(rounding[half][h]);
          if ((at.lane & 3) == 0) a.rounding[slot + at.row(half, h)] = sum;
          rounding[half][h] = 0;
        }
      }
    }
  }
  if (thread == 0) tma::wait_stores();
}

template <Pass pass>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    pass_over_logits(const __grid_constant__ Arguments a) {
  extern __shared__ char raw[];
  const Memory<pass> memory{(ptx::shared_address(raw) + 1023) / 1024 * 1024};
  const uint32_t block = ptx::block_in_cluster();
  const int cluster = blockIdx.x / 2;
  const int depth_steps = static_cast<int>((a.logits.dim + kDepth - 1) / kDepth);
  if (threadIdx.x == 0) {
    for (int i = 0; i < memory.kStages; ++i) {
      ptx::init(memory.full(i), 1);
      ptx::init(memory.empty(i), 2);
    }
    ptx::fence_init();
  }
  ptx::cluster_sync();
  // Together what the block was launched with: 3 x 168.
  if (threadIdx.x < kGroup) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) fetch(a, memory, depth_steps, cluster, block);
  } else {
    ptx::take_registers<232>();
    multiply(a, memory, depth_steps, cluster, block);
  }
  // A block's memory and barriers are used by the other one until both are through.
  ptx::cluster_sync();
}

// A row's partial values: `count` of them, `stride` apart.
template <class T>
struct Parts {
  const T* first;
  int count;
  int64_t stride;

  __device__ Parts(const Schedule& schedule, int64_t row, const T* partials) : first(partials) {
    auto pair = static_cast<int>(row / kPairRows);
    int i = 0;
    for (; pair >= schedule.forms[i].count * schedule.forms[i].pairs; ++i) {
      const Sweeps& form = schedule.forms[i];
      pair -= form.count * form.pairs;
      first += int64_t{form.count} * form.partials();
    }
    const Sweeps& form = schedule.forms[i];
    stride = int64_t{form.pairs} * kPairRows;
    count = form.columns * kLanes;
    first += pair / form.pairs * count * stride + pair % form.pairs * kPairRows + row % kPairRows;
  }
};

__global__ void merge(const __grid_constant__ Schedule schedule, int64_t rows,
                      const Partial* partials, Partial* sums) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const Parts<Partial> parts(schedule, row, partials);
  Partial all = sums[row];
  float top = all.largest;
  for (int i = 0; i < parts.count; ++i) top = fmaxf(top, parts.first[i * parts.stride].largest);
  const float base = top == -INFINITY ? 0 : top;
  float sum = all.sum * exp2f(all.largest - base);
  for (int i = 0; i < parts.count; ++i) {
    const Partial part = parts.first[i * parts.stride];
    sum += part.sum * exp2f(part.largest - base);
  }
  sums[row] = {top, sum};
}

// As the reference: log1p keeps a loss near 0, the difference of logarithms cannot overflow.
__global__ void finish(int64_t rows, const Partial* sums, const float* target_logit, float* lse,
                       float* nll) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const Partial rest = sums[row];
  const float y = target_logit[row], y2 = y * kLog2e, top = fmaxf(rest.largest, y2);
  const float others = rest.sum == 0 ? 0 : rest.sum * exp2f(rest.largest - top);
  const float hit = exp2f(y2 - top), below = (y2 - top) / kLog2e, total = logf(hit + others);
  lse[row] = top / kLog2e + total;
  nll[row] = below > -10 ? log1pf(others / hit) : total - below;
}

__global__ void add_up(const __grid_constant__ Schedule schedule, int64_t rows,
                       const float* partials, float* sums) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const Parts<float> parts(schedule, row, partials);
  float sum = sums[row];
  for (int i = 0; i < parts.count; ++i) sum += parts.first[i * parts.stride];
  sums[row] = sum;
}

// `stride` elements from row to row.
cudaError_t map_of(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                   int64_t stride, int box_rows) {
  return tma::make_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, rows, columns, stride * 2,
                       box_rows);
}

unsigned blocks_of(int64_t rows) { return static_cast<unsigned>((rows + kGroup - 1) / kGroup); }

template <Pass pass>
cudaError_t launch(Arguments& a, cudaStream_t stream) {
  constexpr int bytes = Memory<pass>::kBytes;
  const Logits& p = a.logits;
  auto error = map_of(&a.hidden, p.hidden, p.rows, p.dim, p.hidden_stride, kTileRows);
  if (error != cudaSuccess) return error;
  error = map_of(&a.weight, p.weight, p.vocab, p.dim, p.weight_stride, kHalfColumns);
  if (error != cudaSuccess) return error;
  static const auto allowed = cudaFuncSetAttribute(
      pass_over_logits<pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return allowed;
  pass_over_logits<pass><<<2 * a.logits.schedule.clusters, kThreads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t add_exponentials(const Logits& logits, Partial* partials, Partial* sums,
                             float* target_logit, cudaStream_t stream) {
  Arguments a;
  a.logits = logits;
  a.partials = partials;
  a.target_logit = target_logit;
  const auto error = launch<Pass::kSum>(a, stream);
  if (error != cudaSuccess) return error;
  merge<<<blocks_of(logits.rows), kGroup, 0, stream>>>(logits.schedule, logits.rows, partials,
                                                       sums);
  return cudaGetLastError();
}

cudaError_t logit_gradient(const Logits& logits, const LogitGradient& gradient, float* partials,
                           float* rounding, cudaStream_t stream) {
  Arguments a;
  auto error =
      map_of(&a.out, gradient.out, logits.rows, logits.vocab, gradient.out_stride, kTileRows);
  if (error != cudaSuccess) return error;
  a.logits = logits;
  a.gradient = gradient;
  a.rounding = partials;
  error = launch<Pass::kGradient>(a, stream);
  if (error != cudaSuccess) return error;
  add_up<<<blocks_of(logits.rows), kGroup, 0, stream>>>(logits.schedule, logits.rows, partials,
                                                        rounding);
  return cudaGetLastError();
}

cudaError_t finish_rows(int64_t rows, const Partial* sums, const float* target_logit, float* lse,
                        float* nll, cudaStream_t stream) {
  finish<<<blocks_of(rows), kGroup, 0, stream>>>(rows, sums, target_logit, lse, nll);
  return cudaGetLastError();
}

int clusters_of_device() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major != 9) return 0;
  using S = Memory<Pass::kSum>;
  cudaFuncSetAttribute(pass_over_logits<Pass::kSum>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       S::kBytes);
  cudaLaunchConfig_t config{};
  config.gridDim = 2;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = S::kBytes;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, pass_over_logits<Pass::kSum>, &config) !=
      cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

}  // namespace ounce::cce
