// SPDX-License-Identifier: MIT
#include <ounce/ckpt/background.h>
#include <ounce/ckpt/capture.h>
#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/commit.h>
#include <ounce/ckpt/data_file.h>
#include <ounce/ckpt/levels.h>
#include <ounce/ckpt/lock.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/retention.h>
#include <ounce/ckpt/scan.h>
#include <ounce/ckpt/ticket.h>
#include <ounce/ckpt/write_step.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

namespace ounce::ckpt {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kLeastSlots = 2;  // one is written while the next is filled

void check_names(const SaveOptions& options) {
  const auto check = [](const std::string& name) {
    const auto problem = name_problem(name);
    OUNCE_CHECK(problem.empty(), "[checkpoint] the name of a note or metric '", name, "' ",
                problem);
  };
  for (const auto& [name, text] : options.notes) check(name);
  for (const auto& [name, value] : options.metrics) check(name);
}

void check_level(Level& level) {
  auto& path = level.path;
  OUNCE_CHECK(!path.empty() && path.find('\0') == std::string::npos,
              "[checkpoint] expected a folder, got '", path, "'");
  OUNCE_CHECK(
      level.every >= 0 && level.keep_last >= 0 && level.keep_every >= 0 && level.best_count >= 1,
      "[checkpoint] expected every, keep_last and keep_every of at least 0 and best_count ",
      "of at least 1, got ", level.every, ", ", level.keep_last, ", ", level.keep_every, " and ",
      level.best_count);
  while (path.size() > 1 && path.back() == '/') path.pop_back();
}

void check_options(CheckpointerOptions& options) {
  OUNCE_CHECK(!options.levels.empty(), "[checkpoint] expected at least one level, got none");
  for (auto& level : options.levels) check_level(level);
  OUNCE_CHECK(options.pool_bytes >= 0 && options.slot_bytes >= kBlockBytes &&
                  options.slot_bytes % kBlockBytes == 0,
              "[checkpoint] expected slot_bytes in multiples of ", kBlockBytes,
              " and pool_bytes of at least 0, got ", options.slot_bytes, " and ",
              options.pool_bytes);
  OUNCE_CHECK(options.writers >= 1 && options.timeout > 0,
              "[checkpoint] expected writers and timeout of at least 1, got ", options.writers,
              " and ", options.timeout);
  if (!options.file_system) options.file_system = posix_file_system();
  if (!options.vote) options.vote = vote_of_one();
}

// Where something is to be written, its absence is a failed call and no search without a result.
template <class Action>
auto writing(const Action& action) -> decltype(action()) {
  return with_faults([&] {
    try {
      return action();
    } catch (const StorageError& error) {
      if (error.kind() != StorageError::Kind::kMissing) throw;
      throw StorageError(StorageError::Kind::kIo, error.what(), error.code());
    }
  });
}

std::vector<Slot> slots_of(const Snapshot& snapshot, int64_t slot_bytes) {
  std::vector<int64_t> bytes;
  for (size_t i = 0; i < snapshot.tensors().size(); ++i) {
    bytes.push_back(static_cast<int64_t>(snapshot.tensor(i).nbytes()));
  }
  std::vector<LayoutItem> items;
  for (const auto i : storage_order(bytes)) {
    if (!snapshot.tensors()[i].tied_to.empty()) continue;
    const auto& tensor = snapshot.tensor(i);
    OUNCE_CHECK(tensor.is_cpu() || tensor.is_cuda(), "[checkpoint] tensor '",
                snapshot.tensors()[i].name, "' lies on ", tensor.device(),
                ", which cannot be saved; move it to the CPU or a CUDA GPU");
    items.push_back({i, bytes[i], tensor.is_cuda() ? static_cast<int>(tensor.get_device()) : -1});
  }
  return cut_into_slots(items, slot_bytes, kBlockBytes);
}

}  // namespace

struct Checkpointer::Impl {
  explicit Impl(CheckpointerOptions given) : options(std::move(given)) {
    check_options(options);
    writing([&] { open(); });
  }

  ~Impl() {
    if (!options.drain) cancel_active();
    finish_active();
    if (options.drain) copies.wait_idle(Clock::time_point::max());
    removals.wait_idle(Clock::time_point::max());
  }

