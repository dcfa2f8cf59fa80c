// SPDX-License-Identifier: MIT
// What a training loop pays for a checkpoint. tests/bench/peers_ckpt.py measures public peers on
// the same loop with the same definitions.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <nlohmann/json.hpp>

namespace ounce::bench {

// A row a cell, with the limits of this machine as measured in this run: pinned copies, and `dd`
// past the page cache in the current folder, which is where the checkpoints go. `tiny` only shows
// that it runs.
void run_ckpt(at::Device device, bool tiny,
              const std::function<void(const nlohmann::ordered_json&)>& emit);

}  // namespace ounce::bench
