// SPDX-License-Identifier: MIT
// What a tile of products becomes, in the registers of the threads that made it: logits, without
// their targets, and what a row sums of them. For .cu files.
#pragma once

#include <ounce/kernels/cce/cce_kernels.h>
#include <ounce/kernels/cce/cce_rows.h>
#include <ounce/kernels/cce/cce_tiles.h>

namespace ounce::cce {

__device__ inline float tanh_of(float x) {
  const float e = ptx::exp2(fabsf(x) * (2 * kLog2e));
  return copysignf(1 - __fdividef(2.f, e + 1), x);
}

// Of a row of a tile: the largest logit is looked for, in case the row's sum becomes too large.
constexpr float kLargeSum = 1e15f;
// A logit whose exponential is 0, and whose square is finite.
constexpr float kNothing = -1e15f;

__device__ inline bool is_plain(const Logits& p) {
  return p.bias == nullptr && p.softcap == 0 && p.scale > 0;
}
// k of finish_logits.
__device__ inline float factor_of_logits(const Logits& p) { return is_plain(p) ? p.scale : 1; }

// x C^T -> z / k, k > 0; columns outside become kNothing.
__device__ inline void finish_logits(const Logits& p, const Lane& at, int first, Accumulators& d) {
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
            z = z < kNothing ? kNothing : z;  // a bias of -inf
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

// The class weights of columns 8 g and 8 g + 1 from a thread's first on, or 0 where that is null.
// In program order and without a branch: either would cost the accumulators their registers.
__device__ inline float2 weights_of(const float* first, int g) {
  float2 weight = {0, 0};
  asm volatile("{\n.reg .pred p;\nsetp.ne.u64 p, %2, 0;\n@p ld.global.nc.v2.f32 {%0, %1}, [%3];\n}"
               : "+f"(weight.x), "+f"(weight.y)
               : "l"(first), "l"(first + g * 8));
  return weight;
}

// Of the four threads that share a row.
__device__ inline float over_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float top_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The largest of a row of a tile.
__device__ inline float top_of(const Accumulators& d, int half, int h) {
  float top = d[half][h * 2];
#pragma unroll
  for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
    for (int c = 0; c < 2; ++c) top = fmaxf(top, d[half][g * 4 + h * 2 + c]);
  }
  return top;
}

// The sum of a row's exponentials without the target's, so that a loss near 0 keeps its precision.
struct RunningSum {
  using Result = Partial;
  Rows largest, sum;

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0;
    }
  }

  // The row's logits in `d`, times k, are powers of two.
  __device__ void add_row(const Accumulators& d, int half, int h, float k, float top) {
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
  __device__ void add(const Accumulators& d, float k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) add_row(d, half, h, k * kLog2e, top_of(d, half, h));
    }
  }

  // Over the four threads of a row.
  __device__ Partial result(int half, int h) const {
    const float top = top_of_row(largest[half][h]), base = top == -INFINITY ? 0 : top;
    return {top, over_row(sum[half][h] * ptx::exp2(largest[half][h] - base))};
  }
};

// With what Moments asks for beside that.
struct RunningMoments : RunningSum {
  using Result = Moments;
  Rows product, linear, top, before;

  __device__ void clear() {
    RunningSum::clear();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      product[i / 2][i % 2] = linear[i / 2][i % 2] = 0;
      top[i / 2][i % 2] = before[i / 2][i % 2] = -INFINITY;
    }
  }

  // Before its targets are taken out: w_j z_j of a tile, whose `weights` are of this thread's first
  // column. `d` times k are logits.
  __device__ void add_linear(const float* weights, const Accumulators& d, float k) {
    Rows part = {};
#pragma unroll
    for (int g = 0; g < kTileColumns / 8; ++g) {
      const float2 w = weights_of(weights, g);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* z = d[i / 2] + g * 4 + i % 2 * 2;
        part[i / 2][i % 2] += w.x * z[0] + w.y * z[1];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) linear[i / 2][i % 2] += part[i / 2][i % 2] * k;
  }
  // The rest, of the tile that begins at `first` of the vocabulary.
  __device__ void add(const Logits& p, const Lane& at, int first_row, int first,
                      const Accumulators& d, float k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float of_tile = top_of(d, half, h);
        add_exponentials(d, half, h, k * kLog2e, of_tile);
        top[half][h] = fmaxf(top[half][h], of_tile * k);
        const int row = first_row + at.row(half, h);
        const int target = row < static_cast<int>(p.rows) ? __ldg(p.target + row) - first : 0;
        add_before(at, target, of_tile, d, half, h, k);
      }
    }
  }

  __device__ Moments result(int half, int h) const {
    const float own = fmaxf(largest[half][h], kNothing / 2);
    const auto [all, total] = RunningSum::result(half, h);
    const float base = all == -INFINITY ? 0 : all;
    // Of a thread without entries, own - base is no distance.
    const float share = sum[half][h] == 0 ? 0 : ptx::exp2(own - base);
    const float moved = share == 0 ? 0 : product[half][h] + (own - base) * sum[half][h];
    return {all,
            total,
            over_row(share * moved),
            over_row(linear[half][h]),
            top_of_row(top[half][h]),
            top_of_row(before[half][h])};
  }

 private:
  __device__ void add_exponentials(const Accumulators& d, int half, int h, float k, float of_tile) {
    const float old = fmaxf(largest[half][h], kNothing / 2), now = fmaxf(old, of_tile * k);
    const float share = ptx::exp2(old - now);
    float sums[2] = {share * sum[half][h], 0};
    float products[2] = {share * (product[half][h] + (old - now) * sum[half][h]), 0};
#pragma unroll
    for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float distance = fmaf(d[half][g * 4 + h * 2 + c], k, -now);
        const float e = ptx::exp2(distance);
        sums[c] += e;
        products[c] = fmaf(e, distance, products[c]);
      }
    }
    largest[half][h] = now;
    sum[half][h] = sums[0] + sums[1];
    product[half][h] = products[0] + products[1];
  }
  // `target` counts from the tile's first entry.
  __device__ void add_before(const Lane& at, int target, float of_tile, const Accumulators& d,
                             int half, int h, float k) {
    float best = -INFINITY;
    if (target >= kTileColumns) {
      best = of_tile;
    } else if (target > 0) {
#pragma unroll
      for (int g = 0; g < kTileColumns / 8; ++g) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          best = fmaxf(best, at.column(g, c) < target ? d[half][g * 4 + h * 2 + c] : -INFINITY);
        }
      }
    }
    before[half][h] = fmaxf(before[half][h], best * k);
  }
};

}  // namespace ounce::cce
