// SPDX-License-Identifier: MIT
// The passes over the logits on Hopper: a persistent GEMM whose epilogue is the pass. One warp
// fetches tiles with the copy engine, the classifier's to both blocks of a cluster at once; two
// warpgroups multiply in turn, so that one's epilogue runs under the other's products.
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_kernels.h>
#include <ounce/kernels/cce/cce_rows.h>
#include <ounce/kernels/common/tma.h>
#include <ounce/kernels/common/wgmma.h>

#include <cuda_bf16.h>

namespace ounce::cce {
namespace {

constexpr int kGroup = 128;  // threads
constexpr int kThreads = 3 * kGroup;
constexpr int kHiddenBytes = kTileRows * kDepth * 2, kWeightBytes = kTileColumns * kDepth * 2;
constexpr int kHalfColumns = kTileColumns / 2;  // fetched by each block for both
constexpr int kOutBytes = kTileRows * kTileColumns * 2;
constexpr int kBoxColumns = 64, kBoxBytes = kTileRows * kBoxColumns * 2;  // of the output

enum class Pass { kSum, kGradient, kExponential };

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
  Exponentials exponentials;
  // What a pass leaves of its rows, in slots.
  Partial* partials;      // of Pass::kSum
  float* rounding;        // of Pass::kGradient
  AnchoredSum* anchored;  // of Pass::kExponential
  float* target_logit;    // but of Pass::kGradient
};

// The tiles of a cluster, in order.
struct Walk {
  const Schedule& schedule;
  const int* only;                   // [pairs] or null: 0 passes one over
  int cluster, form = 0, sweep = 0;  // of the form
  int first_pair = 0;                // of the sweep
  int partials = 0;                  // of the sweeps before
  int tile = 0;                      // along the vocabulary
  int count = 0;                     // tiles before this one

