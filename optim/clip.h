// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>

namespace ounce::optim {

// What clipping by the global norm asks for, as fp32 scalars on the gradients' device: `scale` is
// for StepControl::grad_scale and `found_inf` for StepControl::skip.
struct ClipResult {
  at::Tensor norm;       // 2-norm over all gradients together
  at::Tensor scale;      // min(1, max_norm / (norm + 1e-6)); 1 where the norm is not finite
  at::Tensor found_inf;  // 1 where the norm is not finite, else 0
};

// Reads the gradients and writes nothing; undefined and empty ones are passed over, and with none
// left the norm is 0, on the CPU. max_norm <= 0 means no clipping: scale is 1. Norms are taken in
// fp32 (fp64 for fp64 gradients), so a finite gradient whose square overflows counts as not finite.
// Gradients of several devices meet on the first one's. No host synchronisation; allocates one
// scalar a gradient.
ClipResult clip_by_norm(at::TensorList gradients, double max_norm);

}  // namespace ounce::optim