  void open();
  Ticket save(int64_t step, const Objects& objects, const SaveOptions& with);
  std::vector<size_t> levels_of(int64_t step, bool all) const;
  bool make_way();
  void cancel_active();
  void finish_active();
  std::shared_ptr<Ticket::State> newest() const {
    const std::lock_guard lock(mutex);
    return active;
  }
  void set_newest(std::shared_ptr<Ticket::State> state) {
    const std::lock_guard lock(mutex);
    active = std::move(state);
  }
  void ensure_pool(const std::vector<Slot>& slots);
  void begin(std::shared_ptr<Ticket::State> state, Snapshot snapshot, Manifest manifest,
             std::vector<size_t> levels);
  void work(const std::shared_ptr<Ticket::State>& state, Manifest manifest,
            const std::vector<size_t>& levels);
  WriteRequest request_for(Ticket::State& state, Manifest manifest, const Level& level);
  void retain(size_t level, const std::shared_ptr<Ticket::State>& state,
              std::vector<std::string>& warnings);
  void check_room(const std::string& root, const Manifest& manifest);
  void hand_on(const std::shared_ptr<Ticket::State>& state, std::vector<size_t> levels,
               const std::string& folder, bool must);
  void enter(const char* phase) const {
    if (options.on_phase) options.on_phase(phase);
  }

  CheckpointerOptions options;
  const pid_t owner = ::getpid();
  std::vector<std::unique_ptr<RootLock>> locks;
  std::vector<std::string> warnings;  // of the sweep, until the next save reports them
  int64_t next_sequence = 0;
  CopyStreams streams;
  std::shared_ptr<HostPool> pool;
  std::mutex saves;  // one save() at a time
  mutable std::mutex mutex;
  std::shared_ptr<Ticket::State> active;  // the newest save, until the next
  std::thread thread;                     // which writes it
  std::atomic<bool> capturing{false};     // a gate has work
  Background copies, removals;
};

void Checkpointer::Impl::open() {
  auto& files = *options.file_system;
  for (const auto& level : options.levels) {
    make_directories(files, level.path);
    locks.push_back(std::make_unique<RootLock>(level.path));
    for (auto& warning : sweep(files, level.path)) warnings.push_back(std::move(warning));
    // One count over all levels: the same step has the same number in each.
    for (const auto& entry : scan_root(files, level.path).steps) {
      next_sequence = std::max(next_sequence, entry.manifest.sequence + 1);
    }
  }
}

std::vector<size_t> Checkpointer::Impl::levels_of(int64_t step, bool all) const {
  std::vector<size_t> taking;
  for (size_t i = 0; i < options.levels.size(); ++i) {
    const auto every = options.levels[i].every;
    if (all || every == 0 || step % every == 0) taking.push_back(i);
  }
  return taking;
}

void Checkpointer::Impl::cancel_active() {
  if (const auto state = newest()) state->cancel();
}

void Checkpointer::Impl::finish_active() {
  if (thread.joinable()) thread.join();
  set_newest(nullptr);
}

// False: the save is to be skipped.
bool Checkpointer::Impl::make_way() {
  const auto before = newest();
  if (before && !before->ended()) {
    if (options.busy == Busy::kSkip || before->cancelled()) return false;
    if (options.busy == Busy::kSupersede) cancel_active();
    // A disk that hangs must not hang the training for ever.
    if (!before->wait(std::chrono::duration<double>(options.timeout))) {
      cancel_active();
      return false;
    }
  }
  finish_active();
  return true;
}

Ticket Checkpointer::Impl::save(int64_t step, const Objects& objects, const SaveOptions& with) {
  OUNCE_CHECK(::getpid() == owner,
              "[checkpoint] save() in a forked process: its threads and locks ",
              "are the parent's; make a Checkpointer of its own");
  OUNCE_CHECK(step >= 0 && step <= kMostStep, "[checkpoint] expected a step of 0 to ", kMostStep,
              ", got ", step);
  check_names(with);
  const std::lock_guard lock(saves);
  Ticket ticket;
  ticket.state_ = std::make_shared<Ticket::State>(step, options.levels.size());
  auto& state = ticket.state_;
  auto levels = levels_of(step, with.all_levels);
  if (levels.empty() || !make_way()) {
    state->end(
        Ticket::Stage::kSkipped, Fault::kProblem,
        c10::str("[checkpoint] step ", step, " was not saved: ",
                 levels.empty() ? "no level takes it" : "the save before is still on its way"));
    return ticket;
  }
  Snapshot snapshot(objects);
  Manifest manifest;
  manifest.uuid = random_id();
  manifest.step = step;
  manifest.sequence = next_sequence;
  manifest.tensors = snapshot.tensors();
  manifest.scalars = snapshot.scalars();
  manifest.notes = with.notes;
  manifest.metrics = with.metrics;
  try {
    writing([&] { check_room(options.levels[levels[0]].path, manifest); });
  } catch (const Error& error) {
    state->end(Ticket::Stage::kFailed, error.fault(), error.what_without_backtrace());
    return ticket;
  }
  ++next_sequence;
  state->all_levels = with.all_levels;
  begin(state, std::move(snapshot), std::move(manifest), std::move(levels));
  state->blocked(since(state->start));
  return ticket;
}

