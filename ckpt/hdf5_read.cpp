// SPDX-License-Identifier: MIT
// What libhdf5 says of files that exist: asked in a child process only.
#include <ounce/ckpt/child_process.h>
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/hdf5_types.h>
#include <ounce/ckpt/storage_error.h>

#include <algorithm>
#include <charconv>
#include <iterator>
#include <limits>
#include <map>
#include <set>
#include <string_view>

namespace ounce::ckpt {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

// Where the type alone tells the dtype; 8-bit floats are bytes that the attribute names.
constexpr const char* kOwnTypes[] = {"float32", "float64", "float16", "bfloat16",  "uint8",
                                     "int8",    "int16",   "int32",   "int64",     "uint16",
                                     "uint32",  "uint64",  "bool",    "complex64", "complex128"};

// The text that a child sends: fields that end with NUL, which no name of HDF5 holds.
void put(std::string& text, std::string_view field) {
  text += field;
  text.push_back('\0');
}

std::vector<std::string> fields_of(const std::string& text) {
  std::vector<std::string> fields;
  for (size_t start = 0, end; (end = text.find('\0', start)) != std::string::npos;
       start = end + 1) {
    fields.push_back(text.substr(start, end - start));
  }
  return fields;
}

Handle open_to_read(const std::string& path) {
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_file_locking(access, false, true);
  return Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), H5Fclose);
}

// ---- comparing with a manifest

// `holder` has the tensor's bytes.
void compare_dataset(hid_t file, const TensorRecord& tensor, const TensorRecord& holder,
                     std::vector<std::string>& problems) {
  const Handle dataset(H5Dopen2(file, tensor.name.c_str(), H5P_DEFAULT), H5Dclose);
  if (dataset < 0) {
    problems.push_back("libhdf5 finds no dataset '" + tensor.name + "': " + last_error());
    return;
  }
  const Handle space(H5Dget_space(dataset), H5Sclose);
  const int rank = H5Sget_simple_extent_ndims(space);
  std::vector<hsize_t> sizes(std::max(rank, 0));
  if (rank > 0) H5Sget_simple_extent_dims(space, sizes.data(), nullptr);
  if (rank < 0 || std::vector<int64_t>(sizes.begin(), sizes.end()) != tensor.shape) {
    problems.push_back("libhdf5 finds another shape of '" + tensor.name + "'");
  }
  const Handle type(H5Dget_type(dataset), H5Tclose);
  if (H5Tequal(type, type_of(tensor.dtype)) <= 0) {
    problems.push_back("libhdf5 finds another type of '" + tensor.name + "'");
  }
  if (holder.bytes > 0 && H5Dget_offset(dataset) != static_cast<haddr_t>(holder.offset)) {
    problems.push_back("libhdf5 finds '" + tensor.name + "' at another offset");
  }
}

std::vector<std::string> compare_here(const std::string& path, const Manifest& manifest) {
  const QuietErrors quiet;
  std::vector<std::string> problems;
  const auto file = open_to_read(path);
  if (file < 0) return {"libhdf5 cannot open '" + path + "': " + last_error()};
  std::map<std::string_view, const TensorRecord*> by_name;
  for (const auto& tensor : manifest.tensors) by_name[tensor.name] = &tensor;
  for (const auto& tensor : manifest.tensors) {
    const auto& holder = tensor.tied_to.empty() ? tensor : *by_name.at(tensor.tied_to);
    compare_dataset(file, tensor, holder, problems);
  }
  return problems;
}

// ---- listing what is there

// A text attribute, or "" when there is none. Longer ones name no dtype.
std::string read_text(hid_t object, const char* name) {
  if (H5Aexists(object, name) <= 0) return "";
  const Handle attribute(valid(H5Aopen(object, name, H5P_DEFAULT), "open"), H5Aclose);
  const Handle type(valid(H5Aget_type(attribute), "ask the type"), H5Tclose);
  const Handle space(valid(H5Aget_space(attribute), "ask the shape"), H5Sclose);
  if (H5Tget_class(type) != H5T_STRING || H5Sget_simple_extent_npoints(space) != 1) return "";
  if (H5Tis_variable_str(type) > 0) {
    char* value = nullptr;
    done(H5Aread(attribute, type, &value), "read");
    std::string text = value == nullptr ? "" : value;
    H5free_memory(value);
    return text;
  }
  std::string text(H5Tget_size(type), '\0');
  if (text.size() > 64) return "";
  done(H5Aread(attribute, type, text.data()), "read");
  return text.substr(0, text.find('\0'));
}

