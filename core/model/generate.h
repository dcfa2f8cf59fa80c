// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/model/model.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace ounce {

struct GenerateOptions {
  int64_t tokens = 200;      // how many to add
  double temperature = 0.8;  // 0 = always the likeliest token
  int64_t top_k = 0;         // sample among the k likeliest; 0 = all
  uint64_t seed = 1;
};

// Continues `prompt` (at least one token) token by token through the mixers' states, which equals
// running the full forward pass each time. Runs without gradients and in eval mode (restored at the
// end), on the parameters' device, under the caller's autocast. Draws on the CPU from a generator
// of its own, so that training's randomness is not touched. `on_token`, when given, sees each new
// token and may return false to stop. Returns the new tokens.
std::vector<int64_t> generate(Model& model, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options,
                              const std::function<bool(int64_t)>& on_token = {});

}  // namespace ounce
