// SPDX-License-Identifier: MIT
// Tensors of other programs' files as a step.
#pragma once

#include <ounce/ckpt/checkpointer.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace ounce::ckpt {

struct ImportOptions {
  // Put before every name. None: what an export left out, nothing for the data file of a step, and
  // model/ for any other file.
  std::optional<std::string> prefix = std::nullopt;
  bool replace = false;  // a step of this number that is there already
  std::shared_ptr<FileSystem> file_system = nullptr;
};

struct ImportReport {
  CheckpointInfo info;  // of the step that was written
  std::string prefix;
  int64_t tensors = 0;
  std::vector<std::string> warnings;
};

// `file`: a .safetensors file; the .json index of its shards, which lie beside it; or an HDF5 file
// (.h5, .hdf5) of contiguous datasets. Links are followed, as model caches are made of them. Writes
// step `step` into the folder `root`, with no other step removed. Allocates the bytes of the
// tensors.
//
// These formats hold no sums: structure, sizes and extents are checked, values are taken as they
// are. libhdf5 reads the structure of a file in a child process (hdf5_file.h), this process the
// values. Throws ounce::Error: kUsage for a name of another kind, a step that is there already and
// names that cannot be stored; kNotFound; kData for damage, for a child that died and for datasets
// that cannot be imported, all of them named.
ImportReport import_step(const std::string& file, const std::string& root, int64_t step,
                         const ImportOptions& options = {});

}  // namespace ounce::ckpt
