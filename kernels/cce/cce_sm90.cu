// SPDX-License-Identifier: MIT
// The passes over the logits on Hopper: a persistent GEMM (cce_tiles.h) whose epilogue is the pass.
// A cluster's blocks have tiles one below the other; the classifier's are fetched for both at once.
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_logits.h>
#include <ounce/kernels/common/tma.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace ounce::cce {
namespace {

constexpr int kHalfColumns = kTileColumns / 2;  // fetched by each block for both
constexpr int kOutBytes = kTileRows * kTileColumns * 2;
constexpr int kBoxes = kTileColumns / kBoxColumns, kBoxBytes = kTileRows * kBoxColumns * 2;

enum class Pass { kSum, kGradient, kExponential };

// What a kernel is made for.
template <Pass pass_, bool general_ = false, bool half_ = false, bool capped_ = false,
          bool measured_ = false>
struct FormOf {
  static constexpr Pass pass = pass_;
  static constexpr bool general = general_;    // kSum: moments; kGradient: all of RowFactors
  static constexpr bool half = half_;          // fp16; general
  static constexpr bool capped = capped_;      // entries under a softcap
  static constexpr bool measured = measured_;  // kExponential: with the boxes' masses
};

template <Pass pass>
using Memory = Ring<pass == Pass::kSum ? 5 : 4, pass == Pass::kSum ? 0 : kOutBytes>;

struct Arguments {
  CUtensorMap hidden, weight, out;
  Logits logits;
  const float* class_weight;
  LogitGradient gradient;
  Exponentials exponentials;
  // What a pass leaves of its rows, in slots.
  Partial* partials;      // of Pass::kSum
  Moments* moments;       // of Pass::kSum in general
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
  typename Memory<pass>::Place place(0);
  for (Walk walk(a, cluster); !walk.over(); walk.next()) {
    const int row = walk.pair() * kPairRows + static_cast<int>(block) * kTileRows;
    const int column = walk.tile * kTileColumns + static_cast<int>(block) * kHalfColumns;
    for (int step = 0; step < depth_steps; ++step, place.next()) {
      memory.claim(place);
      const uint32_t full = memory.full(place.stage);
      tma::load(memory.left(place.stage), &a.hidden, step * kDepth, row, full);
      tma::load_multicast(memory.right(place.stage) + block * (Memory<pass>::kRightBytes / 2),
                          &a.weight, step * kDepth, column, full, 0b11);
    }
  }
}

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

// Of a row of a tile: the exponentials, what is made of them, and that rounded to bf16. Where boxes
// are measured, of the box that is under way: the exponentials and the largest.
struct RowSum {
  float plain = 0, exact = 0, rounded = 0;
  float largest = 0, before = 0;  // of the boxes before
};

// What becomes of a row's exponentials 2^(z k2 - base).
struct RowOf {
  float base = INFINITY, factor = 0, log_factor = 0, flat = 0;
};
template <class Form>
__device__ inline RowOf row_of(const Arguments& a, int row) {
  if (row >= static_cast<int>(a.logits.rows)) return {-kNothing};
  if constexpr (Form::pass == Pass::kExponential) {
    return {__ldg(a.exponentials.anchor + row), 1};
  } else {
    const auto f = __ldg(reinterpret_cast<const float4*>(a.gradient.rows) + row);
    return {f.x, f.y, f.z, f.w};
  }
}

// Two neighbours as the output has them, and what they are then.
template <bool half>
__device__ inline uint32_t rounded_pair(float v0, float v1, float& sum) {
  if constexpr (half) {
    const __half2 pair = __floats2half2_rn(v0, v1);
    const float2 back = __half22float2(pair);
    sum += back.x + back.y;
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v0, v1);
    const auto bits = reinterpret_cast<const uint32_t&>(pair);
    sum += __uint_as_float(bits << 16) + __uint_as_float(bits & 0xFFFF0000u);
    return bits;
  }
}

