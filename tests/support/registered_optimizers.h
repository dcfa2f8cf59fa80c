// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/optim/optimizers.h>

namespace ounce::test {

// A process registers them once.
inline void register_optimizers_once() {
  static const bool done = (optim::register_optimizers(), true);
  static_cast<void>(done);
}

}  // namespace ounce::test
