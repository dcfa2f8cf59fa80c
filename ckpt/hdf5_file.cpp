// SPDX-License-Identifier: MIT
#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/storage_error.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace ounce::ckpt {
namespace {

constexpr unsigned kMostChildSeconds = 60;

// Owns an HDF5 identifier of any kind.
class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle(hid_t id, Close close) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&&) = delete;
  ~Handle() { close(); }

  operator hid_t() const { return id_; }
  bool close() { return id_ < 0 || close_(std::exchange(id_, -1)) >= 0; }

 private:
  hid_t id_;
  Close close_;
};

// Keeps libhdf5 from printing its errors; they are read from its stack instead.
class QuietErrors {
 public:
  QuietErrors() {
    // A file that libhdf5 could not close would be written again at exit, and crash it. All files
    // are closed by hand.
    [[maybe_unused]] static const herr_t once = H5dont_atexit();
    H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  ~QuietErrors() { H5Eset_auto2(H5E_DEFAULT, function_, data_); }

 private:
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

// The innermost message, which holds errno and its text when a file call failed.
std::string last_error() {
  std::string text = "unknown error";
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned n, const H5E_error2_t* error, void* data) -> herr_t {
        if (n == 0 && error->desc != nullptr) *static_cast<std::string*>(data) = error->desc;
        return 0;
      },
      &text);
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

[[noreturn]] void fail_hdf5(const std::string& what) {
  const auto reason = last_error();
  const std::string_view before = "errno = ";
  const auto at = reason.find(before);
  throw StorageError(StorageError::Kind::kIo, "[checkpoint] libhdf5 cannot " + what + ": " + reason,
                     at == std::string::npos ? 0 : std::atoi(&reason[at + before.size()]));
}

hid_t valid(hid_t id, const std::string& what) {
  if (id < 0) fail_hdf5(what);
  return id;
}

void done(herr_t result, const std::string& what) {
  if (result < 0) fail_hdf5(what);
}

Handle brain_float_type() {
  Handle type(valid(H5Tcopy(H5T_IEEE_F32LE), "make a type"), H5Tclose);
  // Fields first: the size may only shrink around them.
  done(H5Tset_fields(type, 15, 7, 8, 0, 7), "make bfloat16");
  done(H5Tset_precision(type, 16), "make bfloat16");
  done(H5Tset_size(type, 2), "make bfloat16");
  done(H5Tset_ebias(type, 127), "make bfloat16");
  return type;
}

Handle complex_type(hid_t part, size_t bytes) {
  Handle type(valid(H5Tcreate(H5T_COMPOUND, 2 * bytes), "make a type"), H5Tclose);
  done(H5Tinsert(type, "r", 0, part), "make complex");
  done(H5Tinsert(type, "i", bytes, part), "make complex");
  return type;
}

Handle boolean_type() {
  Handle type(valid(H5Tenum_create(H5T_STD_I8LE), "make a type"), H5Tclose);
  const signed char no = 0, yes = 1;
  done(H5Tenum_insert(type, "FALSE", &no), "make bool");
  done(H5Tenum_insert(type, "TRUE", &yes), "make bool");
  return type;
}

Handle type_of(const std::string& dtype) {
  if (dtype == "bfloat16") return brain_float_type();
  if (dtype == "bool") return boolean_type();
  if (dtype == "complex64") return complex_type(H5T_IEEE_F32LE, 4);
  if (dtype == "complex128") return complex_type(H5T_IEEE_F64LE, 8);
  hid_t type = H5T_STD_U8LE;  // also the 8-bit floats, whose attribute torch_dtype names them
  if (dtype == "float32") type = H5T_IEEE_F32LE;
  if (dtype == "float64") type = H5T_IEEE_F64LE;
  if (dtype == "int8") type = H5T_STD_I8LE;
  if (dtype == "int16") type = H5T_STD_I16LE;
  if (dtype == "int32") type = H5T_STD_I32LE;
  if (dtype == "int64") type = H5T_STD_I64LE;
  if (dtype == "uint16") type = H5T_STD_U16LE;
  if (dtype == "uint32") type = H5T_STD_U32LE;
  if (dtype == "uint64") type = H5T_STD_U64LE;
  // float16 is IEEE binary16, made from binary32 as brain_float_type() is.
  if (dtype == "float16") {
    Handle half(valid(H5Tcopy(H5T_IEEE_F32LE), "make a type"), H5Tclose);
    done(H5Tset_fields(half, 15, 10, 5, 0, 10), "make float16");
    done(H5Tset_precision(half, 16), "make float16");
    done(H5Tset_size(half, 2), "make float16");
    done(H5Tset_ebias(half, 15), "make float16");
    return half;
  }
  return Handle(valid(H5Tcopy(type), "make a type"), H5Tclose);
}

Handle space_of(const std::vector<int64_t>& shape) {
  const std::vector<hsize_t> sizes(shape.begin(), shape.end());
  return Handle(
      valid(sizes.empty() ? H5Screate(H5S_SCALAR)
                          : H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr),
            "make a shape"),
      H5Sclose);
}