// z / k of two neighbours in a row -> their entries of the output. w: their class weights.
template <class Form>
__device__ inline uint32_t entry_pair(float z0, float z1, const RowOf& row, float k2,
                                      float slope_of, const float2& w, RowSum& sum) {
  const float l0 = fmaf(z0, k2, -row.base), l1 = fmaf(z1, k2, -row.base);
  float v0 = ptx::exp2(l0), v1 = ptx::exp2(l1);
  if constexpr (Form::measured) sum.largest = fmaxf(sum.largest, fmaxf(v0, v1));
  if constexpr (Form::measured || Form::capped) sum.plain += v0 + v1;
  if constexpr (Form::general) {
    v0 = fmaf(-row.flat, w.x, v0 * fmaf(row.log_factor, l0, row.factor));
    v1 = fmaf(-row.flat, w.y, v1 * fmaf(row.log_factor, l1, row.factor));
  }
  if constexpr (Form::capped) {
    // 0 at the target, which is kNothing here.
    v0 *= fmaxf(0, fmaf(-(z0 * slope_of), z0 * slope_of, 1));
    v1 *= fmaxf(0, fmaf(-(z1 * slope_of), z1 * slope_of, 1));
  }
  if constexpr (!Form::general) {
    v0 *= row.factor;
    v1 *= row.factor;
  }
  sum.exact += v0 + v1;
  return rounded_pair<Form::half>(v0, v1, sum.rounded);
}

// A box of a row is complete.
__device__ inline void measure_box(const Arguments& a, int row, int box, const Lane& at,
                                   RowSum& sum) {
  const float mass = over_row(sum.plain), top = top_of_row(sum.largest);
  sum.before += sum.plain;
  sum.plain = sum.largest = 0;
  if ((at.lane & 3) != 0 || row >= static_cast<int>(a.logits.rows)) return;
  a.exponentials.boxes[box * a.logits.rows + row] = {
      __bfloat16_as_ushort(__float2bfloat16_rn(top)),
      __bfloat16_as_ushort(__float2bfloat16_rn(mass))};
}

// A tile's class weights from a thread's first column on, or null.
__device__ inline const float* tile_weights(const Arguments& a, const Lane& at, int first) {
  return a.class_weight == nullptr ? nullptr : a.class_weight + first + at.column(0, 0);
}

// z / k -> its entry of the output, into `out`. With Form::measured the boxes' masses go to memory.
template <class Form>
__device__ void stage_entries(const Arguments& a, const Lane& at, int first_row, int tile, float k,
                              const Accumulators& d, uint32_t out, Kept& kept) {
  const float slope_of = Form::capped ? k / a.logits.softcap : 0;
  const float k2 = k * kLog2e;
  const float* weights = tile_weights(a, at, tile * kTileColumns);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowOf of_row[2] = {row_of<Form>(a, first_row + at.row(half, 0)),
                             row_of<Form>(a, first_row + at.row(half, 1))};
    RowSum sum[2];
    const int row = half * 64 + at.warp * 16 + (at.lane & 15);
#pragma unroll
    for (int g = 0; g < kTileColumns / 8; g += 2) {
      float2 weight[2] = {};
      if constexpr (Form::general) {
        weight[0] = weights_of(weights, g);
        weight[1] = weights_of(weights, g + 1);
      }
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* z = d[half] + g * 4 + i * 2;
        pairs[i] =
            entry_pair<Form>(z[0], z[1], of_row[i & 1], k2, slope_of, weight[i / 2], sum[i & 1]);
      }
      ptx::store_matrices(place_of(out, row, (g + (at.lane >> 4)) * 8), pairs[0], pairs[1],
                          pairs[2], pairs[3]);
      if constexpr (Form::measured) {
        if ((g + 2) % (kBoxColumns / 8) == 0) {
          const int box = tile * kBoxes + g / (kBoxColumns / 8);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            measure_box(a, first_row + at.row(half, h), box, at, sum[h]);
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      kept.rounding[half][h] += sum[h].rounded - sum[h].exact;
      if constexpr (Form::pass == Pass::kExponential) {
        const float all = Form::measured ? sum[h].before
                          : Form::capped ? sum[h].plain
                                         : sum[h].exact;
        kept.sum[half][h] += all;
        if (all < kLargeSum) continue;
        kept.largest[half][h] = fmaxf(kept.largest[half][h], top_of(d, half, h));
      }
    }
  }
}

