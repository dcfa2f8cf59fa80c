// SPDX-License-Identifier: MIT
// Reads .safetensors files: 8 bytes of header length, a JSON header, the values. No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/manifest.h>

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
  void read(const TensorRecord& tensor, void* out) const;

 private:
  std::shared_ptr<FileSystem> files_;
  std::string path_;
  OpenFile file_;
  std::vector<TensorRecord> tensors_;
};

}  // namespace ounce::ckpt