void Checkpointer::Impl::check_room(const std::string& root, const Manifest& manifest) {
  auto& files = *options.file_system;
  const auto needed = needed_bytes(manifest);
  int64_t free = 0;
  if (files.free_bytes(root, free) == 0 && free < needed) {
    // Old steps may still be on their way out.
    removals.wait_idle(deadline(std::chrono::duration<double>(options.timeout)));
  }
  check_space(files, root, manifest.step, needed);
}

void Checkpointer::Impl::ensure_pool(const std::vector<Slot>& slots) {
  int64_t largest = 0;
  bool for_gpu = false;
  for (const auto& slot : slots) {
    largest = std::max(largest, slot.bytes);
    for_gpu = for_gpu || slot.group >= 0;
    if (slot.group >= 0 && !streams[slot.group]) {
      streams[slot.group] = open_copy_stream(slot.group);
    }
  }
  const auto wanted = static_cast<int64_t>(slots.size());
  const bool fits = pool && pool->buffer_bytes() >= largest && (pool->for_gpu() || !for_gpu);
  if (fits && pool->count() >= wanted) return;
  // What the pool has now would be free without it.
  const auto budget = options.pool_bytes > 0 ? options.pool_bytes : host_memory_budget();
  const auto most = largest > 0 ? std::max(budget / largest, kLeastSlots) : 0;
  if (fits && (pool->count() >= most || options.pool_bytes == 0)) return;
  pool = nullptr;
  pool = std::make_shared<HostPool>(std::min(wanted, most), largest, for_gpu);
}

void Checkpointer::Impl::begin(std::shared_ptr<Ticket::State> state, Snapshot snapshot,
                               Manifest manifest, std::vector<size_t> levels) {
  auto slots = slots_of(snapshot, options.slot_bytes);
  writing([&] { ensure_pool(slots); });
  snapshot.materialize();
  state->capture = std::make_shared<Capture>(
      std::move(snapshot), std::move(slots), pool, streams,
      Capture::Settings{.overflow = options.overflow,
                        .spare_gpu_bytes = options.spare_gpu_bytes,
                        .timeout = std::chrono::duration<double>(options.timeout)});
  capturing = true;
  set_newest(state);
  thread = std::thread([this, state, manifest = std::move(manifest), levels = std::move(levels)] {
    work(state, manifest, levels);
    if (state->stage() == Ticket::Stage::kDurable) {
      hand_on(state, {levels.begin() + 1, levels.end()}, state->report().info.path,
              state->all_levels);
    }
    state->release();
  });
}

WriteRequest Checkpointer::Impl::request_for(Ticket::State& state, Manifest manifest,
                                             const Level& level) {
  WriteRequest request;
  request.root = level.path;
  request.sync = level.sync;
  request.direct = options.direct;
  request.writers = options.writers;
  request.manifest = std::move(manifest);
  request.on_phase = [&](const char* phase) {
    enter(phase);
    if (since(state.start) > options.timeout) {
      state.capture->fail("[checkpoint] given up: it took too long");
    }
  };
  request.may_publish = [&] { return state.may_publish(); };
  return request;
}