// Of the rows of this warp, once they are staged.
template <bool half_output>
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
      float rounded = 0;
      const auto bits = rounded_pair<half_output>(value, 0, rounded);
      ptx::store(place_of(out, at.row(half, h), target), static_cast<uint16_t>(bits));
      rounding[half][h] += rounded - value;
    }
  }
}

// Of the named barriers: the turn of a warpgroup to use the output's memory; its tile is staged.
constexpr int kOutTurn = kMultiplyTurn + kLanes, kStaged = kOutTurn + kLanes;

// A staged tile to global memory; then it is the other warpgroup's turn to stage one.
__device__ void store_out(const Arguments& a, uint32_t out, int first_row, int first, int turn) {
  ptx::fence_shared_for_async();
  ptx::named_wait(kStaged + turn, kGroup);
  if (threadIdx.x % kGroup == 0) {
    for (int box = 0; box < kBoxes; ++box) {
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

template <class Running>
__device__ void write_running(const Running& running, const Lane& at,
                              typename Running::Result* out) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto result = running.result(half, h);
      if ((at.lane & 3) == 0) out[at.row(half, h)] = result;
    }
  }
}

template <class Form>
__device__ void multiply(const Arguments& a, Memory<Form::pass> memory, int depth_steps,
                         int cluster, uint32_t block) {
  const int thread = threadIdx.x % kGroup, turn = threadIdx.x / kGroup - 1;
  const Lane at{thread / 32, thread % 32};
  const Logits& p = a.logits;
  Accumulators d;
  constexpr bool moments = Form::pass == Pass::kSum && Form::general;
  std::conditional_t<moments, RunningMoments, RunningSum> running;
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
      multiply_tile(
          d, memory, walk.count * depth_steps, depth_steps, block, [&](int stage, int add) {
            const auto x = wgmma::descriptor(memory.left(stage));
            const auto c = wgmma::descriptor(memory.right(stage));
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
              wgmma::multiply<false, false, Form::half>(d[0], x + 2 * k, c + 2 * k, add | k);
              wgmma::multiply<false, false, Form::half>(d[1], x + 2 * k + 512, c + 2 * k, add | k);
            }
          });
      const float k = factor_of_logits(p);
      finish_logits(p, at, first, d);
      if constexpr (moments) {
        if (a.class_weight != nullptr) running.add_linear(tile_weights(a, at, first), d, k);
      }
      take_targets(p, at, first_row, first, d, [&](int row, float z) {
        if constexpr (Form::pass != Pass::kGradient) a.target_logit[row] = z * k;
      });
      if constexpr (moments) {
        running.add(p, at, first_row, first, d, k);
      } else if constexpr (Form::pass == Pass::kSum) {
        running.add(d, k);
      } else {
        ptx::named_wait(kOutTurn + turn, 2 * kGroup);
        stage_entries<Form>(a, at, first_row, walk.tile, k, d, memory.out(), kept);
        if constexpr (Form::pass == Pass::kGradient) {
          put_targets<Form::half>(a, at, first_row, first, memory.out(), kept.rounding);
        }
        store_out(a, memory.out(), first_row, first, turn);
      }
    }
    const int slot = walk.slot(turn) + static_cast<int>(block) * kTileRows;
    if (walk.next()) continue;
    // The tokens change.
    if constexpr (Form::pass == Pass::kSum) {
      if constexpr (moments) {
        write_running(running, at, a.moments + slot);
      } else {
        write_running(running, at, a.partials + slot);
      }
      running.clear();
    } else {
      write_kept<Form::pass>(a, at, slot, factor_of_logits(p) * kLog2e, kept);
      kept.clear();
    }
  }
  if (thread == 0) tma::wait_stores();
}

template <class Form>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    pass_over_logits(const __grid_constant__ Arguments a) {
  extern __shared__ char raw[];
  const Memory<Form::pass> memory(raw);
  const uint32_t block = ptx::block_in_cluster();
  const int cluster = blockIdx.x / 2;
  const int depth_steps = static_cast<int>((a.logits.dim + kDepth - 1) / kDepth);
  run_block(
      memory, [&] { fetch<Form::pass>(a, memory, depth_steps, cluster, block); },
      [&] { multiply<Form>(a, memory, depth_steps, cluster, block); });
}

