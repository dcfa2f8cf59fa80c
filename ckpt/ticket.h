// SPDX-License-Identifier: MIT
// The inside of a Ticket: what the thread of a save tells whoever asks.
#pragma once

#include <ounce/ckpt/capture.h>
#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/write_step.h>
#include <ounce/core/check.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace ounce::ckpt {

inline double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// `timeout` from now; longer than the clock can say is for ever.
inline std::chrono::steady_clock::time_point deadline(std::chrono::duration<double> timeout) {
  using Clock = std::chrono::steady_clock;
  const auto now = Clock::now();
  if (timeout.count() > 1e9) return Clock::time_point::max();
  return now + std::chrono::duration_cast<Clock::duration>(timeout);
}

struct Ticket::State {
  State(int64_t step, size_t levels) : step(step), durable_(levels) {}

  const int64_t step;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  std::shared_ptr<Capture> capture;  // set before the save begins; of its thread
  bool all_levels = false;

  // From the save's threads.
  void captured();
  void durable(size_t level, CheckpointInfo info, const WriteResult& result, double stalled);
  void durable(size_t level);
  void pool(int64_t bytes);
  void warn(const std::vector<std::string>& warnings);
  void end(Stage stage, Fault fault, const std::string& error);
  bool may_publish();
  void release();  // ends it: nothing happens at the first level any more

  // From anywhere.
  Stage stage() const;
  bool ended() const;
  bool is_durable(size_t level) const;
  double progress() const;
  std::string error() const;
  SaveReport report() const;
  bool wait(std::chrono::duration<double> timeout) const { return wait_until(deadline(timeout)); }
  bool wait_until(std::chrono::steady_clock::time_point until) const;
  [[noreturn]] void rethrow() const;
  void cancel();
  bool cancelled() const;
  // The capture as long as it captures.
  std::shared_ptr<Capture> capturing() const;
  void blocked(double seconds);

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  Stage stage_ = Stage::kCapturing;
  Fault fault_ = Fault::kProblem;
  std::string error_;
  bool cancelled_ = false, publishing_ = false, released_ = false;
  std::vector<bool> durable_;
  SaveReport report_;
};

}  // namespace ounce::ckpt
