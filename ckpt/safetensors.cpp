// SPDX-License-Identifier: MIT
#include <ounce/ckpt/safetensors.h>
#include <ounce/ckpt/storage_error.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

namespace ounce::ckpt {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMostHeaderBytes = 100'000'000;  // the format's own limit
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

constexpr std::pair<const char*, const char*> kDtypes[] = {{"F32", "float32"},
                                                           {"F64", "float64"},
                                                           {"F16", "float16"},
                                                           {"BF16", "bfloat16"},
                                                           {"U8", "uint8"},
                                                           {"I8", "int8"},
                                                           {"I16", "int16"},
                                                           {"I32", "int32"},
                                                           {"I64", "int64"},
                                                           {"U16", "uint16"},
                                                           {"U32", "uint32"},
                                                           {"U64", "uint64"},
                                                           {"BOOL", "bool"},
                                                           {"F8_E4M3", "float8_e4m3fn"},
                                                           {"F8_E5M2", "float8_e5m2"},
                                                           {"F8_E4M3FNUZ", "float8_e4m3fnuz"},
                                                           {"F8_E5M2FNUZ", "float8_e5m2fnuz"},
                                                           {"C64", "complex64"}};
constexpr const char* kMetadata = "__metadata__";

void require(bool condition, const std::string& path, const std::string& message) {
  if (!condition) {
    throw StorageError(
        StorageError::Kind::kDamaged,
        one_line("[safetensors] '" + path + "': " + message + "; get the file again"));
  }
}

bool is_size(const Json& json) {
  return json.is_number_unsigned() && json.get<uint64_t>() <= static_cast<uint64_t>(kMost);
}

TensorRecord parse(const std::string& path, const std::string& name, const Json& json,
                   int64_t begin, int64_t end) {
  const auto where = "'" + name.substr(0, 80) + "' ";
  const auto problem = name_problem(name);
  require(problem.empty(), path, "the name " + where + problem);
  require(json.is_object() && json.contains("dtype") && json.contains("shape") &&
              json.contains("data_offsets"),
          path, where + "lacks dtype, shape or data_offsets");
  TensorRecord tensor;
  tensor.name = name;
  for (const auto& [theirs, ours] : kDtypes) {
    if (json["dtype"] == theirs) tensor.dtype = ours;
  }
  require(!tensor.dtype.empty(), path, where + "has the unknown dtype " + json["dtype"].dump());
  const auto& shape = json["shape"];
  require(shape.is_array() && shape.size() <= kMostDimensions, path, where + "has no shape");
  tensor.bytes = dtype_bytes(tensor.dtype);
  bool empty = false;
  for (const auto& size : shape) {
    require(is_size(size), path, where + "has a size that is no size");
    const auto value = size.get<int64_t>();
    empty = empty || value == 0;
    require(value == 0 || tensor.bytes <= kMost / value, path,
            "the shape of " + where + "overflows");
    if (value > 0) tensor.bytes *= value;
    tensor.shape.push_back(value);
  }
  if (empty) tensor.bytes = 0;
  const auto& offsets = json["data_offsets"];
  require(offsets.is_array() && offsets.size() == 2 && is_size(offsets[0]) && is_size(offsets[1]),
          path, where + "has no data_offsets");
  const auto first = offsets[0].get<int64_t>(), last = offsets[1].get<int64_t>();
  require(first <= last && last <= end - begin && last - first == tensor.bytes, path,
          "the data_offsets of " + where + "do not fit its shape or the file");
  tensor.offset = begin + first;
  return tensor;
}

// Looks before it opens: to open a pipe is to wait for its writer.
OpenFile open_regular(FileSystem& files, const std::string& path, FileInfo& info) {
  if (const int error = files.stat(path, info); error != 0) throw_io("read", path, error);
  require(info.kind == FileKind::kFile && info.size >= 8, path, "no file, or too short");
  return open_file(files, path, FileSystem::Mode::kRead);
}

}  // namespace

SafetensorsReader::SafetensorsReader(std::shared_ptr<FileSystem> files, const std::string& path)
    : SafetensorsReader(std::move(files), path, FileInfo()) {}

SafetensorsReader::SafetensorsReader(std::shared_ptr<FileSystem> files, const std::string& path,
                                     FileInfo info)
    : files_(std::move(files)), path_(path), file_(open_regular(*files_, path, info)) {
  unsigned char prefix[8];
  int error = read_all(*files_, file_.descriptor(), prefix, 8, 0);
  if (error != 0) throw_io("read", path, error);
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
  require(length <= kMostHeaderBytes && static_cast<int64_t>(length) <= info.size - 8, path,
          "the header of " + std::to_string(length) + " bytes does not fit the file");
  std::string header(length, '\0');
  error = read_all(*files_, file_.descriptor(), header.data(), header.size(), 8);
  if (error != 0) throw_io("read", path, error);
  require(nesting_of(header) <= 4, path, "the header is nested too deeply");
  const auto json = Json::parse(header, nullptr, /*allow_exceptions=*/false);
  require(json.is_object(), path, "the header is not JSON");
  const auto begin = static_cast<int64_t>(8 + length);
  for (const auto& [name, entry] : json.items()) {
    if (name != kMetadata) tensors_.push_back(parse(path, name, entry, begin, info.size));
  }
  const auto metadata = json.value(kMetadata, Json::object());
  for (const auto& [name, text] : metadata.items()) {
    if (text.is_string()) metadata_[name] = text.get<std::string>();
  }
  auto sorted = tensors_;
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  for (size_t i = 1; i < sorted.size(); ++i) {
    require(sorted[i - 1].offset + sorted[i - 1].bytes <= sorted[i].offset, path,
            "'" + sorted[i].name + "' overlaps '" + sorted[i - 1].name + "'");
  }
}

void SafetensorsReader::read(const TensorRecord& tensor, void* out) const {
  const int error = read_all(*files_, file_.descriptor(), out, tensor.bytes, tensor.offset);
  if (error != 0) throw_io("read '" + tensor.name + "' of", path_, error);
}

std::string safetensors_dtype(const std::string& dtype) {
  for (const auto& [theirs, ours] : kDtypes) {
    if (dtype == ours) return theirs;
  }
  return "";
}

std::string safetensors_header(std::vector<TensorRecord>& tensors,
                               const std::map<std::string, std::string>& metadata) {
  Json json = {{kMetadata, metadata}};
  int64_t end = 0;
  for (auto& tensor : tensors) {
    if (tensor.name == kMetadata) {
      throw StorageError(StorageError::Kind::kUsage,
                         "[safetensors] no tensor can be called "
                         "'__metadata__'; rename it");
    }
    tensor.offset = end;
    end += tensor.bytes;
    json[tensor.name] = {{"dtype", safetensors_dtype(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"data_offsets", {tensor.offset, end}}};
  }
  auto text = json.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  if (static_cast<int64_t>(text.size()) > kMostHeaderBytes) {
    throw StorageError(StorageError::Kind::kUsage,
                       "[safetensors] a header of " + std::to_string(text.size()) +
                           " bytes is more than the format's 100 MB; write more, smaller shards");
  }
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(text.size() >> (8 * i));
  for (auto& tensor : tensors) tensor.offset += static_cast<int64_t>(8 + text.size());
  return length + text;
}

}  // namespace ounce::ckpt
