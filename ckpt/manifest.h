// SPDX-License-Identifier: MIT
// The manifest of a step: what is stored, where its bytes lie and what they sum to. It is the only
// description that loading trusts; FORMAT.md has the grammar. No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>  // kPageBytes
#include <ounce/ckpt/names.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace ounce::ckpt {

inline constexpr int64_t kFormat = 1;
inline constexpr int64_t kBlockBytes = 4 << 20;  // of a tensor under one sum
inline constexpr size_t kMostDimensions = 32;    // libhdf5's limit
inline constexpr int64_t kMostManifestBytes = int64_t{256} << 20;
inline constexpr size_t kMostFiles = 1 << 16;
inline constexpr const char* kManifestName = "manifest.json";

struct TensorRecord {
  std::string name;
  std::string dtype;  // "float32", "bfloat16", ...: PyTorch's names
  std::string state_class;
  std::vector<int64_t> shape;
  std::string tied_to;  // name of the tensor that holds the bytes; then the rest stays empty
  int64_t file = 0;     // index in Manifest::files
  int64_t offset = 0;
  int64_t bytes = 0;
  std::vector<uint64_t> sums;  // one a block of block_bytes, the last one shorter
};

using Scalar = std::variant<int64_t, double, std::string>;

struct FileRecord {
  std::string name;
  int64_t size = 0;
  std::string rest_sum;  // of all bytes of the file outside the tensors
};

struct Manifest {
  int64_t format = kFormat;
  std::string uuid;
  int64_t step = 0;
  int64_t sequence = 0;  // counts commits of a root; the highest is the newest
  int64_t block_bytes = kBlockBytes;
  std::vector<FileRecord> files;
  std::vector<TensorRecord> tensors;
  std::map<std::string, Scalar> scalars;
  std::map<std::string, double> metrics;
  std::map<std::string, std::string> notes;
};

// Bytes of one element; 0 for a dtype that this version does not know.
int64_t dtype_bytes(std::string_view dtype);

// The text of manifest.json. Its first 46 bytes hold a sum of all of it.
std::string manifest_text(const Manifest& manifest);

// Parses and checks everything that can be checked without the files: sum, nesting, types, names,
// dtypes, shapes against bytes, extents inside their file and apart from each other. Memory used is
// bounded by a multiple of text.size(). Throws StorageError (kDamaged, kNewerFormat).
Manifest parse_manifest(std::string_view text);

using ByteRanges = std::vector<std::pair<int64_t, int64_t>>;  // [first, second), in order

// Of each file, the bytes that no tensor covers. Throws StorageError when tensors overlap.
std::vector<ByteRanges> rest_of_files(const Manifest& manifest);

}  // namespace ounce::ckpt
