// SPDX-License-Identifier: MIT
#include <errno.h>
#include <ounce/ckpt/commit.h>
#include <ounce/ckpt/retention.h>
#include <ounce/ckpt/storage_error.h>

#include <cstring>

namespace ounce::ckpt {

Commit::Commit(FileSystem& files, const std::string& root, int64_t step, const std::string& uuid,
               SyncPolicy sync)
    : files_(files),
      root_(root),
      step_(step),
      uuid_(uuid),
      sync_(sync),
      temporary_(root + "/" + kTemporaryPrefix + step_name(step) + "-" + uuid),
      final_(root + "/" + step_name(step)) {
  if (const int error = files_.make_directory(temporary_); error != 0) {
    throw_io("make the folder", temporary_, error);
  }
}

Commit::~Commit() {
  if (!published_) remove_tree(files_, temporary_);
}

void Commit::write_manifest(const std::string& text) {
  if (static_cast<int64_t>(text.size()) > kMostManifestBytes) {
    throw StorageError(StorageError::Kind::kUsage,
                       "[checkpoint] the manifest of step " + std::to_string(step_) + " takes " +
                           std::to_string(text.size()) +
                           " bytes, more than 256 MiB; store less text in notes and scalars");
  }
  // What no reader would accept must not be announced.
  parse_manifest(text);
  write_file_durably(files_, temporary_, kManifestName, text, sync_);
}

void Commit::publish() {
  FileInfo info;
  const bool replaces = files_.stat(final_, info) == 0;
  std::string displaced;
  if (replaces) {
    keep_pin();
    displaced = replace();
  } else if (const int error = files_.rename(temporary_, final_); error != 0) {
    throw_io("rename to", final_, error);
  }
  published_ = true;
  if (const int error = sync_ == SyncPolicy::kFull ? files_.sync_directory(root_) : 0; error != 0) {
    throw_io("sync the folder", root_, error);
  }
  if (!replaces) return;
  warnings_.push_back("[checkpoint] replaced the step that stood at '" + final_ + "'");
  // As trash: half removed, it must never be taken for the step it was.
  const auto trash = root_ + "/" + kTrashPrefix + step_name(step_) + "-" + uuid_;
  int error = files_.rename(displaced, trash);
  if (error == 0) error = remove_tree(files_, trash);
  if (error != 0) {
    warnings_.push_back("[checkpoint] cannot remove what was replaced, '" + displaced +
                        "': " + std::strerror(error));
  }
}

// A step that is written again stays pinned.
void Commit::keep_pin() {
  FileInfo info;
  if (files_.stat(final_ + "/" + kPinName, info) == ENOENT) return;
  write_file_durably(files_, temporary_, kPinName, "", sync_);
}

// Returns where the old step now is.
std::string Commit::replace() {
  const int error = files_.exchange(temporary_, final_);
  if (error == 0) return temporary_;
  if (error != EINVAL && error != ENOSYS) throw_io("replace", final_, error);
  // Two renames: sweep() puts the old one back when the process dies between them.
  const auto aside = root_ + "/" + kReplacedPrefix + step_name(step_) + "-" + uuid_;
  if (const int moved = files_.rename(final_, aside); moved != 0) {
    throw_io("rename", final_, moved);
  }
  if (const int moved = files_.rename(temporary_, final_); moved != 0) {
    files_.rename(aside, final_);
    throw_io("rename to", final_, moved);
  }
  return aside;
}

// For people and their scripts; loading scans instead.
void Commit::write_hint() {
  try {
    write_file_durably(files_, root_, "LATEST", step_name(step_) + "\n", sync_);
  } catch (const StorageError& error) {
    warnings_.push_back(error.what());
  }
}

bool is_full(const StorageError& error) {
  return error.code() == ENOSPC || error.code() == EDQUOT || error.code() == EFBIG;
}

void throw_full(FileSystem& files, const std::string& root, int64_t step, int64_t needed,
                int reason) {
  int64_t free = 0;
  const bool known = files.free_bytes(root, free) == 0;
  throw StorageError(StorageError::Kind::kIo,
                     "[checkpoint] no room for step " + std::to_string(step) + " in '" + root +
                         "' (" + std::strerror(reason) + "): needs " + std::to_string(needed) +
                         " bytes, " + (known ? std::to_string(free) : "an unknown number of") +
                         " bytes free; free some space or keep fewer steps",
                     reason);
}

void check_space(FileSystem& files, const std::string& root, int64_t step, int64_t needed) {
  int64_t free = 0;
  if (files.free_bytes(root, free) == 0 && free < needed) {
    throw_full(files, root, step, needed, ENOSPC);
  }
}

std::vector<std::string> sweep(FileSystem& files, const std::string& root) {
  std::vector<std::string> names, warnings;
  if (const int error = files.list(root, names); error != 0) throw_io("list", root, error);
  for (const auto& name : names) {
    const auto path = root + "/" + name;
    int error = 0;
    if (name.starts_with(kReplacedPrefix)) {
      const auto step = parse_replaced_name(name);
      const auto stood = root + "/" + step_name(step);
      FileInfo info;
      const bool lost = step >= 0 && files.stat(stood, info) == ENOENT;
      error = lost ? files.rename(path, stood) : remove_tree(files, path);
    } else if (name.starts_with(kTemporaryPrefix) || name.starts_with(kTrashPrefix)) {
      error = remove_tree(files, path);
    }
    if (error != 0) {
      warnings.push_back("[checkpoint] cannot clear '" + path + "': " + std::strerror(error));
    }
  }
  return warnings;
}

}  // namespace ounce::ckpt
