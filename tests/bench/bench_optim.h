// SPDX-License-Identifier: MIT
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <nlohmann/json.hpp>

namespace ounce::bench {

// Steps of the optimizers on the 168 matrices of a 1.3B-class model (width 2048, MLP 5632, 24
// layers), bf16 parameters and gradients, in turn: a line and a row each, beside LibTorch's fused
// AdamW. On a CPU, or with `smoke`, two small layers.
void run_optim(at::Device device, bool smoke,
               const std::function<void(nlohmann::ordered_json)>& emit);

}  // namespace ounce::bench
