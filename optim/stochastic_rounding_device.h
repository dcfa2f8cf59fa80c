// SPDX-License-Identifier: MIT
// round_stochastically() of stochastic_rounding.h on the device, bit for bit. For .cu files.
#pragma once

#include <cstdint>

namespace ounce::optim::rounding {

__device__ inline uint32_t spread(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

// Of a tensor in a step, both as round_stochastically() takes them.
__device__ inline uint32_t stream_of(uint32_t step, uint64_t seed) {
  const uint32_t key = spread(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32);
  return spread(spread(step) ^ spread(key));
}
// Of the positions with the same upper 32 bits.
__device__ inline uint32_t row_of(uint32_t stream, uint32_t upper) {
  return spread(upper ^ stream);
}

// x -> the bits of a bf16; `row` as above, `lower`: the lower 32 bits of the position. Infinities
// and NaN stay.
__device__ inline uint32_t to_bf16(float x, uint32_t row, uint32_t lower) {
  const uint32_t quiet = x != x ? 0x7FC00000u : 0;
  return ((__float_as_uint(x) + (spread(lower ^ row) & 0xFFFF)) | quiet) >> 16;
}

}  // namespace ounce::optim::rounding
