// SPDX-License-Identifier: MIT
// What a product out of the subspace leaves of a matrix, in 8 bits, by warps that have 16 rows of
// the columns that share scales, in two halves. For .cu files.
#pragma once

#include <ounce/optim/lowrank_tiles.h>

#include <cfloat>

namespace ounce::optim::lowrank {

// Neighbours of a row that share a scale are those of both halves.
static_assert(kInt8Block == 2 * kColumns);

__device__ inline float larger(float x, float y) {  // a NaN is the largest
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// A warp's rows of a tile less d, instead of d; and with those before the largest magnitudes of a
// thread's two rows.
__device__ inline void subtract(float (&d)[32], float (&largest)[2], uint32_t tile, int lane) {
  const uint32_t row = tile + (lane & 15) * tma::kRowBytes;
#pragma unroll
  for (int g = 0; g < 8; g += 2) {
    uint32_t p[4];
    load_matrices<false>(p, row + (((g + (lane >> 4)) ^ (lane & 7)) * 16));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = d[g * 4 + i];
      x = (i % 2 == 0 ? low(p[i / 2]) : high(p[i / 2])) - x;
      largest[i / 2 % 2] = larger(largest[i / 2 % 2], fabsf(x));
    }
  }
}

// Where scales go: of a matrix of so many rows, in each so many blocks.
struct Scales {
  float* all;
  uint32_t rows;
  int blocks;
};

// The scales of a warp's rows from `first_row` on, by their largest magnitudes, which begin anew;
// and 1 / scale of a thread's two.
__device__ inline void scale_rows(float (&largest)[2], float (&inverse)[2], const Scales& to,
                                  int first_row, int block, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& x = largest[half];
    for (const int other : {1, 2}) x = larger(x, __shfl_xor_sync(~0u, x, other));
    const float scale = x / 127;
    inverse[half] = scale > 0 ? fminf(1 / scale, FLT_MAX) : 0;
    const auto row = static_cast<uint32_t>(first_row + half * 8 + lane / 4);
    if (lane % 4 == 0 && row < to.rows) to.all[int64_t{row} * to.blocks + block] = scale;
    x = 0;
  }
}

// A warp's rows of both halves -> bytes in `tile`, by 1 / scale of a thread's two rows.
__device__ inline void narrow(const float (&first)[32], const float (&second)[32],
                              const float (&inverse)[2], uint32_t tile, int lane) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: in front of it, a rounded number's bits
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = tile + (half * 8 + lane / 4) * tma::kRowBytes + lane % 4 * 2;
#pragma unroll
    for (int g = 0; g < 16; ++g) {
      const auto& from = g < 8 ? first : second;
      const float x = fmaf(from[g % 8 * 4 + half * 2], inverse[half], kRound);
      const float y = fmaf(from[g % 8 * 4 + half * 2 + 1], inverse[half], kRound);
      store_u16(row + ((g / 2 ^ lane / 4) * 16) + g % 2 * 8,
                __byte_perm(__float_as_uint(x), __float_as_uint(y), 0x0040));
    }
  }
}

}  // namespace ounce::optim::lowrank
