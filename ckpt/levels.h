// SPDX-License-Identifier: MIT
// The further levels of a Checkpointer: committed steps are copied from root to root, file by file,
// in a thread of their own. No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace ounce::ckpt {

// Copies a committed step into another root, where it is the same step to the last byte. Every byte
// is verified on the way, and the protocol is that of a save. Returns warnings; throws
// StorageError.
std::vector<std::string> copy_step(std::shared_ptr<FileSystem> files, const std::string& folder,
                                   const std::string& root, SyncPolicy sync, bool direct);

// Does the copies one by one. Where a copy to a level is still waiting when the next one comes, the
// older one is left out: a slow level gets fewer steps, and holds up nobody.
class LevelCopies {
 public:
  struct Job {
    size_t level = 0;
    std::string from;            // the step's folder; retention must leave it
    std::function<void()> copy;  // must not throw
    std::function<void()> left_out;
    bool must = false;  // never left out
  };

  ~LevelCopies();  // what has begun ends; what waits is left out

  void add(Job job);
  bool uses(const std::string& folder) const;
  // Until nothing waits or runs. False: not until then.
  bool wait_idle(std::chrono::steady_clock::time_point until);

 private:
  void work();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;  // the first is running while running_
  bool running_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace ounce::ckpt
