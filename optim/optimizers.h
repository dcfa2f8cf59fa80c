// SPDX-License-Identifier: MIT
#pragma once

namespace ounce::optim {

// Adds every optimizer of this folder to the registry of kind `optimizer`. Once a process.
void register_optimizers();

}  // namespace ounce::optim
