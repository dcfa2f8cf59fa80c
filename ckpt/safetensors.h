// SPDX-License-Identifier: MIT
// .safetensors files: 8 bytes of header length, a JSON header, the values. No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/manifest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ounce::ckpt {

class SafetensorsReader {
 public:
  // Reads and checks the header: its length against the file, nesting, names, dtypes, shapes
  // against bytes, extents inside the file and apart. Throws StorageError (kMissing, kIo,
  // kDamaged).
  SafetensorsReader(std::shared_ptr<FileSystem> files, const std::string& path);

  // name, dtype, shape, offset in the file, bytes.
  const std::vector<TensorRecord>& tensors() const { return tensors_; }
  // The texts of __metadata__.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  void read(const TensorRecord& tensor, void* out) const;

 private:
  SafetensorsReader(std::shared_ptr<FileSystem> files, const std::string& path, FileInfo info);

  std::shared_ptr<FileSystem> files_;
  std::string path_;
  OpenFile file_;
  std::vector<TensorRecord> tensors_;
  std::map<std::string, std::string> metadata_;
};

// The format's name of a dtype; "" for the one it lacks, complex128.
std::string safetensors_dtype(const std::string& dtype);

// Length and header of a file that holds `tensors` (name, dtype, shape, bytes) back to back in this
// order, padded with spaces to a multiple of 8; sets their offsets in the file. Order by falling
// element size keeps every tensor aligned, which some readers need. Throws StorageError (kUsage)
// for a header that readers would refuse: over 100 MB, or a tensor called __metadata__.
std::string safetensors_header(std::vector<TensorRecord>& tensors,
                               const std::map<std::string, std::string>& metadata);

}  // namespace ounce::ckpt