// `stride` elements from row to row.
cudaError_t map_of(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                   int64_t stride, int box_rows) {
  return tma::make_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, rows, columns, stride * 2,
                       box_rows);
}

template <class Form>
cudaError_t launch(Arguments& a, cudaStream_t stream) {
  const Logits& p = a.logits;
  auto error = map_of(&a.hidden, p.hidden, p.rows, p.dim, p.hidden_stride, kTileRows);
  if (error != cudaSuccess) return error;
  error = map_of(&a.weight, p.weight, p.vocab, p.dim, p.weight_stride, kHalfColumns);
  if (error != cudaSuccess) return error;
  return launch_clusters<Memory<Form::pass>>(pass_over_logits<Form>, a, p.schedule.clusters,
                                             stream);
}

}  // namespace

cudaError_t add_exponentials(const Logits& logits, Partial* partials, Partial* sums,
                             float* target_logit, cudaStream_t stream) {
  Arguments a;
  a.logits = logits;
  a.partials = partials;
  a.target_logit = target_logit;
  const auto error = launch<FormOf<Pass::kSum>>(a, stream);
  return error != cudaSuccess ? error : add_slots(logits, partials, sums, nullptr, stream);
}

cudaError_t add_moments(const Logits& logits, const float* class_weight, Moments* partials,
                        Moments* sums, float* target_logit, cudaStream_t stream) {
  Arguments a;
  a.logits = logits;
  a.class_weight = class_weight;
  a.moments = partials;
  a.target_logit = target_logit;
  const auto error = logits.is_half ? launch<FormOf<Pass::kSum, true, true>>(a, stream)
                                    : launch<FormOf<Pass::kSum, true>>(a, stream);
  return error != cudaSuccess ? error : add_slots(logits, partials, sums, nullptr, stream);
}

cudaError_t logit_gradient(const Logits& logits, const LogitGradient& gradient, float* partials,
                           float* rounding, cudaStream_t stream) {
  Arguments a;
  auto error =
      map_of(&a.out, gradient.out, logits.rows, logits.vocab, gradient.out_stride, kTileRows);
  if (error != cudaSuccess) return error;
  a.logits = logits;
  a.class_weight = gradient.class_weight;
  a.gradient = gradient;
  a.rounding = partials;
  constexpr auto pass = Pass::kGradient;
  const bool capped = logits.softcap > 0;
  if (logits.is_half) {
    error = capped ? launch<FormOf<pass, true, true, true>>(a, stream)
                   : launch<FormOf<pass, true, true>>(a, stream);
  } else if (gradient.general) {
    error = capped ? launch<FormOf<pass, true, false, true>>(a, stream)
                   : launch<FormOf<pass, true>>(a, stream);
  } else {
    error = capped ? launch<FormOf<pass, false, false, true>>(a, stream)
                   : launch<FormOf<pass>>(a, stream);
  }
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
  constexpr auto pass = Pass::kExponential;
  const bool capped = logits.softcap > 0;
  if (exponentials.boxes != nullptr) {
    error = capped ? launch<FormOf<pass, false, false, true, true>>(a, stream)
                   : launch<FormOf<pass, false, false, false, true>>(a, stream);
  } else {
    error = capped ? launch<FormOf<pass, false, false, true>>(a, stream)
                   : launch<FormOf<pass>>(a, stream);
  }
  return error != cudaSuccess ? error
                              : add_slots(logits, partials, sums, exponentials.only, stream);
}

int clusters_of_device() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major != 9) return 0;
  using S = Memory<Pass::kSum>;
  cudaFuncSetAttribute(pass_over_logits<FormOf<Pass::kSum>>,
                       cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  cudaLaunchConfig_t config{};
  config.gridDim = 2;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = S::kBytes;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, pass_over_logits<FormOf<Pass::kSum>>, &config) !=
      cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

}  // namespace ounce::cce
