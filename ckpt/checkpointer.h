// SPDX-License-Identifier: MIT
// Checkpoints of Stateful objects: HDF5 files that any HDF5 tool reads, written so that a committed
// step is never lost and a damaged one is never loaded. See FORMAT.md for the bytes. This version
// writes synchronously.
#pragma once

#include <ounce/core/stateful.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ounce::ckpt {

class FileSystem;  // file_system.h

struct CheckpointerOptions {
  std::string root = "";       // folder of the checkpoints; made when missing
  int64_t keep_last = 3;       // older steps are removed after a commit; 0 = keep all
  int64_t keep_every = 0;      // steps divisible by this are never removed; 0 = off
  std::string keep_best = "";  // metric name: the step with the lowest value is kept; empty = off
  std::shared_ptr<FileSystem> file_system = nullptr;  // null = the real one
  // Called when a save enters a phase: create, data, sync, manifest, publish, retention, done.
  std::function<void(const char* phase)> on_phase = nullptr;
};

// What is stored beside the tensors.
struct CheckpointInfo {
  int64_t step = 0;
  std::string uuid;
  std::string path;                          // folder of the step
  std::map<std::string, double> metrics;     // for keep_best
  std::map<std::string, std::string> notes;  // config text, versions, command line: name -> text
  int64_t bytes = 0;
};

struct SaveReport {
  CheckpointInfo info;
  double seconds = 0;
  int64_t bytes = 0;
  std::vector<std::string> warnings;  // retention that could not remove a folder, say
};

class Checkpointer {
 public:
  // Takes the root's lock (Fault::kProblem with the holder's host and pid when another live process
  // has it), sweeps leftovers of dead writers. Clear error when the root cannot be written.
  explicit Checkpointer(CheckpointerOptions options);
  ~Checkpointer();

  // Writes everything the objects present, under the prefixes given, and commits. On return the
  // step is durable. On failure older steps are intact and Fault::kData says bytes needed and free.
  SaveReport save(int64_t step, const std::vector<std::pair<std::string, Stateful*>>& objects,
                  const std::map<std::string, std::string>& notes = {},
                  const std::map<std::string, double>& metrics = {});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Steps under a root that have a manifest, newest first; damaged manifests are listed in
// `problems`, and one of a later version throws (Fault::kNewerFormat).
std::vector<CheckpointInfo> list_checkpoints(const std::string& root,
                                             std::vector<std::string>* problems = nullptr);

struct LoadReport {
  CheckpointInfo info;
  // Newer steps that were passed over, with the reason each.
  std::vector<std::string> rejected;
};

// Loads the newest good step of a root (or the step given, or the step folder given as `path`) into
// the objects, in place; names, shapes and dtypes must match exactly, every difference is listed in
// one error (Fault::kUsage) and then nothing has been changed. Block sums are verified before a
// value is used. Nothing there: Fault::kNotFound. Steps there, none good: Fault::kData. A step of a
// later version in the root: Fault::kNewerFormat, unless a step is given.
LoadReport load_checkpoint(const std::string& path, std::optional<int64_t> step,
                           const std::vector<std::pair<std::string, Stateful*>>& objects);
LoadReport load_checkpoint(const std::string& path, std::optional<int64_t> step,
                           const std::vector<std::pair<std::string, Stateful*>>& objects,
                           std::shared_ptr<FileSystem> files);

}  // namespace ounce::ckpt