void write_attribute(hid_t object, const std::string& name, hid_t type, const void* value) {
  const Handle space(valid(H5Screate(H5S_SCALAR), "make a shape"), H5Sclose);
  const Handle properties(valid(H5Pcreate(H5P_ATTRIBUTE_CREATE), "make properties"), H5Pclose);
  done(H5Pset_char_encoding(properties, H5T_CSET_UTF8), "set an encoding");
  const Handle attribute(
      valid(H5Acreate2(object, name.c_str(), type, space, properties, H5P_DEFAULT),
            "make the attribute '" + name + "'"),
      H5Aclose);
  done(H5Awrite(attribute, type, value), "write the attribute '" + name + "'");
}

// Of variable length, which h5py reads as str. A NUL ends it here; the manifest keeps all of it.
void write_text(hid_t object, const std::string& name, const std::string& text) {
  const Handle type(valid(H5Tcopy(H5T_C_S1), "make a type"), H5Tclose);
  done(H5Tset_size(type, H5T_VARIABLE), "size a text");
  done(H5Tset_cset(type, H5T_CSET_UTF8), "set an encoding");
  const char* value = text.c_str();
  write_attribute(object, name, type, &value);
}

void write_integer(hid_t object, const std::string& name, int64_t value) {
  write_attribute(object, name, H5T_NATIVE_INT64, &value);
}

Handle make_group(hid_t parent, const char* name) {
  return Handle(valid(H5Gcreate2(parent, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                      std::string("make the group ") + name),
                H5Gclose);
}

void write_description(hid_t file, const Manifest& manifest) {
  const auto group = make_group(file, kReservedGroup);
  write_integer(group, "format", manifest.format);
  write_text(group, "uuid", manifest.uuid);
  write_integer(group, "step", manifest.step);
  write_integer(group, "sequence", manifest.sequence);
  const auto notes = make_group(group, "notes");
  for (const auto& [name, text] : manifest.notes) write_text(notes, name, text);
  const auto metrics = make_group(group, "metrics");
  for (const auto& [name, value] : manifest.metrics) {
    write_attribute(metrics, name, H5T_NATIVE_DOUBLE, &value);
  }
  const auto scalars = make_group(group, "scalars");
  for (const auto& [name, scalar] : manifest.scalars) {
    if (const auto* integer = std::get_if<int64_t>(&scalar)) {
      write_integer(scalars, name, *integer);
    } else if (const auto* number = std::get_if<double>(&scalar)) {
      write_attribute(scalars, name, H5T_NATIVE_DOUBLE, number);
    } else {
      write_text(scalars, name, std::get<std::string>(scalar));
    }
  }
}

Handle create_file(const std::string& path, const Manifest& manifest) {
  size_t text = 0;
  for (const auto& [name, note] : manifest.notes) text += name.size() + note.size();
  for (const auto& [name, scalar] : manifest.scalars) text += name.size() + 64;
  const Handle access(valid(H5Pcreate(H5P_FILE_ACCESS), "make properties"), H5Pclose);
  // The 1.8 format: checksums on all metadata, and a file that opens after a crash.
  done(H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_V18), "set the format");
  done(H5Pset_alignment(access, 1, kPageBytes), "set the alignment");
  // One block for all metadata, away from the tensors' pages.
  done(H5Pset_meta_block_size(
           access, std::max<hsize_t>(1 << 20, 2048 * manifest.tensors.size() + 2 * text)),
       "set the metadata block");
  done(H5Pset_file_locking(access, false, true), "turn its locking off");
  const Handle creation(valid(H5Pcreate(H5P_FILE_CREATE), "make properties"), H5Pclose);
  return Handle(
      valid(H5Fcreate(path.c_str(), H5F_ACC_EXCL, creation, access), "create '" + path + "'"),
      H5Fclose);
}

