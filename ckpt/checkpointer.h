// SPDX-License-Identifier: MIT
// Checkpoints of Stateful objects: HDF5 files that any HDF5 tool reads, written beside training so
// that a committed step is never lost and a damaged one is never loaded. See FORMAT.md for the
// bytes and README.md for how the copies overlap with the steps.
//
//   Checkpointer checkpoints({.levels = {{.path = "run/ckpt"}}});
//   const auto ticket = checkpoints.save(step, objects);   // returns at once
//   ... forward, backward ...
//   checkpoints.before_mutation();                         // before the optimizer changes anything
//   optimizer.step();
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/ckpt/file_system.h>
#include <ounce/core/stateful.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ounce::ckpt {

class Vote;  // vote.h

using Objects = std::vector<std::pair<std::string, Stateful*>>;  // prefix and object

// A place that checkpoints go to. A step is written to the first level that takes it; each further
// level gets it as a copy of the files of the level before.
struct Level {
  std::string path = "";       // folder; made when missing
  int64_t every = 0;           // takes saves of steps divisible by this; 0 = every save
  int64_t keep_last = 3;       // older steps are removed after a commit; 0 = keep all
  int64_t keep_every = 0;      // steps divisible by this are never removed; 0 = off
  std::string keep_best = "";  // metric whose best steps are kept; empty = off
  int64_t best_count = 1;      // how many of them
  bool best_is_highest = false;
  SyncPolicy sync = SyncPolicy::kFull;
};

// What a save does while the one before is not yet durable.
enum class Busy {
  kWait,       // for it; the time counts as blocked
  kSkip,       // nothing: its ticket is skipped
  kSupersede,  // ends the one before, unless that is already being committed
};

// What the gate does where the pool is full and the rest of the state has not been copied.
enum class Overflow {
  kBlock,  // waits until the disk has taken enough
  kSpill,  // moves slots into pageable memory
};

struct CheckpointerOptions {
  std::vector<Level> levels = {};
  Busy busy = Busy::kWait;
  Overflow overflow = Overflow::kBlock;
  // Host memory for copies, registered with the GPU where there is one; allocated when the first
  // save, or prepare(), tells the size of the state. 0 = the state's size, at most 40 % of the
  // memory that is available then.
  int64_t pool_bytes = 0;
  int64_t slot_bytes = int64_t{32} << 20;  // one copy, one write; a multiple of 4 MiB
  int64_t writers = 4;                     // threads that write to the first level
  bool direct = true;                      // past the page cache, where the file system can
  // Where forward and backward are too short for the copies, clone what is left on the GPU, as
  // long as this much stays free there. -1 = never.
  int64_t spare_gpu_bytes = int64_t{1} << 30;
  // A save that is not durable after this many seconds is given up and releases the gate.
  double timeout = 600;
  bool drain = true;  // the destructor waits for saves in flight; else it cancels them
  std::shared_ptr<FileSystem> file_system = nullptr;  // null = the real one
  std::shared_ptr<Vote> vote = nullptr;               // null = this process alone
  // Called from the thread that commits when a save enters a phase: create, data, sync, manifest,
  // publish, retention, done. Must not call back.
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

struct SaveOptions {
  std::map<std::string, std::string> notes = {};
  std::map<std::string, double> metrics = {};
  bool all_levels = false;  // also those whose interval would not take this step
};

struct SaveReport {
  CheckpointInfo info;  // of the first level written
  int64_t bytes = 0;
  double blocked = 0;   // seconds the caller was held in save() and the gate
  double stalled = 0;   // seconds the GPU's compute stream waited for copies
  double captured = 0;  // seconds from save() until the state was copied
  double seconds = 0;   // seconds from save() until it was durable
  int64_t cloned_bytes = 0;
  int64_t pool_bytes = 0;  // of host memory, held between saves
  int64_t retries = 0;     // data files written again
  // Rewritten files, retention that could not remove a folder, a further level that failed.
  std::vector<std::string> warnings;
};

// A save on its way. Copies are the same save; may outlive the Checkpointer, be asked from any
// thread.
class Ticket {
 public:
  enum class Stage { kCapturing, kWriting, kDurable, kFailed, kSkipped, kCancelled };

  Stage stage() const;
  int64_t step() const;
  bool finished() const;    // neither capturing nor writing
  bool captured() const;    // the state may be changed without the gate
  double progress() const;  // share of the bytes written, 0 to 1
  bool durable(size_t level) const;
  std::string error() const;  // why it failed; "" otherwise
  // Until the first level has it, or it ended otherwise. False: not within `timeout`.
  bool wait(std::chrono::duration<double> timeout) const;
  // The same without limit, then the report. Throws what made the save fail: ounce::Error, kData
  // for files (a full disk: bytes needed and free), kProblem for a tensor that was changed before
  // it was copied, for a cancelled and for a skipped save.
  SaveReport wait() const;
  void cancel();  // nothing of it stays, unless it is being committed

