// SPDX-License-Identifier: MIT
#pragma once

#include <c10/core/TensorOptions.h>

namespace ounce::nn {

// Device and dtype that ounce::nn modules allocate their parameters with on this thread: fp32 on
// the CPU unless a ConstructionGuard says otherwise. On the meta device nothing is allocated or
// drawn.
at::TensorOptions construction_options();

class ConstructionGuard {
 public:
  explicit ConstructionGuard(at::TensorOptions options);
  ~ConstructionGuard();
  ConstructionGuard(const ConstructionGuard&) = delete;
  ConstructionGuard& operator=(const ConstructionGuard&) = delete;

 private:
  at::TensorOptions previous_;
};

}  // namespace ounce::nn
