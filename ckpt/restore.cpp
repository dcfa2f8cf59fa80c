// SPDX-License-Identifier: MIT
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/scan.h>
#include <torch/torch.h>

#include <map>
#include <set>

namespace ounce::ckpt {
namespace {

// Up to this size a step is held on the host between verifying and copying; a larger one is
// verified first and then read again, verified again.
constexpr int64_t kMostStagedBytes = int64_t{4} << 30;

std::string shape_text(const std::vector<int64_t>& shape, const std::string& dtype) {
  return c10::str(dtype, "[", c10::Join(", ", shape), "]");
}

const char* kind_of(const Scalar& scalar) {
  return scalar.index() == 0 ? "integer" : scalar.index() == 1 ? "number" : "text";
}

// Throws kUsage with everything that differs between what is stored and what is wanted.
void check_matches(const StepReader& reader, const Snapshot& wanted) {
  std::vector<std::string> missing, unexpected, wrong;
  std::set<std::string> names;
  const auto& manifest = reader.manifest();
  for (const auto& tensor : wanted.tensors()) {
    names.insert(tensor.name);
    const auto* stored = reader.find(tensor.name);
    if (stored == nullptr) {
      missing.push_back(tensor.name);
    } else if (stored->shape != tensor.shape || stored->dtype != tensor.dtype) {
      wrong.push_back(tensor.name + " (expected " + shape_text(tensor.shape, tensor.dtype) +
                      ", got " + shape_text(stored->shape, stored->dtype) + ")");
    }
  }
  for (const auto& [name, scalar] : wanted.scalars()) {
    names.insert(name);
    const auto stored = manifest.scalars.find(name);
    if (stored == manifest.scalars.end()) {
      missing.push_back(name);
    } else if (stored->second.index() != scalar.index()) {
      wrong.push_back(name + " (expected " + kind_of(scalar) + ", got " + kind_of(stored->second) +
                      ")");
    }
  }
  for (const auto& tensor : manifest.tensors) {
    if (!names.contains(tensor.name)) unexpected.push_back(tensor.name);
  }
  for (const auto& [name, scalar] : manifest.scalars) {
    if (!names.contains(name)) unexpected.push_back(name);
  }
  if (missing.empty() && unexpected.empty() && wrong.empty()) return;
  std::string text;
  const auto add = [&](const char* what, const std::vector<std::string>& items) {
    if (items.empty()) return;
    text +=
        c10::str(text.empty() ? "" : "; ", items.size(), " ", what, ": ", c10::Join(", ", items));
  };
  add("missing in the checkpoint", missing);
  add("unexpected", unexpected);
  add("of another shape or type", wrong);
  fail(Fault::kUsage, "[checkpoint] '", reader.folder(),
       "' is of another model or configuration: ", text, "; nothing was loaded");
}

class Loader : public StateVisitor {
 public:
  Loader(const StepReader& reader, const std::map<std::string, at::Tensor>& staged)
      : reader_(reader), staged_(staged) {}

  void tensor(std::string_view name, at::Tensor& value, StateClass) override {
    const auto full = full_name(name);
    const auto* record = reader_.find(full);
    OUNCE_CHECK(record != nullptr, "[checkpoint] '", full,
                "' is presented when loading, but was not before");
    const auto found = staged_.find(full);
    value.copy_(found == staged_.end() ? read_tensor(reader_, *record) : found->second);
  }
  void integer(std::string_view name, int64_t& value) override { value = scalar<int64_t>(name); }
  void number(std::string_view name, double& value) override { value = scalar<double>(name); }
  void text(std::string_view name, std::string& value) override {
    value = scalar<std::string>(name);
  }
  bool loading() const override { return true; }

 private:
  template <class T>
  T scalar(std::string_view name) const {
    const auto full = full_name(name);
    const auto found = reader_.manifest().scalars.find(full);
    OUNCE_CHECK(
        found != reader_.manifest().scalars.end() && std::holds_alternative<T>(found->second),
        "[checkpoint] '", full, "' is presented when loading, but was not before");
    return std::get<T>(found->second);
  }

