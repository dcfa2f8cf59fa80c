// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/optim/layerwise.h>
#include <torch/torch.h>

#include <memory>
#include <utility>

namespace ounce::optim {

struct LayerwiseStepper::Hook final : torch::autograd::PostAccumulateGradHook {
  explicit Hook(LayerwiseStepper& to) : stepper(to) {}
  void operator()(const torch::autograd::Variable& parameter) override { stepper.step(parameter); }

  LayerwiseStepper& stepper;
};

LayerwiseStepper::LayerwiseStepper(NamedOptimizer& optimizer) : optimizer_(optimizer) {
  using torch::autograd::impl::post_acc_grad_hooks;
  for (const auto& [name, parameter] : optimizer.parameters()) {
    OUNCE_CHECK(!parameter.grad().defined(), "[LayerwiseStepper] '", name,
                "': expected no gradient yet; call zero_grad() before");
    OUNCE_CHECK(post_acc_grad_hooks(parameter) == nullptr, "[LayerwiseStepper] '", name,
                "' has a post-accumulate hook already, and a tensor holds one");
  }
  for (const auto& [name, parameter] : optimizer.parameters()) {
    torch::autograd::impl::set_post_acc_grad_hooks(parameter, std::make_unique<Hook>(*this));
  }
}

LayerwiseStepper::~LayerwiseStepper() {
  for (const auto& [name, parameter] : optimizer_.parameters()) {
    torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
  }
}

void LayerwiseStepper::set_control(StepControl control) {
  const std::lock_guard lock(mutex_);
  control_ = std::move(control);
}

void LayerwiseStepper::pause(bool paused) {
  const std::lock_guard lock(mutex_);
  paused_ = paused;
}

void LayerwiseStepper::accumulate(bool accumulates) {
  const std::lock_guard lock(mutex_);
  accumulates_ = accumulates;
}

at::Tensor LayerwiseStepper::take_norm() {
  const std::lock_guard lock(mutex_);
  return square_sum_.defined() ? std::exchange(square_sum_, at::Tensor()).sqrt() : at::Tensor();
}

void LayerwiseStepper::step(const at::Tensor& parameter) {
  const std::lock_guard lock(mutex_);
  const at::NoGradGuard no_grad;
  if (paused_) {
    parameter.mutable_grad() = at::Tensor();
    return;
  }
  const auto& gradient = parameter.grad();
  const auto values = gradient.is_sparse() ? gradient._values() : gradient;
  const auto norm = at::linalg_vector_norm(
      values, 2, {}, false, parameter.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  square_sum_ =
      square_sum_.defined() ? square_sum_ + norm.square().to(square_sum_.device()) : norm.square();
  auto& pending = pending_[parameter.unsafeGetTensorImpl()];
  auto broken = norm.isfinite().logical_not();
  if (pending.broken.defined()) broken = broken.logical_or(pending.broken);
  if (accumulates_) {
    pending.parameter = parameter;
    pending.broken = broken;
    if (!optimizer_.accumulate(parameter)) {
      pending.gradient =
          pending.gradient.defined() ? pending.gradient + parameter.grad() : parameter.grad();
    }
    parameter.mutable_grad() = at::Tensor();
    return;
  }
  step_along(parameter, pending, broken);
}

void LayerwiseStepper::flush() {
  const std::lock_guard lock(mutex_);
  const at::NoGradGuard no_grad;
  for (auto& [key, pending] : pending_) {
    if (!pending.broken.defined()) continue;
    const auto parameter = pending.parameter;
    parameter.mutable_grad() = at::zeros_like(parameter);
    step_along(parameter, pending, pending.broken);
  }
}

// Along .grad and what is pending.
void LayerwiseStepper::step_along(const at::Tensor& parameter, Pending& pending,
                                  const at::Tensor& broken) {
  if (pending.gradient.defined()) {
    parameter.mutable_grad() = parameter.grad() + pending.gradient;
  }
  auto control = control_;
  if (!control.skip.defined()) control.skip = broken.to(at::kFloat);
  control.consume_gradients = true;
  pending = {};
  // No other parameter has a gradient, so no other steps.
  optimizer_.step(control);
  parameter.mutable_grad() = at::Tensor();
}

}  // namespace ounce::optim
