// SPDX-License-Identifier: MIT
// The HDF5 file of a step that is being written: described by libhdf5, reserved, then filled slot
// by slot from any number of threads. No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/layout.h>
#include <ounce/ckpt/manifest.h>

#include <memory>
#include <optional>
#include <string>

namespace ounce::ckpt {

class DataFile {
 public:
  // Creates `path`; sets files, extents and the sum of everything that is no tensor in `manifest`,
  // whose one file it is, and makes room for the sums of blocks. Throws StorageError.
  DataFile(FileSystem& files, const std::string& path, Manifest& manifest, bool direct,
           SyncPolicy sync);

  // Sums the blocks of a slot into the manifest and writes them. Bytes behind a piece up to the end
  // of its page must be zero. Different slots may come from different threads.
  void write(const Slot& slot, const char* data);

  // Everything written is durable, as far as the policy asks for it.
  void finish();

 private:
  FileSystem& files_;
  const std::string path_;
  Manifest& manifest_;
  const SyncPolicy sync_;
  std::optional<OpenFile> buffered_;
  std::unique_ptr<OpenFile> direct_;
};

// Bytes that the data file, the manifest and the folder of a step take at most, before the file
// says what it is.
int64_t needed_bytes(const Manifest& manifest);

// Reserves the blocks of a file, where its file system can: a full disk shows here. 0 or an errno.
int reserve_blocks(FileSystem& files, int descriptor, int64_t size);

// Opens `path` a second time, past the page cache; nothing where the file system cannot.
std::unique_ptr<OpenFile> open_direct(FileSystem& files, const std::string& path,
                                      FileSystem::Mode mode);

}  // namespace ounce::ckpt
