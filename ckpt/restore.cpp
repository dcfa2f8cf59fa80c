// SPDX-License-Identifier: MIT
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/scan.h>
#include <torch/torch.h>

#include <algorithm>

namespace ounce::ckpt {
namespace {

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

struct Candidates {
  std::vector<StepEntry> steps;  // the best one first
  std::vector<std::string> rejected;
  std::string where;  // the roots, for messages
};

// The steps that `paths` mean: step folders, or what lies in roots. Of equal steps in several roots
// that of the first root comes first.
Candidates candidates_in(FileSystem& files, const std::vector<std::string>& paths,
                         std::optional<int64_t> step) {
  Candidates found;
  std::vector<int64_t> there;
  for (const auto& path : paths) {
    const auto root = root_of(files, path);
    found.where += (found.where.empty() ? "" : "', '") + root;
    if (is_step_folder(files, root)) {
      found.steps.push_back({root, read_manifest(files, root)});
      continue;
    }
    Scan scan;
    try {
      scan = scan_root(files, root);
    } catch (const StorageError& error) {
      if (error.kind() != StorageError::Kind::kMissing) throw;
    }
    for (auto& reason : rejected_in(scan, step)) found.rejected.push_back(std::move(reason));
    for (auto& entry : scan.steps) {
      there.push_back(entry.manifest.step);
      if (!step || there.back() == *step) found.steps.push_back(std::move(entry));
    }
  }
  if (step && found.steps.empty() && found.rejected.empty()) {
    fail(Fault::kNotFound, "[checkpoint] no step ", *step, " in '", found.where,
         "'; there: ", there.empty() ? "none" : c10::str(c10::Join(", ", there)));
  }
  std::stable_sort(found.steps.begin(), found.steps.end(), [](const auto& a, const auto& b) {
    return std::pair(a.manifest.sequence, a.manifest.step) >
           std::pair(b.manifest.sequence, b.manifest.step);
  });
  return found;
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
  return with_faults([&] {
    const auto found = candidates_in(files, {path}, step);
    if (found.steps.empty()) none_good(found.where, found.rejected);
    for (const auto& reason : found.rejected) TORCH_WARN("passed over: ", reason);
    return found.steps.front().path;
  });
}

LoadReport read_step(std::shared_ptr<FileSystem> files, const std::vector<std::string>& paths,
                     std::optional<int64_t> step, bool direct,
                     const std::function<void(const StepReader&)>& use) {
  for (bool again = false;; again = true) {
    auto found = candidates_in(*files, paths, step);
    bool changed = false;
    for (const auto& entry : found.steps) {
      try {
        use(StepReader(files, entry.path, entry.manifest, direct));
        return {.info = info_of(entry.manifest, entry.path), .rejected = std::move(found.rejected)};
      } catch (const StorageError& error) {
        // A writer replaced or removed it meanwhile: then there is a newer one.
        changed = !again && !stands(*files, entry);
        if (changed) break;
        found.rejected.push_back(error.what());
      }
    }
    if (!changed) none_good(found.where, found.rejected);
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

}  // namespace ounce::ckpt
