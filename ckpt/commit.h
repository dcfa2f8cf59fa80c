// SPDX-License-Identifier: MIT
// Makes a step appear in its root whole or not at all (FORMAT.md, "Commit"). No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/manifest.h>
#include <ounce/ckpt/storage_error.h>

#include <string>
#include <vector>

namespace ounce::ckpt {

// A step on its way: a temporary folder that gets the data files, then the manifest, then its name.
class Commit {
 public:
  // Makes the temporary folder. Throws StorageError, as all of it does.
  Commit(FileSystem& files, const std::string& root, int64_t step, const std::string& uuid,
         SyncPolicy sync);
  // What is not published is removed, as far as the file system lets it.
  ~Commit();
  Commit(const Commit&) = delete;
  Commit& operator=(const Commit&) = delete;

  const std::string& folder() const { return temporary_; }
  void write_manifest(const std::string& text);
  // On return the step is durable, and one that stood there before is gone. After an error of the
  // last sync, of the root, the new step may be there, whole, although it was not announced.
  void publish();
  bool published() const { return published_; }
  void write_hint();

  const std::string& path() const { return final_; }
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  void keep_pin();
  std::string replace();

  FileSystem& files_;
  const std::string root_;
  const int64_t step_;
  const std::string uuid_;
  const SyncPolicy sync_;
  const std::string temporary_, final_;
  bool published_ = false;
  std::vector<std::string> warnings_;
};

// A disk, quota or file size limit that is full.
bool is_full(const StorageError& error);
// Throws a StorageError (kIo) that names both numbers of bytes.
[[noreturn]] void throw_full(FileSystem& files, const std::string& root, int64_t step,
                             int64_t needed, int reason);
void check_space(FileSystem& files, const std::string& root, int64_t step, int64_t needed);

// Removes what dead writers left in a root; puts back a step that was about to be replaced. Returns
// warnings. The caller holds the root's lock.
std::vector<std::string> sweep(FileSystem& files, const std::string& root);

}  // namespace ounce::ckpt
