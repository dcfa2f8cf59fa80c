// SPDX-License-Identifier: MIT
#include <ounce/ckpt/background.h>

#include <algorithm>
#include <utility>

namespace ounce::ckpt {

Background::~Background() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void Background::add(Job job) {
  std::function<void()> left_out;
  {
    const std::lock_guard lock(mutex_);
    const auto older =
        std::find_if(jobs_.begin() + (running_ ? 1 : 0), jobs_.end(),
                     [&](const auto& other) { return job.key >= 0 && other.key == job.key; });
    if (older != jobs_.end()) {
      left_out = std::move(older->left_out);
      jobs_.erase(older);
    }
    jobs_.push_back(std::move(job));
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
    changed_.notify_all();
  }
  if (left_out) left_out();
}

void Background::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    running_ = true;
    const auto run = jobs_.front().run;
    lock.unlock();
    run();
    lock.lock();
    jobs_.pop_front();
    running_ = false;
    changed_.notify_all();
  }
}

bool Background::uses(const std::string& folder) const {
  const std::lock_guard lock(mutex_);
  return std::any_of(jobs_.begin(), jobs_.end(),
                     [&](const auto& job) { return job.uses == folder; });
}

bool Background::wait_idle(std::chrono::steady_clock::time_point until) {
  std::unique_lock lock(mutex_);
  const auto idle = [&] { return jobs_.empty(); };
  // The clock's last moment overflows in some waits.
  if (until == std::chrono::steady_clock::time_point::max()) {
    changed_.wait(lock, idle);
    return true;
  }
  return changed_.wait_until(lock, until, idle);
}

}  // namespace ounce::ckpt
