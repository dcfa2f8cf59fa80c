// SPDX-License-Identifier: MIT
#include <ounce/ckpt/capture.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace ounce::ckpt {
namespace {

using Clock = std::chrono::steady_clock;

// Copies a GPU has at a time: while the host hears that one has ended, the next one runs.
constexpr size_t kUnderWay = 2;
// What the GPU copies anyway while the host makes a clone; less is not worth one.
constexpr int64_t kLeastCloneBytes = int64_t{64} << 20;
// A clone is made of tensors of this size: they fit into holes of the allocator's, and go back one
// by one.
constexpr int64_t kCloneBytes = int64_t{256} << 20;

}  // namespace

Capture::Capture(Snapshot snapshot, std::vector<Slot> slots, std::shared_ptr<HostPool> pool,
                 CopyStreams& streams, const Settings& settings)
    : snapshot_(std::move(snapshot)),
      slots_(std::move(slots)),
      pool_(std::move(pool)),
      streams_(streams),
      settings_(settings),
      states_(slots_.size()),
      guarded_(snapshot_.tensors().size()),
      left_to_capture_(slots_.size()),
      left_to_take_(slots_.size()) {
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    waiting_.push_back(slot);
    if (is_gpu(slots_[slot])) {
      auto& stream = streams_[slots_[slot].group];
      if (!stream) stream = open_copy_stream(slots_[slot].group);
    }
    for (const auto& piece : slots_[slot].pieces) {
      auto& tensor = guarded_[piece.tensor];
      if (tensor.slots.empty() || tensor.slots.back() != slot) tensor.slots.push_back(slot);
      ++tensor.copies_left;
    }
  }
  for (size_t i = 0; i < guarded_.size(); ++i) {
    if (!snapshot_.shared(i) || guarded_[i].slots.empty()) continue;
    const auto& tensor = snapshot_.tensor(i);
    guarded_[i].counts = !tensor.is_inference();
    if (guarded_[i].counts) guarded_[i].version = tensor._version();
    all_.push_back(i);
    by_storage_[tensor.storage().unsafeGetStorageImpl()].push_back(i);
  }
  for (const auto& [device, stream] : streams_) stream->follow_compute();
}

Capture::~Capture() {
  for (auto& state : states_) {
    try {
      if (state.mark) state.mark->wait();
    } catch (const c10::Error&) {
      // of a GPU that has reported it before
    }
    if (state.buffer != nullptr && !state.spilled) pool_->give(state.buffer);
  }
}

// ---- the copying thread

void Capture::run() {
  std::deque<size_t> under_way;
  Lock lock(mutex_);
  while (left_to_capture_ > 0) {
    // Asked before a buffer is looked for: nobody tells when one becomes ready in between.
    const bool growing = pool_->growing();
    const bool more = failure_.empty() && has_waiting();
    if (more && (under_way.size() < kUnderWay || !urgent_.empty())) {
      auto* buffer = free_buffer();
      const bool spill = buffer == nullptr && !urgent_.empty() && !growing &&
                         settings_.overflow == Overflow::kSpill;
      if (buffer != nullptr || spill) {
        const auto slot = next_waiting();
        auto& state = states_[slot];
        if (spill) state.spilled = allocate_pages(slots_[slot].bytes);
        state.buffer = spill ? state.spilled.get() : buffer;
        issue(lock, slot);
        if (state.mark) under_way.push_back(slot);
        continue;
      }
    }
    if (!under_way.empty()) {
      complete(lock, under_way.front());
      under_way.pop_front();
    } else if (!failure_.empty()) {
      return;
    } else if (growing) {
      changed_.wait_for(lock, std::chrono::milliseconds(1));
    } else {
      changed_.wait(lock);
    }
  }
  snapshot_.release();
}

// Drops what was handed over out of turn from the front of the queues.
bool Capture::has_waiting() {
  for (auto* queue : {&urgent_, &waiting_}) {
    while (!queue->empty() && states_[queue->front()].stage != Stage::kWaiting) queue->pop_front();
  }
  return !urgent_.empty() || !waiting_.empty();
}

// After has_waiting().
size_t Capture::next_waiting() {
  auto& queue = urgent_.empty() ? waiting_ : urgent_;
  const auto slot = queue.front();
  queue.pop_front();
  return slot;
}

// Null when there is none now. A buffer whose bytes the disk has is taken back, oldest first.
char* Capture::free_buffer() {
  if (auto* buffer = pool_->take()) return buffer;
  while (!written_.empty()) {
    auto& state = states_[written_.front()];
    written_.pop_front();
    auto* buffer = std::exchange(state.buffer, nullptr);
    if (!state.spilled) return buffer;
    state.spilled.reset();
  }
  return nullptr;
}

