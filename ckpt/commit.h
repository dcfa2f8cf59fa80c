// SPDX-License-Identifier: MIT
// Writes a step so that it is there whole or not at all (FORMAT.md, "Commit"). No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/manifest.h>

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace ounce::ckpt {

struct CommitRequest {
  std::string root;
  Manifest manifest;  // uuid, step, sequence, names, shapes, dtypes; the rest is filled in
  // The contiguous bytes of tensor `index` of the manifest, valid until the next call.
  std::function<const void*(size_t index)> bytes_of;
  // Called when a phase begins: create, data, sync, manifest, publish. May be empty.
  std::function<void(const char* phase)> on_phase;
};

struct CommitResult {
  Manifest manifest;
  std::string path;
  std::vector<std::string> warnings;
};

// On return the step is durable. Throws StorageError when it is not; the temporary folder is then
// gone (as far as the file system lets it) and every older step untouched. After an error in the
// last sync alone, of the root, the new step may be there, whole, although it was not announced.
CommitResult commit_step(FileSystem& files, CommitRequest request);

// Removes what dead writers left in a root; puts back a step that was about to be replaced. Returns
// warnings. The caller holds the root's lock.
std::vector<std::string> sweep(FileSystem& files, const std::string& root);

}  // namespace ounce::ckpt
