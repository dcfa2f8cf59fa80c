// SPDX-License-Identifier: MIT
#include <ounce/ckpt/scan.h>
#include <ounce/ckpt/storage_error.h>

#include <algorithm>

namespace ounce::ckpt {
namespace {

std::string last_component(const std::string& path) {
  const auto slash = path.find_last_of('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

bool is_folder(FileSystem& files, const std::string& path) {
  FileInfo info;
  return files.stat(path, info) == 0 && info.kind == FileKind::kDirectory;
}

}  // namespace

Manifest read_manifest(FileSystem& files, const std::string& folder) {
  const auto path = folder + "/" + kManifestName;
  Manifest manifest;
  try {
    manifest = parse_manifest(read_file(files, path, kMostManifestBytes));
  } catch (const StorageError& error) {
    const std::string text = error.what();
    if (text.find(path) != std::string::npos) throw;
    throw StorageError(error.kind(), text + " ('" + path + "')");
  }
  const auto name = last_component(folder);
  if (parse_step_name(name) >= 0 && name != step_name(manifest.step)) {
    throw StorageError(StorageError::Kind::kDamaged,
                       "[checkpoint] '" + folder + "' holds step " + std::to_string(manifest.step));
  }
  return manifest;
}

Scan scan_root(FileSystem& files, const std::string& root) {
  std::vector<std::string> names;
  if (const int error = files.list(root, names); error != 0) throw_io("list", root, error);
  Scan scan;
  for (const auto& name : names) {
    const auto step = parse_step_name(name);
    if (step < 0) continue;
    const auto path = root + "/" + name;
    if (!is_folder(files, path)) {
      scan.bad.push_back({path, step, "'" + path + "' is no folder", false});
      continue;
    }
    try {
      scan.steps.push_back({path, read_manifest(files, path)});
    } catch (const StorageError& error) {
      // A folder that retention has just taken away is no fault.
      if (error.kind() == StorageError::Kind::kMissing && !is_folder(files, path)) continue;
      scan.bad.push_back(
          {path, step, error.what(), error.kind() == StorageError::Kind::kNewerFormat});
    }
  }
  std::stable_sort(scan.steps.begin(), scan.steps.end(), [](const auto& a, const auto& b) {
    return std::pair(a.manifest.sequence, a.manifest.step) >
           std::pair(b.manifest.sequence, b.manifest.step);
  });
  std::stable_sort(scan.bad.begin(), scan.bad.end(),
                   [](const auto& a, const auto& b) { return a.step > b.step; });
  return scan;
}

std::string root_of(FileSystem& files, const std::string& path) {
  auto root = path;
  while (root.size() > 1 && root.back() == '/') root.pop_back();
  if (root.empty()) root = ".";
  std::vector<std::string> names;
  if (is_step_folder(files, root) || files.list(root, names) != 0) return root;
  const bool has_steps = std::any_of(names.begin(), names.end(),
                                     [](const auto& name) { return parse_step_name(name) >= 0; });
  const auto inner = root + "/ckpt";
  return !has_steps && is_folder(files, inner) ? inner : root;
}

bool is_step_folder(FileSystem& files, const std::string& path) {
  FileInfo info;
  return files.stat(path + "/" + kManifestName, info) == 0;
}

}  // namespace ounce::ckpt
