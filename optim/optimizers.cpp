// SPDX-License-Identifier: MIT
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/optimizers.h>

namespace ounce::optim {

void register_optimizers() {
  register_adamw();
  register_dct_adamw();
}

}  // namespace ounce::optim
