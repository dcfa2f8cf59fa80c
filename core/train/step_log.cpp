// SPDX-License-Identifier: MIT
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <ounce/core/train/step_log.h>
#include <torch/torch.h>

namespace ounce {

struct PendingStep::Event {
  c10::Event event;
};

PendingStep::PendingStep(int64_t step, const StepReport& report) : step_(step) {
  std::vector<at::Tensor> scalars = {report.loss, report.norm, report.skipped};
  for (const auto& [name, value] : report.measured) {
    names_.push_back(name);
    scalars.push_back(value);
  }
  for (auto& scalar : scalars) scalar = scalar.to(at::kFloat);
  const auto packed = at::stack(scalars);
  if (!packed.is_cuda()) {
    numbers_ = packed;
    return;
  }
  numbers_ = at::empty(packed.sizes(), at::TensorOptions(at::kFloat).pinned_memory(true));
  numbers_.copy_(packed, /*non_blocking=*/true);
  event_ = std::make_unique<Event>(Event{c10::Event(c10::DeviceType::CUDA)});
  event_->event.record(
      c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(packed.device()));
}

PendingStep::~PendingStep() = default;
PendingStep::PendingStep(PendingStep&&) noexcept = default;
PendingStep& PendingStep::operator=(PendingStep&&) noexcept = default;

StepNumbers PendingStep::wait() const {
  if (event_) event_->event.synchronize();
  const auto* values = numbers_.const_data_ptr<float>();
  StepNumbers numbers{step_, values[0], values[1], values[2] != 0};
  for (size_t i = 0; i < names_.size(); ++i) {
    numbers.measured.emplace_back(names_[i], values[3 + i]);
  }
  return numbers;
}

void StepClock::pause() {
  if (!since_) return;
  seconds_ += std::chrono::duration<double>(now() - *since_).count();
  since_.reset();
}

double StepClock::lap() {
  pause();
  const auto result = seconds_;
  seconds_ = 0;
  start();
  return result;
}

}  // namespace ounce
