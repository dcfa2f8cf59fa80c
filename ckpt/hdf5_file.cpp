// SPDX-License-Identifier: MIT
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/hdf5_types.h>
#include <ounce/ckpt/layout.h>
#include <ounce/ckpt/storage_error.h>

#include <algorithm>

namespace ounce::ckpt {
namespace {

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

int64_t bytes_of(const TensorRecord& tensor) {
  auto bytes = dtype_bytes(tensor.dtype);
  for (const auto size : tensor.shape) bytes *= size;
  return bytes;
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
  tensor.bytes = bytes_of(tensor);
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

}  // namespace

void create_container(const std::string& path, Manifest& manifest) {
  const QuietErrors quiet;
  check_names(manifest);
  auto file = create_file(path, manifest);
  write_description(file, manifest);
  const Handle links(valid(H5Pcreate(H5P_LINK_CREATE), "make properties"), H5Pclose);
  done(H5Pset_create_intermediate_group(links, 1), "set links");
  done(H5Pset_char_encoding(links, H5T_CSET_UTF8), "set an encoding");
  std::vector<int64_t> bytes;
  for (const auto& tensor : manifest.tensors) bytes.push_back(bytes_of(tensor));
  for (const auto i : storage_order(bytes)) {
    auto& tensor = manifest.tensors[i];
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

}  // namespace ounce::ckpt
