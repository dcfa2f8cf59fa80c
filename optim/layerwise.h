// SPDX-License-Identifier: MIT
// Steps inside backward: each parameter as soon as its gradient is whole, which is freed then, so
// that no two gradients are alive (LOMO, Lv et al. 2023; per-layer updates of GaLore).
#pragma once

#include <ounce/optim/named_optimizer.h>

#include <mutex>
#include <unordered_map>

namespace ounce::optim {

// While it lives, every backward() over parameters of `optimizer` is a step of those that it
// reaches, with what set_control() says; optimizer.step() has nothing left to do. A norm over all
// gradients is known only when the last has been stepped along: clip none, or by a scale known
// before. Each call is a step, but for those between accumulate(true) and accumulate(false): their
// gradients are added to those of the step after, by an optimizer that projects them (dct_adamw) in
// their subspace, and freed; others are kept whole.
//
// Fault::kUsage: a parameter that has a gradient or another post-accumulate hook already. What a
// step throws comes out of backward(), with the parameters before it stepped.
class LayerwiseStepper {
 public:
  // `optimizer` outlives this.
  explicit LayerwiseStepper(NamedOptimizer& optimizer);
  ~LayerwiseStepper();
  LayerwiseStepper(const LayerwiseStepper&) = delete;
  LayerwiseStepper& operator=(const LayerwiseStepper&) = delete;

  // Of the steps from now on; they consume gradients. With `skip` undefined, a parameter whose
  // gradient has an element that is not finite skips its step, alone.
  void set_control(StepControl control);
  // From now on backward() adds to the next step, or is one. What has been added is no part of a
  // checkpoint.
  void accumulate(bool accumulates);
  // Steps along what was added of parameters that no backward() has reached since: after the last.
  void flush();
  // While paused, a gradient is freed without a step, for a backward() that is only measured.
  void pause(bool paused);
  // The norm of all gradients since the last call, of several backward() calls the root of their
  // square sums, before control's grad_scale: a scalar of fp32
  // (fp64 for fp64) on the device of the first; undefined where there was none.
  at::Tensor take_norm();

 private:
  struct Hook;
  // Of a parameter, since its last step.
  struct Pending {
    at::Tensor parameter;
    at::Tensor gradient;  // accumulated whole, or undefined
    at::Tensor broken;    // bool: one of its gradients was not finite
  };
  void step(const at::Tensor& parameter);
  void step_along(const at::Tensor& parameter, Pending& pending, const at::Tensor& broken);

  NamedOptimizer& optimizer_;
  StepControl control_;
  bool paused_ = false, accumulates_ = false;
  std::unordered_map<const void*, Pending> pending_;
  at::Tensor square_sum_;
  std::mutex mutex_;  // backward of several devices runs on a thread each
};

}  // namespace ounce::optim
