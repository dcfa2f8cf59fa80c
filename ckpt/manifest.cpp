// SPDX-License-Identifier: MIT
#include <ounce/ckpt/manifest.h>
#include <ounce/ckpt/storage_error.h>
#include <ounce/ckpt/sums.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

namespace ounce::ckpt {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kStart = "{\"self_xxh3\":\"";
constexpr size_t kDigits = 32;
constexpr int kMostNesting = 6;
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

constexpr std::pair<const char*, int64_t> kDtypes[] = {
    {"float32", 4},        {"float64", 8},     {"float16", 2},
    {"bfloat16", 2},       {"uint8", 1},       {"int8", 1},
    {"int16", 2},          {"int32", 4},       {"int64", 8},
    {"uint16", 2},         {"uint32", 4},      {"uint64", 8},
    {"bool", 1},           {"complex64", 8},   {"complex128", 16},
    {"float8_e4m3fn", 1},  {"float8_e5m2", 1}, {"float8_e4m3fnuz", 1},
    {"float8_e5m2fnuz", 1}};

[[noreturn]] void damaged(const std::string& message) {
  throw StorageError(StorageError::Kind::kDamaged, "[checkpoint] manifest: " + message);
}

void require(bool condition, const std::string& message) {
  if (!condition) damaged(message);
}

std::string to_hex(std::string_view bytes) {
  std::string text;
  for (const auto byte : bytes) text += hex_digits(static_cast<unsigned char>(byte)).substr(14);
  return text;
}

std::string from_hex(const std::string& text) {
  require(text.size() % 2 == 0, "a text of odd length");
  std::string bytes;
  for (size_t i = 0; i < text.size(); i += 2) {
    uint64_t value = 0;
    require(parse_hex_digits(std::string(14, '0') + text.substr(i, 2), value), "no hexadecimal");
    bytes.push_back(static_cast<char>(value));
  }
  return bytes;
}

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Json scalar_json(const std::string& name, const Scalar& scalar) {
  Json json = {{"name", name}};
  if (const auto* integer = std::get_if<int64_t>(&scalar)) {
    json["integer"] = *integer;
  } else if (const auto* number = std::get_if<double>(&scalar)) {
    json["number"] = *number;  // for people; null when not finite
    json["bits"] = hex_digits(std::bit_cast<uint64_t>(*number));
  } else {
    const auto& text = std::get<std::string>(scalar);
    if (is_utf8(text)) {
      json["text"] = text;
    } else {
      json["hex"] = to_hex(text);
    }
  }
  return json;
}

Json tensor_json(const TensorRecord& tensor) {
  Json json = {{"name", tensor.name},
               {"dtype", tensor.dtype},
               {"class", tensor.state_class},
               {"shape", tensor.shape}};
  if (!tensor.tied_to.empty()) {
    json["tied_to"] = tensor.tied_to;
    return json;
  }
  std::string sums;
  for (const auto sum : tensor.sums) sums += hex_digits(sum);
  json["file"] = tensor.file;
  json["offset"] = tensor.offset;
  json["bytes"] = tensor.bytes;
  json["sums"] = sums;
  return json;
}

template <class Range, class ToJson>
std::string json_lines(const Range& range, const ToJson& to_json) {
  std::string text = "[";
  for (const auto& item : range) {
    text += text.size() > 1 ? ",\n" : "\n";
    text += dump(to_json(item));
  }
  return text + "\n]";
}

// The sum of the text with its own digits read as zeros.
std::string self_sum(std::string_view text) {
  RunningSum sum;
  const std::string zeros(kDigits, '0');
  sum.add(kStart.data(), kStart.size());
  sum.add(zeros.data(), zeros.size());
  const auto rest = text.substr(kStart.size() + kDigits);
  sum.add(rest.data(), rest.size());
  return sum.digits();
}

const Json& member(const Json& json, const char* key) {
  require(json.is_object() && json.contains(key), std::string("no '") + key + "'");
  return json[key];
}

int64_t integer_of(const Json& json, int64_t least = 0, int64_t most = kMost) {
  require(json.is_number_integer() &&
              !(json.is_number_unsigned() && json.get<uint64_t>() > static_cast<uint64_t>(kMost)),
          "expected an integer of 64 bits, got " + dump(json).substr(0, 40));
  const auto value = json.get<int64_t>();
  require(value >= least && value <= most, "expected " + std::to_string(least) + " to " +
                                               std::to_string(most) + ", got " +
                                               std::to_string(value));
  return value;
}

std::string text_of(const Json& json) {
  require(json.is_string(), "expected a text, got " + dump(json).substr(0, 40));
  return json.get<std::string>();
}

const Json& list_of(const Json& json, const char* key) {
  const auto& list = member(json, key);
  require(list.is_array(), std::string("'") + key + "' is no list");
  return list;
}

FileRecord parse_file(const Json& json) {
  FileRecord file{text_of(member(json, "name")), integer_of(member(json, "size")),
                  text_of(member(json, "rest_xxh3"))};
  const bool plain = !file.name.empty() && file.name[0] != '.' &&
                     file.name.find_first_not_of(
                         "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                         "0123456789._-") == std::string::npos;
  require(plain, "'" + file.name.substr(0, 80) + "' is no plain file name");
  return file;
}

// Elements times bytes of one, refused when it does not fit.
int64_t bytes_of_shape(const TensorRecord& tensor) {
  int64_t bytes = dtype_bytes(tensor.dtype);
  bool empty = false;
  for (const auto size : tensor.shape) {
    empty = empty || size == 0;
    require(size <= 0 || bytes <= kMost / size, "the shape of '" + tensor.name + "' overflows");
    if (size > 0) bytes *= size;
  }
  return empty ? 0 : bytes;
}

void parse_extent(const Json& json, const Manifest& manifest, TensorRecord& tensor) {
  tensor.file = integer_of(member(json, "file"));
  tensor.offset = integer_of(member(json, "offset"));
  tensor.bytes = integer_of(member(json, "bytes"));
  const auto where = " of '" + tensor.name + "' ";
  require(tensor.bytes == bytes_of_shape(tensor), "the bytes" + where + "do not fit its shape");
  require(tensor.file < static_cast<int64_t>(manifest.files.size()),
          "the file" + where + "is not listed");
  const auto size = manifest.files[tensor.file].size;
  require(tensor.bytes <= size && tensor.offset <= size - tensor.bytes,
          "the extent" + where + "lies outside its file");
  const auto sums = text_of(member(json, "sums"));
  const int64_t blocks =
      tensor.bytes / manifest.block_bytes + (tensor.bytes % manifest.block_bytes != 0 ? 1 : 0);
  require(sums.size() % 16 == 0 && static_cast<int64_t>(sums.size() / 16) == blocks,
          "the sums" + where + "do not fit its bytes");
  tensor.sums.resize(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    require(parse_hex_digits(std::string_view(sums).substr(i * 16, 16), tensor.sums[i]),
            "a sum" + where + "is no number");
  }
}

TensorRecord parse_tensor(const Json& json, const Manifest& manifest) {
  TensorRecord tensor;
  tensor.name = text_of(member(json, "name"));
  const auto problem = name_problem(tensor.name);
  require(problem.empty(), "the name '" + tensor.name.substr(0, 80) + "' " + problem);
  tensor.dtype = text_of(member(json, "dtype"));
  require(dtype_bytes(tensor.dtype) > 0,
          "'" + tensor.name + "' has the unknown dtype '" + tensor.dtype.substr(0, 40) + "'");
  tensor.state_class = text_of(member(json, "class"));
  const auto& shape = list_of(json, "shape");
  require(shape.size() <= kMostDimensions, "'" + tensor.name + "' has too many dimensions");
  for (const auto& size : shape) tensor.shape.push_back(integer_of(size));
  if (json.contains("tied_to")) {
    tensor.tied_to = text_of(json["tied_to"]);
    // No name means that the tensor has bytes of its own, which were not checked.
    require(!tensor.tied_to.empty(), "'" + tensor.name + "' is tied to no name");
  } else {
    parse_extent(json, manifest, tensor);
  }
  return tensor;
}

Scalar parse_scalar(const Json& json) {
  if (json.contains("integer")) return integer_of(json["integer"], -kMost - 1);
  if (json.contains("text")) return text_of(json["text"]);
  if (json.contains("hex")) return from_hex(text_of(json["hex"]));
  uint64_t bits = 0;
  require(parse_hex_digits(text_of(member(json, "bits")), bits), "a number without its bits");
  return std::bit_cast<double>(bits);
}

void check_extents(const Manifest& manifest) {
  std::map<std::string, const TensorRecord*> by_name;
  for (const auto& tensor : manifest.tensors) {
    require(by_name.emplace(tensor.name, &tensor).second && !manifest.scalars.contains(tensor.name),
            "'" + tensor.name + "' stands there twice");
  }
  for (const auto& tensor : manifest.tensors) {
    if (tensor.tied_to.empty()) continue;
    const auto found = by_name.find(tensor.tied_to);
    require(found != by_name.end() && found->second->tied_to.empty() &&
                found->second->shape == tensor.shape && found->second->dtype == tensor.dtype,
            "'" + tensor.name + "' is tied to nothing like it");
  }
  rest_of_files(manifest);  // which checks that they are apart
}

double metric_of(const Json& json) {
  if (json.is_number()) return json.get<double>();
  const auto text = text_of(json);
  if (text == "inf") return std::numeric_limits<double>::infinity();
  if (text == "-inf") return -std::numeric_limits<double>::infinity();
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

int64_t dtype_bytes(std::string_view dtype) {
  for (const auto& [name, bytes] : kDtypes) {
    if (dtype == name) return bytes;
  }
  return 0;
}

std::string manifest_text(const Manifest& manifest) {
  Json metrics = Json::object();
  for (const auto& [name, value] : manifest.metrics) {
    if (std::isfinite(value)) {
      metrics[name] = value;
    } else {
      metrics[name] = std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
    }
  }
  auto text = std::string(kStart) + std::string(kDigits, '0') + "\",\n";
  text += "\"format\":" + std::to_string(manifest.format);
  text += ",\n\"uuid\":" + dump(manifest.uuid);
  text += ",\n\"step\":" + std::to_string(manifest.step);
  text += ",\n\"sequence\":" + std::to_string(manifest.sequence);
  text += ",\n\"block_bytes\":" + std::to_string(manifest.block_bytes);
  text += ",\n\"metrics\":" + dump(metrics);
  text += ",\n\"notes\":" + dump(manifest.notes);
  text += ",\n\"files\":" + json_lines(manifest.files, [](const FileRecord& file) {
            return Json{{"name", file.name}, {"size", file.size}, {"rest_xxh3", file.rest_sum}};
          });
  text += ",\n\"scalars\":" + json_lines(manifest.scalars, [](const auto& scalar) {
            return scalar_json(scalar.first, scalar.second);
          });
  text += ",\n\"tensors\":" + json_lines(manifest.tensors, tensor_json) + "\n}\n";
  text.replace(kStart.size(), kDigits, self_sum(text));
  return text;
}

Manifest parse_manifest(std::string_view text) {
  require(text.size() > kStart.size() + kDigits && text.substr(0, kStart.size()) == kStart,
          "it does not begin like one");
  require(text.substr(kStart.size(), kDigits) == self_sum(text), "its sum does not match");
  require(nesting_of(text) <= kMostNesting, "nested too deeply");
  const auto json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  require(json.is_object(), "it is not JSON");
  Manifest manifest;
  manifest.format = integer_of(member(json, "format"), 1);
  if (manifest.format > kFormat) {
    throw StorageError(StorageError::Kind::kNewerFormat,
                       "[checkpoint] expected format " + std::to_string(kFormat) +
                           " or older, got format " + std::to_string(manifest.format) +
                           "; use the version that wrote it, or a later one");
  }
  manifest.uuid = text_of(member(json, "uuid"));
  manifest.step = integer_of(member(json, "step"), 0, kMostStep);
  manifest.sequence = integer_of(member(json, "sequence"), 0, kMostStep);
  // A buffer of this size is allocated when the step is read.
  manifest.block_bytes = integer_of(member(json, "block_bytes"), 1, int64_t{1} << 30);
  const auto& files = list_of(json, "files");
  require(files.size() <= kMostFiles, "more than " + std::to_string(kMostFiles) + " files");
  std::set<std::string> file_names;
  for (const auto& file : files) {
    manifest.files.push_back(parse_file(file));
    const auto& name = manifest.files.back().name;
    require(file_names.insert(name).second,
            "the file '" + name.substr(0, 80) + "' stands there twice");
  }
  for (const auto& scalar : list_of(json, "scalars")) {
    const auto name = text_of(member(scalar, "name"));
    require(
        name_problem(name).empty() && manifest.scalars.emplace(name, parse_scalar(scalar)).second,
        "the scalar '" + name.substr(0, 80) + "' has no name of its own");
  }
  for (const auto& tensor : list_of(json, "tensors")) {
    manifest.tensors.push_back(parse_tensor(tensor, manifest));
  }
  require(member(json, "metrics").is_object() && member(json, "notes").is_object(),
          "metrics and notes are no objects");
  for (const auto& [name, value] : json["metrics"].items())
    manifest.metrics[name] = metric_of(value);
  for (const auto& [name, value] : json["notes"].items()) manifest.notes[name] = text_of(value);
  check_extents(manifest);
  return manifest;
}

std::vector<ByteRanges> rest_of_files(const Manifest& manifest) {
  std::vector<const TensorRecord*> held;
  for (const auto& tensor : manifest.tensors) {
    if (tensor.tied_to.empty() && tensor.bytes > 0) held.push_back(&tensor);
  }
  std::sort(held.begin(), held.end(),
            [](const auto* a, const auto* b) { return a->offset < b->offset; });
  std::vector<ByteRanges> rest(manifest.files.size());
  std::vector<int64_t> ends(manifest.files.size());
  for (const auto* tensor : held) {
    auto& end = ends[tensor->file];
    require(tensor->offset >= end, "the extent of '" + tensor->name + "' overlaps another");
    if (tensor->offset > end) rest[tensor->file].emplace_back(end, tensor->offset);
    end = tensor->offset + tensor->bytes;
  }
  for (size_t i = 0; i < rest.size(); ++i) {
    const auto size = manifest.files[i].size;
    if (ends[i] < size) rest[i].emplace_back(ends[i], size);
  }
  return rest;
}

}  // namespace ounce::ckpt
