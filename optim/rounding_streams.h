// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace ounce::optim {

// What the seed of a parameter's stochastic rounding becomes for its moments and its residual.
constexpr uint64_t kExpAvgSeed = uint64_t{1} << 30, kExpAvgSqSeed = uint64_t{2} << 30;
constexpr uint64_t kResidualSeed = uint64_t{3} << 30;
// And for the sum of a gradient and that.
constexpr uint64_t kResidualSumSeed = kResidualSeed + (uint64_t{1} << 29);

// Neighbours of a row that share a scale where it is kept in 8 bits; see int8_blocks.h.
constexpr int64_t kInt8Block = 128;

}  // namespace ounce::optim