 private:
  friend class Checkpointer;
  struct State;
  std::shared_ptr<State> state_;
};

class Checkpointer {
 public:
  // Takes the lock of every level (Fault::kProblem with the holder's host and pid when another live
  // process has it), sweeps leftovers of dead writers. Clear error when a folder cannot be written.
  explicit Checkpointer(CheckpointerOptions options);
  ~Checkpointer();

  // Captures everything the objects present, under the prefixes given, as it is at this point of
  // the current stream, and returns; the rest happens in threads. Tensors of class kHost and all
  // scalars are copied before it returns, kForward and non-contiguous ones are cloned on their
  // device. Throws kUsage for what cannot be stored; whatever fails later is told by the ticket.
  Ticket save(int64_t step, const Objects& objects, const SaveOptions& options = {});

  // Writes and waits: on return the step is durable. Throws as Ticket::wait() does.
  SaveReport save_and_wait(int64_t step, const Objects& objects, const SaveOptions& options = {});

  // Whether save(step) would go to any level.
  bool due(int64_t step) const;

  // Before any tensor of a save in flight is changed: makes the current stream of its GPU wait for
  // the copies that are still under way. The host waits only for what has not been handed to the
  // GPU yet, and for tensors in host memory. Without a save in flight this costs a load.
  // With a bucket only that of these tensors: a step that updates bucket by bucket gates each.
  void before_mutation(at::TensorList bucket = {});

  // Allocates and registers the pool in the background, before the first save needs it.
  void prepare(const Objects& objects);

  // Waits until all levels have what was saved. False: not within `timeout`.
  bool drain(std::chrono::duration<double> timeout =
                 std::chrono::duration<double>(std::numeric_limits<double>::max()));

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The gate around a step of any optimizer:
//   { ckpt::StepGuard guard(checkpoints); optimizer.step(); }
class StepGuard {
 public:
  explicit StepGuard(Checkpointer& checkpointer) { checkpointer.before_mutation(); }
  StepGuard(const StepGuard&) = delete;
  StepGuard& operator=(const StepGuard&) = delete;
};

// Steps under a root that have a manifest, newest first; damaged manifests are listed in
// `problems`, and one of a later version throws (Fault::kNewerFormat).
std::vector<CheckpointInfo> list_checkpoints(const std::string& root,
                                             std::vector<std::string>* problems = nullptr);

enum class Verify {
  kNone,     // nothing but names, shapes and sizes
  kTouched,  // the sums of what is loaded, as it is read
  kFull,     // everything, before the first value is changed
};

struct LoadOptions {
  std::optional<int64_t> step = std::nullopt;  // none = the newest good one
  Verify verify = Verify::kTouched;
  // Globs over full names ('*' any run of characters, '?' one); what they leave out of the objects
  // keeps its value.
  std::vector<std::string> include = {"*"};
  std::vector<std::string> exclude = {};
  bool strict = true;  // names, shapes and dtypes must match exactly
  // Up to this much is read and verified before the first value is changed.
  int64_t staged_bytes = int64_t{1} << 30;
  int64_t readers = 4;  // threads
  bool direct = true;   // past the page cache, where the file system can
  std::shared_ptr<FileSystem> file_system = nullptr;
};

struct LoadReport {
  CheckpointInfo info;
  // Newer steps that were passed over, with the reason each.
  std::vector<std::string> rejected;
  // With strict = false: what was not loaded.
  std::vector<std::string> missing, unexpected, mismatched;
  double seconds = 0;
  int64_t bytes = 0;  // read
};

// Loads the newest good step of the roots (levels of one run; or a step folder given as a path)
// into the objects, in place; every difference of names, shapes and dtypes is listed in one error
// (Fault::kUsage) and then nothing has been changed. Of the same step in several roots the first
// root's is read. Nothing there: Fault::kNotFound. Steps there, none good: Fault::kData. A step of
// a later version in a root: Fault::kNewerFormat, unless a step is given.
//
// More than staged_bytes go straight to their tensors: when damage shows late, the next older step
// is loaded over it, and when there is none the error says that values were changed. Verify::kFull
// reads twice, and changes nothing then. Allocates staged_bytes at most, or 16 MiB a reader.
LoadReport load_checkpoint(const std::vector<std::string>& paths, const Objects& objects,
                           const LoadOptions& options = {});
LoadReport load_checkpoint(const std::string& path, std::optional<int64_t> step,
                           const Objects& objects);

}  // namespace ounce::ckpt
