// SPDX-License-Identifier: MIT
// The loop: batches, steps, evaluation, samples, checkpoints and reports of one run.
#pragma once

#include <ounce/core/options.h>

#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace ounce {

struct TrainerOptions {
  Options config;                     // complete (read_config)
  std::string name = "run";           // of runs/<name>-<n> when `out` is empty
  std::string out;                    // run folder; empty = runs/<name>-<n>
  std::string device = "auto";        // auto | cpu | cuda | cuda:N
  std::string resume = "none";        // none | auto | a run folder, checkpoint root or step folder
  std::optional<int64_t> stop_after;  // stop after this step; default: the schedule's horizon
  std::string init_from;              // weights only, from a checkpoint or safetensors
  std::vector<std::string> init_map;  // "from=to" name rules for init_from
  bool dry_run = false;               // build, plan memory, print, write nothing
  bool quiet = false;                 // warnings and the final lines only
  std::string command;                // stored beside the checkpoints
  std::string resume_flags;           // flags of this run that its resume line repeats
};

struct TrainResult {
  int64_t step = 0;       // steps done, over all sittings
  double valid_loss = 0;  // of the last evaluation; NaN without a validation split
  double best_valid_loss = 0;
  std::string folder;        // empty after a dry run
  bool interrupted = false;  // SIGINT or SIGTERM: saved, can be resumed
};

// Throws ounce::Error; whatever was committed before stays. `out` gets the human-readable report.
class Trainer {
 public:
  Trainer(TrainerOptions options, std::ostream& out);
  ~Trainer();

  TrainResult run();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ounce
