// SPDX-License-Identifier: MIT
// Reads the values of one committed step, verified. No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/layout.h>
#include <ounce/ckpt/manifest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ounce::ckpt {

class StepReader {
 public:
  // Opens the step's files and compares their sizes and the sums of everything outside the tensors
  // with the manifest; past the page cache too, when `direct`. Throws StorageError.
  StepReader(std::shared_ptr<FileSystem> files, const std::string& folder, bool direct = false);
  // The same, with a manifest read before.
  StepReader(std::shared_ptr<FileSystem> files, const std::string& folder, Manifest manifest,
             bool direct = false);

  const std::string& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }
  const TensorRecord* find(const std::string& name) const;  // null when there is none
  // Where the bytes of a tied tensor are; any other tensor stands for itself.
  const TensorRecord& holder(const TensorRecord& tensor) const;

  // Fills `out`, of holder(tensor).bytes, block by block, each verified. Throws StorageError.
  void read(const TensorRecord& tensor, void* out) const;
  // Reads all of it with one block of memory.
  void check(const TensorRecord& tensor) const;

  // The tensors of these indices (of manifest().tensors, none tied) cut into slots in the order
  // of their files, one group a file.
  std::vector<Slot> slots_of(const std::vector<size_t>& tensors, int64_t slot_bytes) const;
  // Bytes of a file as they lie, not verified.
  void read_bytes(size_t file, char* memory, int64_t bytes, int64_t offset) const;
  // Fills a slot's memory, whole pages at a page; `verify` compares its blocks with their sums.
  // Different slots may be read from different threads. Throws StorageError.
  void read(const Slot& slot, char* memory, bool verify) const;

 private:
  void read_block(const TensorRecord& tensor, size_t block, void* out) const;

  std::shared_ptr<FileSystem> files_;
  std::string folder_;
  Manifest manifest_;
  std::vector<OpenFile> open_;
  std::vector<std::unique_ptr<OpenFile>> direct_;
  std::map<std::string, size_t> by_name_;
};

// The sum of the bytes of an open file that no tensor covers. Throws StorageError.
std::string rest_sum(FileSystem& files, const OpenFile& open, const ByteRanges& rest,
                     const std::string& path);

struct VerifyReport {
  Manifest manifest;
  int64_t blocks = 0;
  int64_t bytes = 0;
  std::vector<std::string> problems;  // each names the file, and the tensor and bytes where it can
};

// Reads everything and lists everything that is wrong, where loading stops at the first fault. With
// `containers` libhdf5 reads the files as well, in a child process. Throws nothing on damage, but
// StorageError (kNewerFormat) for a step of a later version.
VerifyReport verify_step(std::shared_ptr<FileSystem> files, const std::string& folder,
                         bool containers);

}  // namespace ounce::ckpt
