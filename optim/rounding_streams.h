// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace ounce::optim {

// What the seed of a parameter's stochastic rounding becomes for its moments and its residual.
constexpr uint64_t kExpAvgSeed = uint64_t{1} << 30, kExpAvgSqSeed = uint64_t{2} << 30;
constexpr uint64_t kResidualSeed = uint64_t{3} << 30;

}  // namespace ounce::optim
