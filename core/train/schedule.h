// SPDX-License-Identifier: MIT
// Learning-rate schedules: pure functions of the step, so that resuming needs no state of theirs.
#pragma once

#include <cstdint>

namespace ounce {

class Schedule {
 public:
  static constexpr const char* kKind = "schedule";
  struct Context {
    int64_t steps = 0;  // horizon of the run, >= 1: [run] steps
  };

  virtual ~Schedule() = default;
  // What the base learning rate is multiplied by in step `step`, counted from 0. Steps past the
  // horizon keep the last value.
  virtual double factor(int64_t step) const = 0;
};

// Adds constant, linear, cosine and wsd to the registry. All warm up linearly: with warmup = w,
// step s < w has (s + 1) / w. `final` is the fraction of the base rate that is left at the horizon:
//   linear, cosine  from 1 in the first step after the warm-up to `final` in the last step
//                   (cosine: Loshchilov and Hutter 2017, eq. 5, without restarts)
//   wsd             1 until `cooldown` steps are left, then down to `final` in the last step; shape
//                   "linear", or "sqrt": 1 - sqrt(x) (Haegele et al. 2024)
// Fault::kUsage: a warm-up (and cooldown) longer than the horizon, values out of range.
void register_schedules();

}  // namespace ounce
