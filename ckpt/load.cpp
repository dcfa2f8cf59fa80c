// SPDX-License-Identifier: MIT
// load_checkpoint(): the values of a step into the objects.
#include <ounce/ckpt/copy_stream.h>
#include <ounce/ckpt/host_pool.h>
#include <ounce/ckpt/restore.h>
#include <ounce/core/glob.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <thread>

namespace ounce::ckpt {
namespace {

constexpr int64_t kReadBytes = int64_t{16} << 20;

std::string shape_text(const std::vector<int64_t>& shape, const std::string& dtype) {
  return c10::str(dtype, "[", c10::Join(", ", shape), "]");
}

const char* kind_of(const Scalar& scalar) {
  return scalar.index() == 0 ? "integer" : scalar.index() == 1 ? "number" : "text";
}

// What is to be loaded of a step, and where to.
class Plan {
 public:
  Plan(const StepReader& reader, const Objects& objects, const LoadOptions& options)
      : reader_(reader), options_(options), wanted_(objects) {
    compare();
    const auto& tensors = wanted_.tensors();
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (good_.contains(tensors[i].name)) add(tensors[i], wanted_.tensor(i));
    }
  }

  // Throws kUsage with everything that differs, or notes it in the report.
  void refuse_or_report(LoadReport& report) const {
    report.missing = missing_;
    report.unexpected = unexpected_;
    report.mismatched = mismatched_;
    if (!options_.strict || (missing_.empty() && unexpected_.empty() && mismatched_.empty()))
      return;
    std::string text;
    const auto list = [&](const char* what, const std::vector<std::string>& items) {
      if (items.empty()) return;
      text +=
          c10::str(text.empty() ? "" : "; ", items.size(), " ", what, ": ", c10::Join(", ", items));
    };
    list("missing in the checkpoint", missing_);
    list("unexpected", unexpected_);
    list("of another shape or type", mismatched_);
    fail(Fault::kUsage, "[checkpoint] '", reader_.folder(),
         "' is of another model or configuration: ", text, "; nothing was loaded");
  }

  bool loads(const std::string& name) const { return good_.contains(name); }
  // Indices of the stored tensors that hold the bytes, and the tensors that take each one's.
  const std::map<size_t, std::vector<at::Tensor>>& targets() const { return targets_; }
  // Where the value of `name` is once everything has been read.
  const at::Tensor& target(const std::string& name) const { return by_name_.at(name); }

 private:
  bool chosen(const std::string& name) const {
    const auto any = [&](const std::vector<std::string>& globs) {
      return std::any_of(globs.begin(), globs.end(),
                         [&](const auto& glob) { return glob_matches(glob, name); });
    };
    return any(options_.include) && !any(options_.exclude);
  }

  void compare() {
    std::set<std::string> names;
    const auto& manifest = reader_.manifest();
    for (const auto& tensor : wanted_.tensors()) {
      if (!names.insert(tensor.name).second || !chosen(tensor.name)) continue;
      const auto* stored = reader_.find(tensor.name);
      if (stored == nullptr) {
        missing_.push_back(tensor.name);
      } else if (stored->shape != tensor.shape || stored->dtype != tensor.dtype) {
        mismatched_.push_back(tensor.name + " (expected " + shape_text(tensor.shape, tensor.dtype) +
                              ", got " + shape_text(stored->shape, stored->dtype) + ")");
      } else {
        good_.insert(tensor.name);
      }
    }
    for (const auto& [name, scalar] : wanted_.scalars()) {
      if (!names.insert(name).second || !chosen(name)) continue;
      const auto stored = manifest.scalars.find(name);
      if (stored == manifest.scalars.end()) {
        missing_.push_back(name);
      } else if (stored->second.index() != scalar.index()) {
        mismatched_.push_back(name + " (expected " + kind_of(scalar) + ", got " +
                              kind_of(stored->second) + ")");
      } else {
        good_.insert(name);
      }
    }
    const auto note_unexpected = [&](const std::string& name) {
      if (!names.contains(name) && chosen(name)) unexpected_.push_back(name);
    };
    for (const auto& tensor : manifest.tensors) note_unexpected(tensor.name);
    for (const auto& [name, scalar] : manifest.scalars) note_unexpected(name);
  }

