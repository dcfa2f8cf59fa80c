// SPDX-License-Identifier: MIT
// Work behind committed steps: copies to further levels, removal of old files. No Torch here.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace ounce::ckpt {

// Does jobs one by one, in a thread that is made with the first one.
class Background {
 public:
  struct Job {
    std::function<void()> run;  // must not throw
    std::string uses = "";      // folder of a step that has to stay until then
    // Of jobs with the same key only the newest waits: the one before is left out, so that a slow
    // level gets fewer steps and holds up nobody. -1 = all are done.
    int key = -1;
    std::function<void()> left_out = nullptr;
  };

  ~Background();  // what has begun ends; what waits is dropped

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
