// SPDX-License-Identifier: MIT
#include <ounce/ckpt/ticket.h>

namespace ounce::ckpt {

using Lock = std::unique_lock<std::mutex>;

void Ticket::State::captured() {
  const Lock lock(mutex_);
  if (stage_ != Stage::kCapturing || !capture->captured()) return;
  stage_ = Stage::kWriting;
  report_.captured = since(start);
  report_.cloned_bytes = capture->cloned_bytes();
}

void Ticket::State::durable(size_t level, CheckpointInfo info, const WriteResult& result,
                            double stalled) {
  const Lock lock(mutex_);
  stage_ = Stage::kDurable;
  durable_[level] = true;
  report_.bytes = info.bytes;
  report_.info = std::move(info);
  report_.seconds = since(start);
  report_.stalled = stalled;
  report_.retries = result.retries;
  report_.warnings = result.warnings;
}

void Ticket::State::durable(size_t level) {
  const Lock lock(mutex_);
  durable_[level] = true;
  changed_.notify_all();
}

void Ticket::State::pool(int64_t bytes) {
  const Lock lock(mutex_);
  report_.pool_bytes = bytes;
}

void Ticket::State::warn(const std::vector<std::string>& warnings) {
  const Lock lock(mutex_);
  report_.warnings.insert(report_.warnings.end(), warnings.begin(), warnings.end());
}

void Ticket::State::end(Stage stage, Fault fault, const std::string& error) {
  const Lock lock(mutex_);
  stage_ = stage == Stage::kFailed && cancelled_ ? Stage::kCancelled : stage;
  fault_ = fault;
  error_ = error;
  released_ = released_ || capture == nullptr;
}

bool Ticket::State::may_publish() {
  const Lock lock(mutex_);
  publishing_ = !cancelled_ && capture->failure().empty();
  return publishing_;
}

void Ticket::State::release() {
  const Lock lock(mutex_);
  capture = nullptr;
  released_ = true;
  changed_.notify_all();
}

Ticket::Stage Ticket::State::stage() const {
  const Lock lock(mutex_);
  return stage_;
}

bool Ticket::State::ended() const {
  const Lock lock(mutex_);
  return released_;
}

bool Ticket::State::is_durable(size_t level) const {
  const Lock lock(mutex_);
  return level < durable_.size() && durable_[level];
}

double Ticket::State::progress() const {
  const Lock lock(mutex_);
  if (stage_ == Stage::kDurable) return 1;
  if (!capture) return 0;
  int64_t bytes = 0;
  for (const auto& slot : capture->slots()) bytes += slot.bytes;
  return bytes == 0 ? 0 : static_cast<double>(capture->written_bytes()) / double(bytes);
}

std::string Ticket::State::error() const {
  const Lock lock(mutex_);
  return error_;
}

SaveReport Ticket::State::report() const {
  const Lock lock(mutex_);
  return report_;
}

bool Ticket::State::wait_until(std::chrono::steady_clock::time_point until) const {
  Lock lock(mutex_);
  const auto over = [&] { return released_; };
  // The clock's last moment overflows in some waits.
  if (until == std::chrono::steady_clock::time_point::max()) {
    changed_.wait(lock, over);
    return true;
  }
  return changed_.wait_until(lock, until, over);
}

void Ticket::State::rethrow() const {
  const Lock lock(mutex_);
  throw Error(fault_, error_);
}

void Ticket::State::cancel() {
  std::shared_ptr<Capture> here;
  {
    const Lock lock(mutex_);
    if (released_ || publishing_) return;
    cancelled_ = true;
    here = capture;
  }
  if (here) here->fail("[checkpoint] the save of step " + std::to_string(step) + " was cancelled");
}

bool Ticket::State::cancelled() const {
  const Lock lock(mutex_);
  return cancelled_;
}

std::shared_ptr<Capture> Ticket::State::capturing() const {
  const Lock lock(mutex_);
  return stage_ == Stage::kCapturing ? capture : nullptr;
}

void Ticket::State::blocked(double seconds) {
  const Lock lock(mutex_);
  report_.blocked += seconds;
}

Ticket::Stage Ticket::stage() const { return state_->stage(); }
int64_t Ticket::step() const { return state_->step; }
bool Ticket::finished() const { return state_->ended(); }
bool Ticket::captured() const { return state_->capturing() == nullptr; }
double Ticket::progress() const { return state_->progress(); }
bool Ticket::durable(size_t level) const { return state_->is_durable(level); }
std::string Ticket::error() const { return state_->error(); }
bool Ticket::wait(std::chrono::duration<double> timeout) const { return state_->wait(timeout); }

SaveReport Ticket::wait() const {
  state_->wait_until(std::chrono::steady_clock::time_point::max());
  if (state_->stage() != Stage::kDurable) state_->rethrow();
  return state_->report();
}

void Ticket::cancel() { state_->cancel(); }

}  // namespace ounce::ckpt