  // Bytes go straight into what is contiguous and stays the same object; the rest, and host state,
  // which may be presented anew each time, takes them when it is presented.
  void add(const TensorRecord& record, at::Tensor value) {
    const bool straight = record.state_class != "host" && value.is_contiguous() &&
                          !value.is_conj() && !value.is_neg();
    if (!straight) value = at::empty(record.shape, at::dtype(value.dtype()));
    by_name_[record.name] = value;
    const auto& holder = reader_.holder(*reader_.find(record.name));
    const auto index = static_cast<size_t>(&holder - reader_.manifest().tensors.data());
    auto& targets = targets_[index];
    const bool there = std::any_of(targets.begin(), targets.end(), [&](const auto& other) {
      return other.const_data_ptr() == value.const_data_ptr();
    });
    if (!there) targets.push_back(value);
  }

  const StepReader& reader_;
  const LoadOptions& options_;
  const Snapshot wanted_;
  std::set<std::string> good_;
  std::vector<std::string> missing_, unexpected_, mismatched_;
  std::map<size_t, std::vector<at::Tensor>> targets_;
  std::map<std::string, at::Tensor> by_name_;
};

// Reads slots in threads, verifies them, and hands their bytes to the tensors.
class Reading {
 public:
  Reading(const StepReader& reader, const LoadOptions& options, const Plan* plan)
      : reader_(reader), options_(options), plan_(plan) {
    std::vector<size_t> tensors;
    for (size_t i = 0; i < reader.manifest().tensors.size(); ++i) {
      const bool read = plan == nullptr || plan->targets().contains(i);
      if (read && reader.manifest().tensors[i].tied_to.empty()) tensors.push_back(i);
    }
    slots_ = reader.slots_of(tensors, kReadBytes);
    int64_t largest = 0;
    for (const auto& slot : slots_) {
      bytes_ += slot.bytes;
      largest = std::max(largest, slot.bytes);
    }
    if (plan != nullptr) open_streams();
    staged_ = plan != nullptr && bytes_ <= options.staged_bytes;
    const auto slots = static_cast<int64_t>(slots_.size());
    threads_ = std::min(options.readers, slots);
    pool_ = std::make_unique<HostPool>(staged_ ? slots : threads_, largest,
                                       !staged_ && !streams_.empty());
  }

  int64_t bytes() const { return bytes_; }

  void run() {
    for (const auto& [device, stream] : streams_) stream->follow_compute();
    std::vector<char*> filled(slots_.size());
    in_threads([&](size_t slot, char*& buffer) {
      while (buffer == nullptr && (buffer = pool_->take()) == nullptr) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      reader_.read(slots_[slot], buffer, options_.verify != Verify::kNone);
      if (staged_) {
        filled[slot] = std::exchange(buffer, nullptr);
      } else if (plan_ != nullptr) {
        changed_ = true;
        deliver(slots_[slot], buffer);
      }
    });
    if (!staged_) return;
    in_threads([&](size_t slot, char*&) { deliver(slots_[slot], filled[slot]); });
  }

  // Whether a tensor may have been changed.
  bool changed() const { return changed_; }

 private:
  void open_streams() {
    for (const auto& [index, targets] : plan_->targets()) {
      for (const auto& target : targets) {
        if (target.is_cpu()) continue;
        auto& stream = streams_[static_cast<int>(target.get_device())];
        if (!stream) stream = open_copy_stream(static_cast<int>(target.get_device()));
      }
    }
  }

  void deliver(const Slot& slot, const char* memory) {
    std::map<int, std::vector<Copy>> copies;
    for (const auto& piece : slot.pieces) {
      for (const auto& target : plan_->targets().at(piece.tensor)) {
        auto* to = static_cast<char*>(target.data_ptr()) + piece.begin;
        const Copy copy{to, memory + piece.at, static_cast<size_t>(piece.bytes)};
        if (target.is_cpu()) {
          std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
          copies[static_cast<int>(target.get_device())].push_back(copy);
        }
      }
    }
    for (const auto& [device, batch] : copies) {
      streams_.at(device)->copy(batch)->wait();
    }
  }