void create_dataset(hid_t file, hid_t links, TensorRecord& tensor) {
  const Handle properties(valid(H5Pcreate(H5P_DATASET_CREATE), "make properties"), H5Pclose);
  done(H5Pset_layout(properties, H5D_CONTIGUOUS), "set the layout");
  done(H5Pset_alloc_time(properties, H5D_ALLOC_TIME_EARLY), "set the allocation");
  done(H5Pset_fill_time(properties, H5D_FILL_TIME_NEVER), "set the filling");
  done(H5Pset_obj_track_times(properties, false), "set the times");
  const auto type = type_of(tensor.dtype);
  const auto space = space_of(tensor.shape);
  const Handle dataset(
      valid(H5Dcreate2(file, tensor.name.c_str(), type, space, links, properties, H5P_DEFAULT),
            "create the dataset '" + tensor.name + "'"),
      H5Dclose);
  write_text(dataset, "torch_dtype", tensor.dtype);
  write_text(dataset, "class", tensor.state_class);
  tensor.bytes = dtype_bytes(tensor.dtype);
  for (const auto size : tensor.shape) tensor.bytes *= size;
  const auto offset = H5Dget_offset(dataset);
  if (tensor.bytes == 0) {
    tensor.offset = 0;
  } else if (offset == HADDR_UNDEF || offset % kPageBytes != 0) {
    throw StorageError(StorageError::Kind::kIo, "[checkpoint] libhdf5 gave '" + tensor.name +
                                                    "' no place of its own in the file");
  } else {
    tensor.offset = static_cast<int64_t>(offset);
  }
}

// libhdf5 would fail in the middle, with a message about links.
void check_names(const Manifest& manifest) {
  std::vector<std::string> names;
  for (const auto& tensor : manifest.tensors) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  for (const auto& name : names) {
    const auto below = std::lower_bound(names.begin(), names.end(), name + "/");
    if (below != names.end() && below->rfind(name + "/", 0) == 0) {
      throw StorageError(StorageError::Kind::kUsage, "[checkpoint] '" + name +
                                                         "' is a tensor, so '" + *below +
                                                         "' cannot lie under it; rename one");
    }
  }
}

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
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_file_locking(access, false, true);
  const Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), H5Fclose);
  if (file < 0) return {"libhdf5 cannot open '" + path + "': " + last_error()};
  std::map<std::string_view, const TensorRecord*> by_name;
  for (const auto& tensor : manifest.tensors) by_name[tensor.name] = &tensor;
  for (const auto& tensor : manifest.tensors) {
    const auto& holder = tensor.tied_to.empty() ? tensor : *by_name.at(tensor.tied_to);
    compare_dataset(file, tensor, holder, problems);
  }
  return problems;
}

// The child's side of compare_container(). Never returns: what is above this on the stack belongs
// to the parent.
[[noreturn]] void compare_in_child(int out, const std::string& path, const Manifest& manifest) {
  try {
    // A damaged file may also keep libhdf5 busy for ever.
    ::signal(SIGALRM, SIG_DFL);
    ::alarm(kMostChildSeconds);
    std::string text;
    for (const auto& problem : compare_here(path, manifest)) text += problem + "\n";
    for (size_t sent = 0; sent < text.size();) {
      const auto count = ::write(out, text.data() + sent, text.size() - sent);
      if (count <= 0) ::_exit(2);
      sent += count;
    }
    ::_exit(0);
  } catch (...) {
    ::_exit(2);
  }
}

}  // namespace

void create_container(const std::string& path, Manifest& manifest) {
  const QuietErrors quiet;
  check_names(manifest);
  auto file = create_file(path, manifest);
  write_description(file, manifest);
  const Handle links(valid(H5Pcreate(H5P_LINK_CREATE), "make properties"), H5Pclose);
  done(H5Pset_create_intermediate_group(links, 1), "set links");
  done(H5Pset_char_encoding(links, H5T_CSET_UTF8), "set an encoding");
  for (auto& tensor : manifest.tensors) {
    if (tensor.tied_to.empty()) create_dataset(file, links, tensor);
  }
  for (const auto& tensor : manifest.tensors) {
    if (tensor.tied_to.empty()) continue;
    done(
        H5Lcreate_hard(file, tensor.tied_to.c_str(), file, tensor.name.c_str(), links, H5P_DEFAULT),
        "link '" + tensor.name + "'");
  }
  if (!file.close()) fail_hdf5("close '" + path + "'");
}

std::vector<std::string> compare_container(const std::string& path, const Manifest& manifest) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return {"cannot make a pipe to check '" + path + "'"};
  const auto child = ::fork();
  if (child == 0) compare_in_child(ends[1], path, manifest);
  ::close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t count; (count = ::read(ends[0], buffer, sizeof(buffer))) != 0;) {
    if (count > 0) text.append(buffer, count);
    if (count < 0 && errno != EINTR) break;
  }
  ::close(ends[0]);
  int status = 0;
  pid_t ended = child;
  while (child > 0 && (ended = ::waitpid(child, &status, 0)) < 0 && errno == EINTR) continue;
  if (ended < 0 || status != 0) {
    text += "libhdf5 did not survive reading '" + path + "'\n";
  }
  std::vector<std::string> problems;
  for (size_t start = 0, end; (end = text.find('\n', start)) != std::string::npos;
       start = end + 1) {
    problems.push_back(text.substr(start, end - start));
  }
  return problems;
}

}  // namespace ounce::ckpt
