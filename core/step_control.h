// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>

namespace ounce {

// What one optimizer step needs to know, as tensors on the parameters' device, so that clipping,
// skipping a non-finite step and graph capture cost no host synchronisation.
struct StepControl {
  at::Tensor lr;          // fp32 scalar: the base learning rate of this step
  at::Tensor grad_scale;  // fp32 scalar, undefined = 1: gradients are multiplied by it
  at::Tensor skip;  // fp32 scalar, undefined = 0: nonzero leaves parameters and state untouched
  // Whether the step may use the memory of gradients that have theirs to themselves; what it leaves
  // there is no gradient.
  bool consume_gradients = false;
};

}  // namespace ounce
