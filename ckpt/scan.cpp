// SPDX-License-Identifier: MIT
#include <errno.h>
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

Scan scan_once(FileSystem& files, const std::string& root, bool& vanished) {
  std::vector<std::string> names;
  if (const int error = files.list(root, names); error != 0) throw_io("list", root, error);
  Scan scan;
  for (const auto& name : names) {
    auto step = parse_step_name(name);
    if (step < 0) {
      // Its writer is, or died, between the two renames of a replacement.
      step = parse_replaced_name(name);
      if (step < 0 || std::binary_search(names.begin(), names.end(), step_name(step))) continue;
    }
    const auto path = root + "/" + name;
    FileInfo info;
    try {
      if (files.stat(path, info) == 0 && info.kind != FileKind::kDirectory) {
        scan.bad.push_back({path, step, "[checkpoint] '" + path + "' is no folder", false});
      } else {
        scan.steps.push_back({path, read_manifest(files, path)});
      }
    } catch (const StorageError& error) {
      if (error.kind() == StorageError::Kind::kMissing && files.stat(path, info) == ENOENT) {
        vanished = true;
        continue;
      }
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
  const auto named = std::max(parse_step_name(name), parse_replaced_name(name));
  if (named >= 0 && named != manifest.step) {
    throw StorageError(StorageError::Kind::kDamaged,
                       "[checkpoint] '" + folder + "' holds step " + std::to_string(manifest.step));
  }
  return manifest;
}

Scan scan_root(FileSystem& files, const std::string& root) {
  bool vanished = false;
  auto scan = scan_once(files, root, vanished);
  // Retention has just taken a step away, so a newer one than those listed is there.
  if (vanished) scan = scan_once(files, root, vanished);
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
