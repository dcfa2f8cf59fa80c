// SPDX-License-Identifier: MIT
// The checkpoints of one run: what its config says of them, saves in flight, and their news.
#pragma once

#include <ounce/ckpt/checkpointer.h>
#include <ounce/core/check.h>
#include <ounce/core/options.h>

#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ounce {

// The levels of a complete config; paths lie below `folder` unless absolute. Each takes what it
// does not say itself (every, keep_last, keep_every, keep_best) from [checkpoint]. Throws
// Fault::kUsage.
std::vector<ckpt::Level> checkpoint_levels(const Options& config, const std::string& folder);

class RunCheckpoints {
 public:
  // Locks and sweeps the levels.
  RunCheckpoints(const Options& config, const std::string& folder);

  bool due(int64_t step) const;
  // Begins to save; the save is durable when poll() or finish() says so.
  void save(int64_t step, const ckpt::Objects& objects, const ckpt::SaveOptions& options);
  // The gate, for Learner::before_update().
  std::function<void(at::TensorList)> gate();
  void prepare(const ckpt::Objects& objects) { checkpointer_.prepare(objects); }

  struct News {
    int64_t step = 0;
    std::optional<ckpt::SaveReport> report;  // none: it failed
    std::string error;
    Fault fault = Fault::kProblem;
  };
  // Saves that have ended since the last call, without waiting.
  std::vector<News> poll();
  // Waits for the save in flight, as poll() reports it.
  std::vector<News> wait();
  // Waits until every level has what it gets.
  void finish() { checkpointer_.drain(); }
  // What saves and further levels have warned of since the last call.
  std::vector<std::string> warnings();

  // "ckpt 100 durable", and what is on its way: step and share written, 0 to 1.
  int64_t durable_step() const { return durable_; }
  void set_durable(int64_t step) { durable_ = step; }
  std::optional<std::pair<int64_t, double>> in_flight() const;
  // The step is durable, or will be.
  bool has(int64_t step) const;

 private:
  std::vector<ckpt::Level> levels_;
  ckpt::Checkpointer checkpointer_;
  std::deque<ckpt::Ticket> tickets_;  // not yet reported
  // Reported, perhaps still on their way to further levels; and how many warnings were told.
  std::deque<std::pair<ckpt::Ticket, size_t>> handed_;
  int64_t durable_ = -1;
};

}  // namespace ounce