  // Calls `body` for every slot, in threads that each keep a buffer. The first error ends it.
  template <class Body>
  void in_threads(const Body& body) {
    std::atomic<size_t> next{0};
    std::mutex mutex;
    std::exception_ptr error;
    const auto work = [&] {
      char* buffer = nullptr;
      try {
        for (size_t slot; (slot = next++) < slots_.size();) body(slot, buffer);
      } catch (...) {
        next = slots_.size();
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
      if (buffer != nullptr) pool_->give(buffer);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads_; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
  }

  const StepReader& reader_;
  const LoadOptions& options_;
  const Plan* const plan_;  // null: only verifies
  std::vector<Slot> slots_;
  int64_t bytes_ = 0, threads_ = 0;
  bool staged_ = false;
  std::atomic<bool> changed_{false};
  std::map<int, std::unique_ptr<CopyStream>> streams_;
  std::unique_ptr<HostPool> pool_;
};

// Presents what was read to the objects.
class Loader : public StateVisitor {
 public:
  Loader(const StepReader& reader, const Plan& plan) : reader_(reader), plan_(plan) {}

  void tensor(std::string_view name, at::Tensor& value, StateClass) override {
    const auto full = full_name(name);
    if (!plan_.loads(full)) return;
    const auto& source = plan_.target(full);
    if (value.const_data_ptr() != source.const_data_ptr() || value.numel() == 0) {
      value.copy_(source);
    } else {
      // Written past autograd, which has to know all the same.
      value.unsafeGetTensorImpl()->bump_version();
    }
  }
  void integer(std::string_view name, int64_t& value) override { scalar(name, value); }
  void number(std::string_view name, double& value) override { scalar(name, value); }
  void text(std::string_view name, std::string& value) override { scalar(name, value); }
  bool loading() const override { return true; }

 private:
  template <class T>
  void scalar(std::string_view name, T& value) const {
    const auto full = full_name(name);
    if (plan_.loads(full)) value = std::get<T>(reader_.manifest().scalars.at(full));
  }

  const StepReader& reader_;
  const Plan& plan_;
};

// Throws StorageError on damage and ounce::Error on a mismatch; `changed` says whether values may
// have been changed by then.
int64_t load_step(const StepReader& reader, const Objects& objects, const LoadOptions& options,
                  LoadReport& report, bool& changed) {
  const torch::NoGradGuard guard;
  const Plan plan(reader, objects, options);
  plan.refuse_or_report(report);
  if (options.verify == Verify::kFull) Reading(reader, options, nullptr).run();
  Reading reading(reader, options, &plan);
  try {
    reading.run();
  } catch (...) {
    changed = changed || reading.changed();
    throw;
  }
  changed = true;
  Loader loader(reader, plan);
  for (const auto& [prefix, object] : objects) {
    std::optional<StateVisitor::Scope> scope;
    if (!prefix.empty()) scope.emplace(loader, prefix);
    object->visit_state(loader);
  }
  return reading.bytes();
}

}  // namespace

LoadReport load_checkpoint(const std::vector<std::string>& paths, const Objects& objects,
                           const LoadOptions& options) {
  OUNCE_CHECK(!paths.empty() && options.readers >= 1,
              "[checkpoint] expected a path and at least one reader, got ", paths.size(), " and ",
              options.readers);
  const auto start = std::chrono::steady_clock::now();
  const auto files = options.file_system ? options.file_system : posix_file_system();
  LoadReport found;
  bool changed = false;
  try {
    auto report = with_faults([&] {
      return read_step(files, paths, options.step, options.direct, [&](const StepReader& reader) {
        found.bytes = load_step(reader, objects, options, found, changed);
      });
    });
    found.info = std::move(report.info);
    found.rejected = std::move(report.rejected);
  } catch (const Error& error) {
    if (!changed) throw;
    fail(error.fault(), error.what_without_backtrace(),
         "; values were changed before the damage showed: do not go on with these objects");
  }
  found.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return found;
}

LoadReport load_checkpoint(const std::string& path, std::optional<int64_t> step,
                           const Objects& objects) {
  return load_checkpoint({path}, objects, {.step = step});
}

}  // namespace ounce::ckpt