std::vector<Copy> Capture::copies_of(size_t slot, char* buffer) const {
  std::vector<Copy> copies;
  const auto& state = states_[slot];
  if (state.clone.defined()) {
    const auto* from = static_cast<const char*>(state.clone.const_data_ptr()) + state.clone_at;
    return {{buffer, from, static_cast<size_t>(slots_[slot].bytes)}};
  }
  for (const auto& piece : slots_[slot].pieces) {
    const auto* from = static_cast<const char*>(snapshot_.tensor(piece.tensor).const_data_ptr());
    copies.push_back({buffer + piece.at, from + piece.begin, static_cast<size_t>(piece.bytes)});
  }
  return copies;
}

// Hands a slot's copies to its GPU, or does them here.
void Capture::issue(Lock& lock, size_t slot) {
  auto& state = states_[slot];
  state.stage = Stage::kCopying;
  const auto copies = copies_of(slot, state.buffer);
  lock.unlock();
  if (!is_gpu(slots_[slot])) {
    for (const auto& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    lock.lock();
    return complete(lock, slot);
  }
  auto& stream = *streams_.at(slots_[slot].group);
  auto mark = stream.copy(copies);
  lock.lock();
  state.mark = std::move(mark);
  state.order = ++issued_;
  changed_.notify_all();
}

void Capture::complete(Lock& lock, size_t slot) {
  auto& state = states_[slot];
  if (state.mark) {
    const auto mark = state.mark;
    lock.unlock();
    mark->wait();
    lock.lock();
    state.mark = nullptr;
    state.clone = at::Tensor();
  }
  for (const auto& piece : slots_[slot].pieces) {
    auto& tensor = guarded_[piece.tensor];
    if (tensor.counts && snapshot_.tensor(piece.tensor)._version() != tensor.version) {
      torn(piece.tensor);
    }
    // What has been copied may be changed.
    if (--tensor.copies_left == 0) tensor.counts = false;
  }
  // The pages' ends go to the file as well.
  const auto& pieces = slots_[slot].pieces;
  for (const auto& piece : pieces) {
    const auto end = piece.at + piece.bytes;
    std::memset(state.buffer + end, 0, whole_pages(end) - end);
  }
  state.stage = Stage::kCaptured;
  captured_.push_back(slot);
  --left_to_capture_;
  changed_.notify_all();
}

// ---- the writers

std::optional<size_t> Capture::take() {
  Lock lock(mutex_);
  changed_.wait(lock, [&] {
    return !captured_.empty() || left_to_take_ == 0 || stopped_ || !failure_.empty();
  });
  if (captured_.empty() || stopped_ || !failure_.empty()) return std::nullopt;
  const auto slot = captured_.front();
  captured_.pop_front();
  states_[slot].stage = Stage::kWriting;
  if (--left_to_take_ == 0) changed_.notify_all();
  return slot;
}

void Capture::written(size_t slot) {
  const Lock lock(mutex_);
  states_[slot].stage = Stage::kWritten;
  written_.push_back(slot);
  written_bytes_ += slots_[slot].bytes;
  changed_.notify_all();
}

void Capture::stop_taking() {
  const Lock lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

bool Capture::rewind() {
  const Lock lock(mutex_);
  stopped_ = false;
  for (const auto& state : states_) {
    if (state.stage >= Stage::kWriting && state.buffer == nullptr) return false;
  }
  for (size_t slot = 0; slot < states_.size(); ++slot) {
    if (states_[slot].stage < Stage::kWriting) continue;
    states_[slot].stage = Stage::kCaptured;
    captured_.push_back(slot);
    ++left_to_take_;
  }
  written_.clear();
  written_bytes_ = 0;
  changed_.notify_all();
  return true;
}

// ---- the gate

double Capture::gate() { return gate(all_); }

double Capture::gate(at::TensorList bucket) {
  std::vector<size_t> tensors;
  for (const auto& tensor : bucket) {
    if (!tensor.defined() || !tensor.has_storage()) continue;
    const auto found = by_storage_.find(tensor.storage().unsafeGetStorageImpl());
    if (found == by_storage_.end()) continue;
    tensors.insert(tensors.end(), found->second.begin(), found->second.end());
  }
  return tensors.empty() ? 0 : gate(tensors);
}

double Capture::gate(const std::vector<size_t>& tensors) {
  const auto start = Clock::now();
  Lock lock(mutex_);
  if (!failure_.empty()) return 0;
  check_versions(tensors);
  std::vector<size_t> slots;
  for (const auto i : tensors) {
    if (guarded_[i].copies_left == 0) continue;
    for (const auto slot : guarded_[i].slots) {
      if (states_[slot].stage < Stage::kCaptured) slots.push_back(slot);
    }
  }
  if (slots.empty() || !failure_.empty())
    return std::chrono::duration<double>(Clock::now() - start).count();
  std::sort(slots.begin(), slots.end());
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  hold(lock, slots);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// From here on the owner may change them: their copies are ordered before it.
void Capture::check_versions(const std::vector<size_t>& tensors) {
  for (const auto i : tensors) {
    if (!guarded_[i].counts) continue;
    guarded_[i].counts = false;
    if (snapshot_.tensor(i)._version() != guarded_[i].version) torn(i);
  }
}

void Capture::hold(Lock& lock, const std::vector<size_t>& slots) {
  try {
    clone_waiting(slots);
    if (!wait_until_handed_over(lock, slots)) return;
    // Copies of a GPU end in order: the last one stands for all before it.
    std::map<int, const State*> last;
    for (const auto slot : slots) {
      const auto& state = states_[slot];
      if (!state.mark || state.clone.defined()) continue;
      auto& found = last[slots_[slot].group];
      if (found == nullptr || found->order < state.order) found = &state;
    }
    for (const auto& [device, state] : last) streams_.at(device)->hold_compute(*state->mark);
  } catch (const std::exception& error) {
    set_failure(error.what());
  }
}

// Where there is memory to spare, what a GPU still has to be asked for is cloned there.
void Capture::clone_waiting(const std::vector<size_t>& slots) {
  if (settings_.spare_gpu_bytes < 0) return;
  std::map<int, std::vector<size_t>> by_device;
  for (const auto slot : slots) {
    const auto& state = states_[slot];
    if (is_gpu(slots_[slot]) && state.stage == Stage::kWaiting && !state.clone.defined()) {
      by_device[slots_[slot].group].push_back(slot);
    }
  }
  for (const auto& [device, waiting] : by_device) {
    int64_t bytes = 0;
    for (const auto slot : waiting) bytes += slots_[slot].bytes;
    auto& stream = *streams_.at(device);
    if (bytes < kLeastCloneBytes || stream.spare_bytes() < bytes + settings_.spare_gpu_bytes) {
      continue;
    }
    std::vector<Copy> copies;
    at::Tensor memory;
    int64_t used = 0;
    for (const auto slot : waiting) {
      if (!memory.defined() || used + slots_[slot].bytes > memory.numel()) {
        const auto size = std::max(slots_[slot].bytes, std::min(bytes, kCloneBytes));
        try {
          memory = at::empty({size}, at::TensorOptions(at::kByte).device(at::kCUDA, device));
        } catch (const c10::OutOfMemoryError&) {
          break;  // the rest is waited for
        }
        used = 0;
      }
      for (auto copy : copies_of(slot, static_cast<char*>(memory.data_ptr()) + used)) {
        copies.push_back(copy);
      }
      states_[slot].clone = memory;
      states_[slot].clone_at = used;
      used += slots_[slot].bytes;
      bytes -= slots_[slot].bytes;
      cloned_bytes_ += slots_[slot].bytes;
    }
    if (!copies.empty()) stream.clone(copies);
  }
}

// Until no slot waits but in a clone, and those of the host are copied. False: the capture failed.
bool Capture::wait_until_handed_over(Lock& lock, const std::vector<size_t>& slots) {
  const auto pending = [&](size_t slot) {
    const auto& state = states_[slot];
    if (!is_gpu(slots_[slot])) return state.stage < Stage::kCaptured;
    return !state.clone.defined() &&
           (state.stage == Stage::kWaiting || (state.stage == Stage::kCopying && !state.mark));
  };
  for (const auto slot : slots) {
    if (pending(slot)) urgent_.push_back(slot);
  }
  const auto done = [&] {
    return !failure_.empty() || std::none_of(slots.begin(), slots.end(), pending);
  };
  if (done()) return failure_.empty();
  changed_.notify_all();
  const bool in_time = changed_.wait_for(lock, settings_.timeout, done);
  urgent_.clear();
  if (!in_time) set_failure("[checkpoint] given up: the state was not copied in time");
  return failure_.empty();
}

// ---- its end

void Capture::torn(size_t tensor) {
  set_failure(
      "[checkpoint] tensor '" + snapshot_.tensors()[tensor].name +
      "' was changed before it was copied; call before_mutation() before whatever changes it, "
      "or present it as StateClass::kForward");
}

void Capture::set_failure(const std::string& reason) {
  if (failure_.empty()) failure_ = reason;
  changed_.notify_all();
}

void Capture::fail(const std::string& reason) {
  const Lock lock(mutex_);
  set_failure(reason);
}

std::string Capture::failure() const {
  const Lock lock(mutex_);
  return failure_;
}

bool Capture::captured() const {
  const Lock lock(mutex_);
  return left_to_capture_ == 0;
}

int64_t Capture::written_bytes() const {
  const Lock lock(mutex_);
  return written_bytes_;
}

int64_t Capture::cloned_bytes() const {
  const Lock lock(mutex_);
  return cloned_bytes_;
}

}  // namespace ounce::ckpt
