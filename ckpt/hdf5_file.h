// SPDX-License-Identifier: MIT
// The HDF5 container of a step. libhdf5 writes its description only (groups, datasets, attributes);
// the values are written afterwards, by plain writes at the offsets found here. A file that exists
// is read by libhdf5 in a child process only, because a damaged one can crash it or keep it busy.
// No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/manifest.h>

#include <string>
#include <vector>

namespace ounce::ckpt {

// Creates `path`, which must not exist, with a contiguous dataset without fill for each tensor of
// `manifest`, 4 KiB apart, and sets offset and bytes of every one. Tied tensors become hard links.
// The group /_ckpt holds what the step is, the scalars and the notes as attributes. The file is
// closed when this returns; its values are holes. Throws StorageError (kIo; kUsage when a name is
// both a tensor and a group).
void create_container(const std::string& path, Manifest& manifest);

// Compares a container with the manifest: names, shapes, types, offsets; returns what differs. A
// child that dies, or takes more than a minute, is one of the problems returned.
std::vector<std::string> compare_container(const std::string& path, const Manifest& manifest);

struct Hdf5Contents {
  // Name, dtype, shape, offset in the file, bytes. Datasets in the same place are tied; each has
  // its own offset and bytes all the same.
  std::vector<TensorRecord> tensors;
  bool of_step = false;  // it is the data file of a step: names are full
};

// The datasets of any HDF5 file, by name. The dtype is that of the HDF5 type, or what the attribute
// torch_dtype says where both agree. Every number is checked here again: shapes against bytes,
// extents inside the file and apart. Throws StorageError: kMissing, kIo; kDamaged for a file that
// libhdf5 cannot read or does not survive, and one that lists all datasets whose values do not lie
// in one piece of this file (chunked, compressed, compact, never written) or are no tensor's.
Hdf5Contents list_datasets(FileSystem& files, const std::string& path);

}  // namespace ounce::ckpt