std::string dtype_of(hid_t dataset, hid_t type) {
  const auto named = read_text(dataset, "torch_dtype");
  if (dtype_bytes(named) > 0) return H5Tequal(type, type_of(named)) > 0 ? named : "";
  for (const auto* dtype : kOwnTypes) {
    if (H5Tequal(type, type_of(dtype)) > 0) return dtype;
  }
  return "";
}

// Why its values do not lie in one piece of this file; "" when they do.
std::string layout_problem(hid_t dataset) {
  const Handle properties(valid(H5Dget_create_plist(dataset), "ask the layout"), H5Pclose);
  switch (H5Pget_layout(properties)) {
    case H5D_CONTIGUOUS:
      return H5Pget_external_count(properties) == 0 ? "" : "has its values in other files";
    case H5D_CHUNKED:
      return H5Pget_nfilters(properties) > 0 ? "is chunked and compressed" : "is chunked";
    case H5D_COMPACT:
      return "has its values in its header (compact)";
    default:
      return "has its values elsewhere (virtual)";
  }
}

// Six fields: name, dtype, shape, offset, bytes, problem.
void put_dataset(std::string& text, const std::string& name, hid_t dataset) {
  const Handle type(valid(H5Dget_type(dataset), "ask the type"), H5Tclose);
  const Handle space(valid(H5Dget_space(dataset), "ask the shape"), H5Sclose);
  const int rank = H5Sget_simple_extent_ndims(space);
  std::vector<hsize_t> sizes(std::max(rank, 0));
  if (rank > 0) H5Sget_simple_extent_dims(space, sizes.data(), nullptr);
  std::string shape;
  for (const auto size : sizes) shape += std::to_string(size) + ",";
  const auto elements = H5Sget_simple_extent_npoints(space);
  const auto offset = elements > 0 ? H5Dget_offset(dataset) : 0;
  const auto dtype = dtype_of(dataset, type);
  auto problem = layout_problem(dataset);
  const bool varies = H5Tdetect_class(type, H5T_VLEN) > 0 || H5Tdetect_class(type, H5T_STRING) > 0;
  if (H5Sget_simple_extent_type(space) == H5S_NULL) problem = "has no shape";
  if (varies) problem = "holds texts or lists of their own lengths";
  if (problem.empty() && dtype.empty()) {
    problem = "is of a type that no tensor has (big-endian, or not the one 'torch_dtype' names)";
  }
  if (problem.empty() && offset == HADDR_UNDEF) problem = "has had no value written";
  put(text, name);
  put(text, dtype);
  put(text, shape);
  put(text, std::to_string(offset == HADDR_UNDEF ? 0 : offset));
  put(text, std::to_string(H5Dget_storage_size(dataset)));
  put(text, problem);
}

void put_problem(std::string& text, const std::string& name, const std::string& problem) {
  put(text, name);
  for (int i = 0; i < 4; ++i) put(text, "");
  put(text, problem);
}

void put_link(std::string& text, hid_t group, const char* name, bool is_hard) {
  if (!is_hard) return put_problem(text, name, "is a link by name");
  const Handle object(H5Oopen(group, name, H5P_DEFAULT), H5Oclose);
  if (object < 0) return put_problem(text, name, "cannot be opened: " + last_error());
  if (H5Iget_type(object) == H5I_DATASET) put_dataset(text, name, object);
}

// Two fields, why nothing can be read and whether the file is of a step, then those of the
// datasets.
std::string describe_here(const std::string& path) {
  const QuietErrors quiet;
  std::string text;
  const auto file = open_to_read(path);
  put(text, file < 0 ? last_error() : "");
  put(text, file >= 0 && H5Lexists(file, kReservedGroup, H5P_DEFAULT) > 0 ? "1" : "0");
  if (file < 0) return text;
  // No exception may pass through libhdf5.
  const auto visit = [](hid_t group, const char* name, const H5L_info_t* info,
                        void* data) -> herr_t {
    try {
      put_link(*static_cast<std::string*>(data), group, name, info->type == H5L_TYPE_HARD);
      return 0;
    } catch (...) {
      return -1;
    }
  };
  if (H5Lvisit(file, H5_INDEX_NAME, H5_ITER_INC, visit, &text) < 0) {
    const auto reason = last_error();
    text.clear();
    put(text, reason);
    put(text, "0");
  }
  return text;
}

// ---- checking what the child says

[[noreturn]] void damaged(const std::string& path, const std::string& message) {
  throw StorageError(StorageError::Kind::kDamaged,
                     one_line("[hdf5] '" + path + "': " + message + "; get the file again"));
}

