// SPDX-License-Identifier: MIT
#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/commit.h>
#include <ounce/ckpt/lock.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/retention.h>
#include <ounce/ckpt/scan.h>
#include <ounce/ckpt/snapshot.h>

#include <chrono>

namespace ounce::ckpt {
namespace {

void check_texts(const std::map<std::string, std::string>& notes,
                 const std::map<std::string, double>& metrics) {
  const auto check = [](const std::string& name) {
    const auto problem = name_problem(name);
    OUNCE_CHECK(problem.empty(), "[checkpoint] the name of a note or metric '", name, "' ",
                problem);
  };
  for (const auto& [name, text] : notes) check(name);
  for (const auto& [name, value] : metrics) check(name);
}

// Where something is to be written, its absence is a failed call and no search without a result.
template <class Action>
auto writing(const Action& action) -> decltype(action()) {
  return with_faults([&] {
    try {
      return action();
    } catch (const StorageError& error) {
      if (error.kind() != StorageError::Kind::kMissing) throw;
      throw StorageError(StorageError::Kind::kIo, error.what());
    }
  });
}

}  // namespace

struct Checkpointer::Impl {
  CheckpointerOptions options;
  std::unique_ptr<RootLock> lock;
  std::vector<std::string> warnings;  // of the sweep, until the next save reports them

  void open() {
    auto& level = options.levels.at(0);
    auto& root = level.path;
    OUNCE_CHECK(!root.empty() && root.find('\0') == std::string::npos,
                "[checkpoint] expected a folder, got '", root, "'");
    OUNCE_CHECK(level.keep_last >= 0 && level.keep_every >= 0,
                "[checkpoint] expected keep_last and keep_every of at least 0, got ",
                level.keep_last, " and ", level.keep_every);
    while (root.size() > 1 && root.back() == '/') root.pop_back();
    if (!options.file_system) options.file_system = posix_file_system();
    make_directories(*options.file_system, root);
    lock = std::make_unique<RootLock>(root);
    warnings = sweep(*options.file_system, root);
  }

  void enter(const char* phase) const {
    if (options.on_phase) options.on_phase(phase);
  }

  // The writer reads one tensor at a time; `held` keeps the one it is reading.
  CommitRequest request(const Snapshot& snapshot, at::Tensor& held) const {
    CommitRequest request;
    request.root = options.levels[0].path;
    request.manifest.uuid = random_id();
    request.manifest.tensors = snapshot.tensors();
    request.manifest.scalars = snapshot.scalars();
    request.bytes_of = [&snapshot, &held](size_t index) -> const void* {
      held = at::Tensor();
      held = snapshot.host(index);
      return held.const_data_ptr();
    };
    request.on_phase = options.on_phase;
    return request;
  }

  SaveReport save(int64_t step, const Objects& objects, const SaveOptions& with) {
    const auto& [notes, metrics, all] = with;
    const auto start = std::chrono::steady_clock::now();
    OUNCE_CHECK(step >= 0 && step <= kMostStep, "[checkpoint] expected a step of 0 to ", kMostStep,
                ", got ", step);
    check_texts(notes, metrics);
    const Snapshot snapshot(objects);
    at::Tensor held;
    auto request = this->request(snapshot, held);
    request.manifest.step = step;
    request.manifest.notes = notes;
    request.manifest.metrics = metrics;
    auto& files = *options.file_system;
    auto steps = scan_root(files, options.levels[0].path).steps;
    if (!steps.empty()) request.manifest.sequence = steps.front().manifest.sequence + 1;
    auto result = commit_step(files, std::move(request));
    SaveReport report;
    report.info = info_of(result.manifest, result.path);
    report.bytes = report.info.bytes;
    report.warnings = std::exchange(warnings, {});
    report.warnings.insert(report.warnings.end(), result.warnings.begin(), result.warnings.end());
    enter("retention");
    // Behind the step just written: nothing else is known to be good.
    std::erase_if(steps, [&](const auto& entry) { return entry.manifest.step == step; });
    steps.insert(steps.begin(), {std::move(result.path), std::move(result.manifest)});
    const auto& level = options.levels[0];
    const RetentionRule rule{level.keep_last, level.keep_every, level.keep_best};
    const auto removed = remove_steps(files, level.path, steps_to_remove(files, steps, rule));
    report.warnings.insert(report.warnings.end(), removed.begin(), removed.end());
    enter("done");
    report.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return report;
  }
};

Checkpointer::Checkpointer(CheckpointerOptions options) : impl_(new Impl) {
  impl_->options = std::move(options);
  writing([&] { impl_->open(); });
}

Checkpointer::~Checkpointer() = default;

SaveReport Checkpointer::save_and_wait(int64_t step, const Objects& objects,
                                       const SaveOptions& options) {
  return writing([&] { return impl_->save(step, objects, options); });
}

}  // namespace ounce::ckpt