// The thread of a save, from its first byte to its retention.
void Checkpointer::Impl::work(const std::shared_ptr<Ticket::State>& shared, Manifest manifest,
                              const std::vector<size_t>& levels) {
  auto& state = *shared;
  const auto capture = state.capture;
  std::thread copier([&] {
    try {
      capture->run();
    } catch (const std::exception& error) {
      capture->fail(first_line(error.what()));
    }
    capturing = false;
    state.captured();
  });
  const auto fail = [&](Fault fault, const std::string& reason) {
    capture->fail(reason);
    copier.join();
    state.end(Ticket::Stage::kFailed, fault, reason);
  };
  try {
    const auto result = writing([&] {
      return write_step(*options.file_system, *options.vote,
                        request_for(state, std::move(manifest), options.levels[levels[0]]),
                        *capture);
    });
    copier.join();
    double stalled = 0;
    for (const auto& [device, stream] : streams) stalled += stream->stalled_seconds();
    state.durable(levels[0], info_of(result.manifest, result.path), result, stalled);
    state.pool(pool->count() * pool->buffer_bytes());
  } catch (const Error& error) {
    return fail(error.fault(), error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(Fault::kProblem, error.what());
  }
  auto late = std::exchange(warnings, {});
  try {
    enter("retention");
    retain(levels[0], shared, late);
    enter("done");
  } catch (const std::exception& error) {
    late.push_back(first_line(error.what()));
  }
  state.warn(late);
}

// The step just written is good; behind it nothing else is known to be.
void Checkpointer::Impl::retain(size_t index, const std::shared_ptr<Ticket::State>& state,
                                std::vector<std::string>& warnings) {
  const auto& level = options.levels[index];
  auto& files = *options.file_system;
  const RetentionRule rule{level.keep_last, level.keep_every, level.keep_best, level.best_count,
                           level.best_is_highest};
  auto victims = steps_to_remove(files, scan_root(files, level.path).steps, rule);
  std::erase_if(victims, [&](const auto& path) { return copies.uses(path); });
  const auto hidden = hide_steps(files, level.path, victims, warnings);
  if (hidden.empty()) return;
  removals.add(
      {.run = [this, state, hidden] { state->warn(remove_hidden(*options.file_system, hidden)); }});
}

// Fills the next level from the one before it, and so on.
void Checkpointer::Impl::hand_on(const std::shared_ptr<Ticket::State>& state,
                                 std::vector<size_t> levels, const std::string& folder, bool must) {
  if (levels.empty()) return;
  const auto index = levels.front();
  levels.erase(levels.begin());
  const auto& level = options.levels[index];
  const auto copy = [this, state, levels, folder, index, &level, must] {
    std::vector<std::string> late;
    try {
      late = copy_step(options.file_system, folder, level.path, level.sync, options.direct);
      state->durable(index);
      hand_on(state, levels, level.path + "/" + step_name(state->step), must);
      retain(index, state, late);
    } catch (const std::exception& error) {
      late.push_back(first_line(error.what()));
    }
    state->warn(late);
  };
  const auto left_out = [state, &level] {
    state->warn({"[checkpoint] step " + std::to_string(state->step) + " was not copied to '" +
                 level.path + "': a newer one came first"});
  };
  copies.add({.run = copy,
              .uses = folder,
              .key = must ? -1 : static_cast<int>(index),
              .left_out = left_out});
}

Checkpointer::Checkpointer(CheckpointerOptions options) : impl_(new Impl(std::move(options))) {}

Checkpointer::~Checkpointer() {
  // A forked child has neither the threads nor the right to the files.
  if (impl_ && ::getpid() != impl_->owner) impl_.release();
}

Ticket Checkpointer::save(int64_t step, const Objects& objects, const SaveOptions& options) {
  return impl_->save(step, objects, options);
}

SaveReport Checkpointer::save_and_wait(int64_t step, const Objects& objects,
                                       const SaveOptions& options) {
  return impl_->save(step, objects, options).wait();
}

bool Checkpointer::due(int64_t step) const { return !impl_->levels_of(step, false).empty(); }

void Checkpointer::before_mutation(at::TensorList bucket) {
  if (!impl_->capturing.load(std::memory_order_acquire)) return;
  const auto state = impl_->newest();
  const auto capture = state ? state->capturing() : nullptr;
  if (capture) state->blocked(bucket.empty() ? capture->gate() : capture->gate(bucket));
}

void Checkpointer::prepare(const Objects& objects) {
  const std::lock_guard lock(impl_->saves);
  const auto newest = impl_->newest();
  if (newest && !newest->ended()) return;
  const Snapshot snapshot(objects);
  writing([&] { impl_->ensure_pool(slots_of(snapshot, impl_->options.slot_bytes)); });
}

bool Checkpointer::drain(std::chrono::duration<double> timeout) {
  const auto until = deadline(timeout);
  const auto newest = impl_->newest();
  if (newest && !newest->wait_until(until)) return false;
  return impl_->copies.wait_idle(until) && impl_->removals.wait_idle(until);
}

}  // namespace ounce::ckpt
