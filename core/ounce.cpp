// SPDX-License-Identifier: MIT
#include <ounce/core/data/datasets.h>
#include <ounce/core/model/language_model.h>
#include <ounce/core/train/learner.h>
#include <ounce/core/train/schedule.h>
#include <ounce/kernels/cce/cce.h>
#include <ounce/kernels/gla/gla.h>
#include <ounce/kernels/norm/norm.h>
#include <ounce/optim/optimizers.h>
#include <ounce/ounce.h>

namespace ounce {

void register_builtins() {
  static const bool once = [] {
    register_gla();
    register_norm();
    register_cce();
    register_models();
    register_learners();
    optim::register_optimizers();
    register_schedules();
    data::register_datasets();
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace ounce
