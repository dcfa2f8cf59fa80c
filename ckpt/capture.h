// SPDX-License-Identifier: MIT
// The state of one save on its way from its tensors into host memory, slot by slot, while training
// goes on; and the gate that keeps a step from overtaking it.
//
//   waiting -> copying -> captured -> writing -> written
//
// One thread runs run(); writers take() captured slots and give them back with written(); gates
// come from the training thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/copy_stream.h>
#include <ounce/ckpt/host_pool.h>
#include <ounce/ckpt/layout.h>
#include <ounce/ckpt/snapshot.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace ounce::ckpt {

// Of a Checkpointer: made when a first tensor lies on that GPU.
using CopyStreams = std::map<int, std::unique_ptr<CopyStream>>;

class Capture {
 public:
  struct Settings {
    Overflow overflow = Overflow::kBlock;
    int64_t spare_gpu_bytes = -1;
    std::chrono::duration<double> timeout{600};  // of a gate
  };

  // `slots` cut from the snapshot's tensors, their group being the index of a GPU or -1. The copies
  // follow what the current streams hold now.
  Capture(Snapshot snapshot, std::vector<Slot> slots, std::shared_ptr<HostPool> pool,
          CopyStreams& streams, const Settings& settings);
  ~Capture();  // after run(), take() and the gates have returned

  const std::vector<Slot>& slots() const { return slots_; }

  // Copies until all is captured or the capture has failed.
  void run();

  // The next captured slot, in no particular order; waits for one. Nothing: all are taken, or the
  // capture has failed.
  std::optional<size_t> take();
  const char* data(size_t slot) const { return states_[slot].buffer; }
  void written(size_t slot);
  // Makes take() return nothing, for writers that have met an error.
  void stop_taking();
  // Every slot is to be written again. False: some buffers have been used for others already.
  bool rewind();

  // The gate (Checkpointer::before_mutation). Returns the seconds the host was held.
  double gate();
  double gate(at::TensorList bucket);

  // Ends it: gates open, take() and run() return. The first reason stays.
  void fail(const std::string& reason);
  std::string failure() const;  // "" = none
  bool captured() const;
  int64_t written_bytes() const;
  int64_t cloned_bytes() const;

 private:
  enum class Stage { kWaiting, kCopying, kCaptured, kWriting, kWritten };
  struct State {
    Stage stage = Stage::kWaiting;
    char* buffer = nullptr;
    Pages spilled;                   // holds the buffer when it is not the pool's
    std::shared_ptr<CopyMark> mark;  // of the copy under way
    int64_t order = 0;               // of its issue: copies of a GPU end in this order
    at::Tensor clone;                // where the bytes lie instead of in the tensors
    int64_t clone_at = 0;
  };
  struct Guarded {  // a tensor that its owner may change
    uint32_t version = 0;
    bool counts = false;  // has a version
    int64_t copies_left = 0;
    std::vector<size_t> slots;
  };
  using Lock = std::unique_lock<std::mutex>;

  double gate(const std::vector<size_t>& tensors);
  void hold(Lock& lock, const std::vector<size_t>& slots);
  void clone_waiting(const std::vector<size_t>& slots);
  bool wait_until_handed_over(Lock& lock, const std::vector<size_t>& slots);
  void check_versions(const std::vector<size_t>& tensors);
  void torn(size_t tensor);
  bool has_waiting();
  size_t next_waiting();
  char* free_buffer();
  void issue(Lock& lock, size_t slot);
  void complete(Lock& lock, size_t slot);
  std::vector<Copy> copies_of(size_t slot, char* buffer) const;
  void set_failure(const std::string& reason);
  static bool is_gpu(const Slot& slot) { return slot.group >= 0; }

  Snapshot snapshot_;
  const std::vector<Slot> slots_;
  const std::shared_ptr<HostPool> pool_;
  CopyStreams& streams_;
  const Settings settings_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<State> states_;
  std::vector<Guarded> guarded_;  // by tensor
  std::vector<size_t> all_;       // tensors that are guarded
  std::unordered_map<const void*, std::vector<size_t>> by_storage_;
  // `urgent_` is what a gate waits for: it goes first, and past the two that are under way.
  std::deque<size_t> urgent_, waiting_, captured_, written_;
  size_t left_to_capture_ = 0, left_to_take_ = 0;
  bool stopped_ = false;  // stop_taking()
  int64_t issued_ = 0;
  std::string failure_;
  int64_t written_bytes_ = 0, cloned_bytes_ = 0;
};

}  // namespace ounce::ckpt