  __device__ Walk(const Arguments& a, int cluster_)
      : schedule(a.logits.schedule), only(a.exponentials.only), cluster(cluster_) {
    enter();
  }
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
  // Passes over sweeps that have nothing for this cluster.
  __device__ void enter() {
    while (!over() && (column() >= now().columns || (only != nullptr && only[pair()] == 0))) {
      leave();
    }
    if (!over()) tile = column();
  }
};

template <Pass pass>
__device__ void fetch(const Arguments& a, Memory<pass> memory, int depth_steps, int cluster,
                      uint32_t block) {
  int stage = 0;
  uint32_t phase = 0;
  for (Walk walk(a, cluster); !walk.over(); walk.next()) {
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

// Of a row of a tile: the largest logit is looked for, in case the row's sum becomes too large.
constexpr float kLargeSum = 1e15f;
// A logit whose exponential is 0, and whose square is finite.
constexpr float kNothing = -1e15f;

__device__ bool is_plain(const Logits& p) {
  return p.bias == nullptr && p.softcap == 0 && p.scale > 0;
}
// k of finish_logits.
__device__ float factor_of_logits(const Logits& p) { return is_plain(p) ? p.scale : 1; }

// x C^T -> z / k, k > 0; columns outside become kNothing.
__device__ void finish_logits(const Logits& p, const Lane& at, int first, Accumulators& d) {
  if (!is_plain(p)) {
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
}

// Takes the targets out of the tile: kNothing stays. Calls f(row, z) in the thread
// that has one. Selections instead of branches keep the tile in registers.
template <class F>
__device__ void take_targets(const Logits& p, const Lane& at, int first_row, int first,
                             Accumulators& d, const F& f) {
  if (p.target == nullptr) return;
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
__device__ float top_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
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
        const float top = top_of_row(largest[half][h]);
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

// What is kept of a thread's rows while their tokens stay the same.
struct Kept {
  Rows sum, rounding;  // of Pass::kExponential; of both
  Rows largest;        // z / k, where exponentials overflow

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i / 2][i % 2] = rounding[i / 2][i % 2] = 0;
      largest[i / 2][i % 2] = -INFINITY;
    }
  }
};

// Of a row of a tile: the exponentials, what is made of them, and that rounded to bf16.
struct RowSum {
  float plain = 0, exact = 0, rounded = 0;
};

// z / k of two neighbours in a row -> their entries of the output.
template <bool capped>
__device__ inline uint32_t entry_pair(float z0, float z1, float factor, float base, float k2,
                                      float slope_of, RowSum& sum) {
  float v0 = ptx::exp2(fmaf(z0, k2, -base)), v1 = ptx::exp2(fmaf(z1, k2, -base));
  if constexpr (capped) {
    sum.plain += v0 + v1;
    v0 *= fmaf(-(z0 * slope_of), z0 * slope_of, 1);
    v1 *= fmaf(-(z1 * slope_of), z1 * slope_of, 1);
  }
  v0 *= factor;
  v1 *= factor;
  sum.exact += v0 + v1;
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v0, v1);
  const auto bits = reinterpret_cast<const uint32_t&>(pair);
  sum.rounded += __uint_as_float(bits << 16) + __uint_as_float(bits & 0xFFFF0000u);
  return bits;
}

// z / k -> its entry of the output, into `out`.
template <Pass pass, bool capped>
__device__ void stage_entries(const Arguments& a, const Lane& at, int first_row, float k,
                              const Accumulators& d, uint32_t out, Kept& kept) {
  const float slope_of = capped ? k / a.logits.softcap : 0, k2 = k * kLog2e;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float factor[2], base[2];
    RowSum sum[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + at.row(half, h);
      const bool inside = row < static_cast<int>(a.logits.rows);
      if constexpr (pass == Pass::kExponential) {
        factor[h] = 1;
        base[h] = inside ? __ldg(a.exponentials.anchor + row) : INFINITY;
      } else {
        factor[h] = inside ? __ldg(a.gradient.factor + row) : 0;
        // Rows that do not count have any lse.
        base[h] = factor[h] != 0 ? __ldg(a.gradient.lse + row) * kLog2e : INFINITY;
      }
    }
    const int row = half * 64 + at.warp * 16 + (at.lane & 15);
#pragma unroll
    for (int g = 0; g < kTileColumns / 8; g += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* z = d[half] + g * 4 + i * 2;
        pairs[i] =
            entry_pair<capped>(z[0], z[1], factor[i & 1], base[i & 1], k2, slope_of, sum[i & 1]);
      }
      ptx::store_matrices(place_of(out, row, (g + (at.lane >> 4)) * 8), pairs[0], pairs[1],
                          pairs[2], pairs[3]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      kept.rounding[half][h] += sum[h].rounded - sum[h].exact;
      if constexpr (pass == Pass::kExponential) {
        const float all = capped ? sum[h].plain : sum[h].exact;
        kept.sum[half][h] += all;
        if (all < kLargeSum) continue;
#pragma unroll
        for (int g = 0; g < kTileColumns / 8; ++g) {
          const float* z = d[half] + g * 4 + h * 2;
          kept.largest[half][h] = fmaxf(kept.largest[half][h], fmaxf(z[0], z[1]));
        }
      }
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

// What a pass leaves of its rows; the first of the four threads of a row writes.
template <Pass pass>
__device__ void write_kept(const Arguments& a, const Lane& at, int slot, float k2,
                           const Kept& kept) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int place = slot + at.row(half, h);
      const float rounding = over_row(kept.rounding[half][h]);
      if constexpr (pass == Pass::kGradient) {
        if ((at.lane & 3) == 0) a.rounding[place] = rounding;
      } else {
        const float sum = over_row(kept.sum[half][h]), top = top_of_row(kept.largest[half][h]);
        if ((at.lane & 3) == 0) a.anchored[place] = {top * k2, sum, rounding};
      }
    }
  }
}

