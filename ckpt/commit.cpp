// SPDX-License-Identifier: MIT
#include <errno.h>
#include <ounce/ckpt/commit.h>
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/reader.h>
#include <ounce/ckpt/storage_error.h>
#include <ounce/ckpt/sums.h>

#include <algorithm>
#include <cstring>

namespace ounce::ckpt {
namespace {

constexpr const char* kDataName = "rank00000.h5";

bool is_full(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

int64_t whole_pages(int64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

class Commit {
 public:
  Commit(FileSystem& files, CommitRequest request)
      : files_(files),
        request_(std::move(request)),
        manifest_(request_.manifest),
        temporary_(request_.root + "/" + kTemporaryPrefix + step_name(manifest_.step) + "-" +
                   manifest_.uuid),
        final_(request_.root + "/" + step_name(manifest_.step)) {}

  CommitResult run() {
    try {
      write_step();
    } catch (const StorageError& error) {
      if (!is_full(error.code())) throw;
      // What is needed against what is free now that the temporary folder is gone.
      throw_full(std::strerror(error.code()));
    }
    write_hint();
    return {std::move(manifest_), final_, std::move(warnings_)};
  }

 private:
  void write_step() {
    check_space();
    enter("create");
    if (const int error = files_.make_directory(temporary_); error != 0) {
      throw_io("make the folder", temporary_, error);
    }
    try {
      write_data_file();
      enter("manifest");
      write_file_durably(files_, temporary_, kManifestName, checked_text());
      enter("publish");
      publish();
    } catch (...) {
      if (!published_) remove_tree(files_, temporary_);
      throw;
    }
  }

  void enter(const char* phase) {
    if (request_.on_phase) request_.on_phase(phase);
  }

  int64_t needed_bytes() const {
    int64_t bytes = 1 << 20;
    for (const auto& [name, text] : manifest_.notes) bytes += 3 * static_cast<int64_t>(text.size());
    for (const auto& tensor : manifest_.tensors) {
      int64_t size = tensor.tied_to.empty() ? dtype_bytes(tensor.dtype) : 0;
      for (const auto extent : tensor.shape) size *= extent;
      bytes += whole_pages(size) + 4096;
    }
    return bytes;
  }

  [[noreturn]] void throw_full(const char* reason) {
    int64_t free = 0;
    const bool known = files_.free_bytes(request_.root, free) == 0;
    throw StorageError(StorageError::Kind::kIo,
                       "[checkpoint] no room for step " + std::to_string(manifest_.step) + " in '" +
                           request_.root + "' (" + reason + "): needs " +
                           std::to_string(needed_bytes()) + " bytes, " +
                           (known ? std::to_string(free) : "an unknown number of") +
                           " bytes free; free some space or keep fewer steps");
  }

  void check_space() {
    int64_t free = 0;
    if (files_.free_bytes(request_.root, free) == 0 && free < needed_bytes()) {
      throw_full(std::strerror(ENOSPC));
    }
  }

  // A failed write, sync or close leaves the file in doubt for good (Linux drops the error once
  // reported), so the bytes go to a new file, once.
  void write_data_file() {
    const auto path = temporary_ + "/" + kDataName;
    try {
      return try_data_file(path);
    } catch (const StorageError& error) {
      if (error.kind() != StorageError::Kind::kIo || is_full(error.code())) throw;
      warnings_.push_back("[checkpoint] the data file was written twice, because of this: " +
                          std::string(error.what()));
    }
    const int removed = files_.unlink(path);
    if (removed != 0 && removed != ENOENT) throw_io("remove", path, removed);
    try_data_file(path);
  }

  void try_data_file(const std::string& path) {
    manifest_ = request_.manifest;
    create_container(path, manifest_);
    FileInfo info;
    if (const int error = files_.stat(path, info); error != 0) throw_io("look at", path, error);
    manifest_.files = {{kDataName, info.size, ""}};
    auto file = open_file(files_, path, FileSystem::Mode::kWrite);
    reserve(path, file.descriptor(), info.size);
    enter("data");
    for (size_t i = 0; i < manifest_.tensors.size(); ++i) {
      auto& tensor = manifest_.tensors[i];
      if (tensor.bytes > 0) write_tensor(path, file.descriptor(), request_.bytes_of(i), tensor);
    }
    manifest_.files[0].rest_sum = rest_sum(files_, file, rest_of_files(manifest_)[0], path);
    enter("sync");
    const int synced = files_.sync(file.descriptor());
    const int closed = file.close();
    if (synced != 0 || closed != 0) throw_io("make durable", path, synced != 0 ? synced : closed);
  }

  void reserve(const std::string& path, int descriptor, int64_t size) {
    int error = 0;
    do {
      error = files_.allocate(descriptor, size);
    } while (error == EINTR);
    if (error != 0 && error != EOPNOTSUPP && error != ENOSYS) throw_io("reserve", path, error);
  }

  void write_tensor(const std::string& path, int descriptor, const void* data,
                    TensorRecord& tensor) {
    for (int64_t at = 0; at < tensor.bytes; at += manifest_.block_bytes) {
      const auto* block = static_cast<const char*>(data) + at;
      const auto size = std::min(manifest_.block_bytes, tensor.bytes - at);
      tensor.sums.push_back(block_sum(block, size));
      const int error = write_all(files_, descriptor, block, size, tensor.offset + at);
      if (error != 0) throw_io("write", path, error);
    }
  }

  // What no reader would accept must not be announced.
  std::string checked_text() const {
    auto text = manifest_text(manifest_);
    if (static_cast<int64_t>(text.size()) > kMostManifestBytes) {
      throw StorageError(StorageError::Kind::kUsage,
                         "[checkpoint] the manifest of step " + std::to_string(manifest_.step) +
                             " takes " + std::to_string(text.size()) +
                             " bytes, more than 256 MiB; store less text in notes and scalars");
    }
    parse_manifest(text);
    return text;
  }

  void publish() {
    FileInfo info;
    const bool replaces = files_.stat(final_, info) == 0;
    std::string displaced;
    if (replaces) {
      displaced = replace();
    } else if (const int error = files_.rename(temporary_, final_); error != 0) {
      throw_io("rename to", final_, error);
    }
    published_ = true;
    if (const int error = files_.sync_directory(request_.root); error != 0) {
      throw_io("sync the folder", request_.root, error);
    }
    if (!replaces) return;
    warnings_.push_back("[checkpoint] replaced the step that stood at '" + final_ + "'");
    // As trash: half removed, it must never be taken for the step it was.
    const auto trash =
        request_.root + "/" + kTrashPrefix + step_name(manifest_.step) + "-" + manifest_.uuid;
    int error = files_.rename(displaced, trash);
    if (error == 0) error = remove_tree(files_, trash);
    if (error != 0) {
      warnings_.push_back("[checkpoint] cannot remove what was replaced, '" + displaced +
                          "': " + std::strerror(error));
    }
  }

  // Returns where the old step now is.
  std::string replace() {
    const int error = files_.exchange(temporary_, final_);
    if (error == 0) return temporary_;
    if (error != EINVAL && error != ENOSYS) throw_io("replace", final_, error);
    // Two renames: sweep() puts the old one back when the process dies between them.
    const auto aside =
        request_.root + "/" + kReplacedPrefix + step_name(manifest_.step) + "-" + manifest_.uuid;
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
  void write_hint() {
    try {
      write_file_durably(files_, request_.root, "LATEST", step_name(manifest_.step) + "\n");
    } catch (const StorageError& error) {
      warnings_.push_back(error.what());
    }
  }

  FileSystem& files_;
  const CommitRequest request_;
  Manifest manifest_;
  const std::string temporary_;
  const std::string final_;
  bool published_ = false;
  std::vector<std::string> warnings_;
};

}  // namespace

CommitResult commit_step(FileSystem& files, CommitRequest request) {
  return Commit(files, std::move(request)).run();
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
