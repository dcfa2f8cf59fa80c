// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <vector>

#include "state_tensors.h"

namespace ounce::test {

// What an optimizer holds back, of each parameter where it does, in fp64.
inline std::vector<at::Tensor> residuals_of(Stateful& optimizer) {
  std::vector<at::Tensor> all;
  for (const auto& [name, tensor] : state_tensors(optimizer)) {
    if (name == "residual") all.push_back(tensor.to(at::kDouble));
    if (name != "residual_scales") continue;
    const auto spread = tensor.to(at::kDouble).repeat_interleave(128, 1);
    all.back() = all.back() * spread.narrow(1, 0, all.back().size(1));
  }
  return all;
}

}  // namespace ounce::test