template <Pass pass, bool capped>
__device__ void multiply(const Arguments& a, Memory<pass> memory, int depth_steps, int cluster,
                         uint32_t block) {
  const int thread = threadIdx.x % kGroup, turn = threadIdx.x / kGroup - 1;
  const Lane at{thread / 32, thread % 32};
  const Logits& p = a.logits;
  Accumulators d;
  RunningSum running;
  Kept kept;
  running.clear();
  kept.clear();
  if (turn == 1) {
    ptx::named_arrive(kMultiplyTurn, 2 * kGroup);
    ptx::named_arrive(kOutTurn, 2 * kGroup);
  }
  for (Walk walk(a, cluster); !walk.over();) {
    const int first_row = walk.pair() * kPairRows + static_cast<int>(block) * kTileRows;
    const int first = walk.tile * kTileColumns;
    if (walk.count % kLanes == turn) {
      ptx::named_wait(kMultiplyTurn + turn, 2 * kGroup);
      multiply_tile(d, memory, walk.count * depth_steps, depth_steps, block);
      const float k = factor_of_logits(p);
      finish_logits(p, at, first, d);
      take_targets(p, at, first_row, first, d, [&](int row, float z) {
        if constexpr (pass != Pass::kGradient) a.target_logit[row] = z * k;
      });
      if constexpr (pass == Pass::kSum) {
        running.add(d, k * kLog2e);
      } else {
        ptx::named_wait(kOutTurn + turn, 2 * kGroup);
        stage_entries<pass, capped>(a, at, first_row, k, d, memory.out(), kept);
        if constexpr (pass == Pass::kGradient) {
          put_targets(a, at, first_row, first, memory.out(), kept.rounding);
        }
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
      write_kept<pass>(a, at, slot, factor_of_logits(p) * kLog2e, kept);
      kept.clear();
    }
  }
  if (thread == 0) tma::wait_stores();
}

template <Pass pass, bool capped>
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
    multiply<pass, capped>(a, memory, depth_steps, cluster, block);
  }
  // A block's memory and barriers are used by the other one until both are through.
  ptx::cluster_sync();
}

// `stride` elements from row to row.
cudaError_t map_of(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                   int64_t stride, int box_rows) {
  return tma::make_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, rows, columns, stride * 2,
                       box_rows);
}

template <Pass pass, bool capped>
cudaError_t launch(const Arguments& a, cudaStream_t stream) {
  constexpr int bytes = Memory<pass>::kBytes;
  // An attribute is of the current device.
  const auto allowed = cudaFuncSetAttribute(pass_over_logits<pass, capped>,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return allowed;
  pass_over_logits<pass, capped><<<2 * a.logits.schedule.clusters, kThreads, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <Pass pass>
cudaError_t launch(Arguments& a, cudaStream_t stream) {
  const Logits& p = a.logits;
  auto error = map_of(&a.hidden, p.hidden, p.rows, p.dim, p.hidden_stride, kTileRows);
  if (error != cudaSuccess) return error;
  error = map_of(&a.weight, p.weight, p.vocab, p.dim, p.weight_stride, kHalfColumns);
  if (error != cudaSuccess) return error;
  if constexpr (pass != Pass::kSum) {
    if (p.softcap > 0) return launch<pass, true>(a, stream);
  }
  return launch<pass, false>(a, stream);
}

}  // namespace

cudaError_t add_exponentials(const Logits& logits, Partial* partials, Partial* sums,
                             float* target_logit, cudaStream_t stream) {
  Arguments a;
  a.logits = logits;
  a.partials = partials;
  a.target_logit = target_logit;
  const auto error = launch<Pass::kSum>(a, stream);
  return error != cudaSuccess ? error : add_slots(logits, partials, sums, nullptr, stream);
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
  return error != cudaSuccess ? error : add_slots(logits, partials, rounding, nullptr, stream);
}

cudaError_t exponentials(const Logits& logits, const Exponentials& exponentials,
                         AnchoredSum* partials, AnchoredSum* sums, float* target_logit,
                         cudaStream_t stream) {
  Arguments a;
  auto error = map_of(&a.out, exponentials.out, logits.rows, logits.vocab, exponentials.out_stride,
                      kTileRows);
  if (error != cudaSuccess) return error;
  a.logits = logits;
  a.exponentials = exponentials;
  a.anchored = partials;
  a.target_logit = target_logit;
  error = launch<Pass::kExponential>(a, stream);
  return error != cudaSuccess ? error
                              : add_slots(logits, partials, sums, exponentials.only, stream);
}

int clusters_of_device() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major != 9) return 0;
  using S = Memory<Pass::kSum>;
  cudaFuncSetAttribute(pass_over_logits<Pass::kSum, false>,
                       cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  cudaLaunchConfig_t config{};
  config.gridDim = 2;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = S::kBytes;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, pass_over_logits<Pass::kSum, false>, &config) !=
      cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

}  // namespace ounce::cce