  const StepReader& reader_;
  const std::map<std::string, at::Tensor>& staged_;
};

// First every byte is verified, then the first value is changed. Throws StorageError on damage and
// ounce::Error on a mismatch, both with nothing changed.
void load_step(const StepReader& reader, const Objects& objects) {
  const torch::NoGradGuard guard;
  check_matches(reader, Snapshot(objects));
  int64_t total = 0;
  for (const auto& tensor : reader.manifest().tensors) total += reader.holder(tensor).bytes;
  std::map<std::string, at::Tensor> staged;
  for (const auto& tensor : reader.manifest().tensors) {
    if (total <= kMostStagedBytes) {
      staged.emplace(tensor.name, read_tensor(reader, tensor));
    } else {
      reader.check(tensor);
    }
  }
  Loader loader(reader, staged);
  for (const auto& [prefix, object] : objects) {
    std::optional<StateVisitor::Scope> scope;
    if (!prefix.empty()) scope.emplace(loader, prefix);
    object->visit_state(loader);
  }
}

[[noreturn]] void none_good(const std::string& root, const std::vector<std::string>& rejected) {
  fail(
      rejected.empty() ? Fault::kNotFound : Fault::kData,
      rejected.empty() ? "[checkpoint] no checkpoint in '" : "[checkpoint] no good checkpoint in '",
      root, "'", rejected.empty() ? "; train first, or name another folder" : "; rejected: ",
      c10::Join(", ", rejected));
}

Scan scan_existing(FileSystem& files, const std::string& root) {
  try {
    return scan_root(files, root);
  } catch (const StorageError& error) {
    if (error.kind() != StorageError::Kind::kMissing) throw;
    none_good(root, {});
  }
}

// Why the steps of a scan whose manifest does not hold, or only `step`, cannot be read. Throws for
// a later version's: nobody here can tell how new it is, and going back behind it would lose work,
// so the user decides.
std::vector<std::string> rejected_in(const Scan& scan, std::optional<int64_t> step = std::nullopt) {
  std::vector<std::string> rejected;
  for (const auto& bad : scan.bad) {
    if (step && bad.step != *step) continue;
    if (bad.newer_format) fail(Fault::kNewerFormat, bad.problem);
    rejected.push_back(bad.problem);
  }
  return rejected;
}

// Whether a step of a scan is still what it was then.
bool stands(FileSystem& files, const StepEntry& entry) {
  try {
    return read_manifest(files, entry.path).uuid == entry.manifest.uuid;
  } catch (const StorageError&) {
    return false;
  }
}

}  // namespace

void rethrow(const StorageError& error) {
  using Kind = StorageError::Kind;
  const auto kind = error.kind();
  throw Error(kind == Kind::kNewerFormat ? Fault::kNewerFormat
              : kind == Kind::kMissing   ? Fault::kNotFound
              : kind == Kind::kBusy      ? Fault::kProblem
              : kind == Kind::kUsage     ? Fault::kUsage
                                         : Fault::kData,
              error.what());
}

CheckpointInfo info_of(const Manifest& manifest, const std::string& path) {
  CheckpointInfo info;
  info.step = manifest.step;
  info.uuid = manifest.uuid;
  info.path = path;
  info.metrics = manifest.metrics;
  info.notes = manifest.notes;
  for (const auto& file : manifest.files) info.bytes += file.size;
  return info;
}

at::Tensor read_tensor(const StepReader& reader, const TensorRecord& tensor) {
  auto value = at::empty(tensor.shape, at::dtype(dtype_of_name(tensor.dtype)));
  reader.read(tensor, value.data_ptr());
  return value;
}

std::string resolve_step(FileSystem& files, const std::string& path, std::optional<int64_t> step) {
  return with_faults([&]() -> std::string {
    const auto root = root_of(files, path);
    if (is_step_folder(files, root)) return root;
    const auto scan = scan_existing(files, root);
    const auto rejected = rejected_in(scan, step);
    std::vector<int64_t> there;
    for (const auto& entry : scan.steps) {
      there.push_back(entry.manifest.step);
      if (step && there.back() != *step) continue;
      for (const auto& reason : rejected) TORCH_WARN("passed over: ", reason);
      return entry.path;
    }
    if (step && rejected.empty()) {
      fail(Fault::kNotFound, "[checkpoint] no step ", *step, " in '", root,
           "'; there: ", there.empty() ? "none" : c10::str(c10::Join(", ", there)));
    }
    none_good(root, rejected);
  });
}

LoadReport read_step(std::shared_ptr<FileSystem> files, const std::string& path,
                     std::optional<int64_t> step,
                     const std::function<void(const StepReader&)>& use) {
  const auto read = [&](const std::string& folder, const Manifest& manifest) {
    use(StepReader(files, folder, manifest));
    return info_of(manifest, folder);
  };
  const auto root = root_of(*files, path);
  if (step || is_step_folder(*files, root)) {
    const auto folder = resolve_step(*files, root, step);
    return {.info = read(folder, read_manifest(*files, folder))};
  }
  for (bool again = false;; again = true) {
    const auto scan = scan_existing(*files, root);
    auto rejected = rejected_in(scan);
    bool changed = false;
    for (const auto& entry : scan.steps) {
      try {
        auto info = read(entry.path, entry.manifest);
        return {.info = std::move(info), .rejected = std::move(rejected)};
      } catch (const StorageError& error) {
        // A writer replaced or removed it meanwhile: then there is a newer one.
        changed = !again && !stands(*files, entry);
        if (changed) break;
        rejected.push_back(error.what());
      }
    }
    if (!changed) none_good(root, rejected);
  }
}

std::vector<CheckpointInfo> list_checkpoints(const std::string& root,
                                             std::vector<std::string>* problems) {
  return with_faults([&] {
    auto files = posix_file_system();
    const auto scan = scan_existing(*files, root_of(*files, root));
    const auto rejected = rejected_in(scan);
    if (problems != nullptr) problems->insert(problems->end(), rejected.begin(), rejected.end());
    std::vector<CheckpointInfo> list;
    for (const auto& entry : scan.steps) list.push_back(info_of(entry.manifest, entry.path));
    return list;
  });
}

LoadReport load_checkpoint(const std::string& path, std::optional<int64_t> step,
                           const Objects& objects) {
  return load_checkpoint({path}, objects, {.step = step});
}

LoadReport load_checkpoint(const std::vector<std::string>& paths, const Objects& objects,
                           const LoadOptions& options) {
  return with_faults([&] {
    return read_step(options.file_system ? options.file_system : posix_file_system(), paths.at(0),
                     options.step, [&](const StepReader& reader) { load_step(reader, objects); });
  });
}

}  // namespace ounce::ckpt