int64_t number_of(const std::string& path, std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    damaged(path, "a size or an offset that is none");
  }
  return value;
}

TensorRecord checked(const std::string& path, const std::string* fields, int64_t file_size) {
  TensorRecord tensor;
  tensor.name = fields[0];
  const auto where = "'" + tensor.name.substr(0, 80) + "' ";
  if (const auto problem = name_problem(tensor.name); !problem.empty()) {
    damaged(path, "the name " + where + problem);
  }
  tensor.dtype = fields[1];
  tensor.bytes = dtype_bytes(tensor.dtype);
  if (tensor.bytes == 0) damaged(path, where + "has no dtype");
  bool empty = false;
  for (size_t start = 0, end; (end = fields[2].find(',', start)) != std::string::npos;
       start = end + 1) {
    const auto size = number_of(path, std::string_view(fields[2]).substr(start, end - start));
    if (size > 0 && tensor.bytes > kMost / size)
      damaged(path, "the shape of " + where + "overflows");
    if (size > 0) tensor.bytes *= size;
    empty = empty || size == 0;
    tensor.shape.push_back(size);
  }
  if (tensor.shape.size() > kMostDimensions) damaged(path, where + "has too many dimensions");
  if (empty) tensor.bytes = 0;
  tensor.offset = tensor.bytes == 0 ? 0 : number_of(path, fields[3]);
  if (number_of(path, fields[4]) != tensor.bytes || tensor.bytes > file_size ||
      tensor.offset > file_size - tensor.bytes) {
    damaged(path, "the values of " + where + "do not fit its shape or the file");
  }
  return tensor;
}

// Datasets in the very same place are one, under several names.
void tie_and_separate(const std::string& path, std::vector<TensorRecord>& tensors) {
  std::set<std::string> names;
  std::vector<TensorRecord*> held;
  for (auto& tensor : tensors) {
    if (!names.insert(tensor.name).second) damaged(path, "'" + tensor.name + "' is there twice");
    if (tensor.bytes > 0) held.push_back(&tensor);
  }
  std::stable_sort(held.begin(), held.end(),
                   [](const auto* a, const auto* b) { return a->offset < b->offset; });
  const TensorRecord* last = nullptr;
  for (auto* tensor : held) {
    if (last == nullptr || tensor->offset >= last->offset + last->bytes) {
      last = tensor;
    } else if (tensor->offset == last->offset && tensor->shape == last->shape &&
               tensor->dtype == last->dtype) {
      tensor->tied_to = last->name;
    } else {
      damaged(path, "'" + tensor->name + "' overlaps '" + last->name + "'");
    }
  }
}

}  // namespace

std::vector<std::string> compare_container(const std::string& path, const Manifest& manifest) {
  const auto child = run_in_child([&] {
    std::string text;
    for (const auto& problem : compare_here(path, manifest)) put(text, problem);
    return text;
  });
  auto problems = fields_of(child.text);
  if (!child.problem.empty()) {
    problems.push_back("libhdf5 did not survive reading '" + path + "': " + child.problem);
  }
  return problems;
}

Hdf5Contents list_datasets(FileSystem& files, const std::string& path) {
  FileInfo info;
  if (const int error = files.stat(path, info); error != 0) throw_io("read", path, error);
  if (info.kind != FileKind::kFile) damaged(path, "no file");
  const auto child = run_in_child([&] { return describe_here(path); });
  const auto fields = fields_of(child.text);
  if (!child.problem.empty() || fields.size() < 2 || fields.size() % 6 != 2) {
    damaged(path, "libhdf5 did not survive reading it: " + child.problem);
  }
  if (!fields[0].empty()) damaged(path, "libhdf5 cannot read it: " + fields[0]);
  Hdf5Contents contents;
  contents.of_step = fields[1] == "1";
  std::string refused;
  for (size_t i = 2; i < fields.size(); i += 6) {
    if (fields[i + 5].empty()) {
      contents.tensors.push_back(checked(path, &fields[i], info.size));
    } else {
      refused += (refused.empty() ? "'" : ", '") + fields[i] + "' " + fields[i + 5];
    }
  }
  if (!refused.empty()) {
    throw StorageError(
        StorageError::Kind::kDamaged,
        "[hdf5] expected contiguous little-endian datasets in '" + path +
            "', got: " + one_line(refused) +
            "; write them anew without chunks and filters (h5repack -l CONTI -f NONE)");
  }
  tie_and_separate(path, contents.tensors);
  return contents;
}

}  // namespace ounce::ckpt
