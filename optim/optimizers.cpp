// SPDX-License-Identifier: MIT
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/galore.h>
#include <ounce/optim/optimizers.h>
#include <ounce/optim/trion.h>

namespace ounce::optim {

void register_optimizers() {
  register_adamw();
  register_dct_adamw();
  register_galore();
  register_trion();
}

}  // namespace ounce::optim
