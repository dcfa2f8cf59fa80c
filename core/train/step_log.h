// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/train/learner.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ounce {

// Numbers of one finished step, on the host.
struct StepNumbers {
  int64_t step = 0;
  double loss = 0, norm = 0;
  bool skipped = false;
  std::vector<std::pair<std::string, double>> measured = {};  // as StepReport's
};

// Brings the device scalars of a step to the host without waiting for the device: the copy is
// enqueued behind the step, and read when the next step has been enqueued.
class PendingStep {
 public:
  PendingStep(int64_t step, const StepReport& report);
  ~PendingStep();
  PendingStep(PendingStep&&) noexcept;
  PendingStep& operator=(PendingStep&&) noexcept;

  // Waits for the step itself, not for later work.
  StepNumbers wait() const;

 private:
  struct Event;
  int64_t step_;
  at::Tensor numbers_;  // fp32 [3 + measured], host, pinned for a GPU
  std::vector<std::string> names_;
  std::unique_ptr<Event> event_;
};

// Wall time of training alone: paused during evaluation, samples and checkpoints.
class StepClock {
 public:
  void start() { since_ = now(); }
  void pause();
  // Seconds since the last call, without the pauses.
  double lap();
  void drop() {
    seconds_ = 0;
    start();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static Clock::time_point now() { return Clock::now(); }
  std::optional<Clock::time_point> since_;
  double seconds_ = 0;
};

}  // namespace ounce
