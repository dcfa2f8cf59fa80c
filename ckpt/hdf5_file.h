// SPDX-License-Identifier: MIT
// The HDF5 container of a step. libhdf5 writes its description only (groups, datasets, attributes);
// the values are written afterwards, by plain writes at the offsets found here, and libhdf5 never
// reads a file to load it. No Torch here.
#pragma once

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

// Compares a container with the manifest through libhdf5: names, shapes, types, offsets; returns
// what differs. Done in a child process, because a damaged file can crash libhdf5 or keep it busy:
// a child that dies, or takes more than a minute, is one of the problems returned.
std::vector<std::string> compare_container(const std::string& path, const Manifest& manifest);

}  // namespace ounce::ckpt
