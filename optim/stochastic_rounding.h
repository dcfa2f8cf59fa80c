// SPDX-License-Identifier: MIT
// Rounding to 16 bits up or down with odds by nearness, so that updates far smaller than the
// spacing of the weights arrive on average. Rounding to nearest loses every one of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace ounce::optim {

// fp32 `x` -> bf16. Its odds are a hash of each element's position, `step` (a scalar on x's device,
// an integer) and `seed`: the same everywhere and on every device, with no state to keep.
// Infinities and NaN stay.
at::Tensor round_stochastically(const at::Tensor& x, const at::Tensor& step, uint64_t seed);

}  // namespace ounce::optim
