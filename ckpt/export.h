// SPDX-License-Identifier: MIT
// The tensors of a step as .safetensors files.
#pragma once

#include <ounce/ckpt/checkpointer.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace ounce::ckpt {

struct ExportOptions {
  std::optional<int64_t> step = std::nullopt;  // none = the newest good one
  // false: the tensors under model/, without that prefix; true: every tensor, under its full name.
  bool all = false;
  // float32, float16 or bfloat16: what floating tensors become, rounded to nearest, ties to even;
  // empty = as stored.
  std::string dtype = "";
  int64_t shard_bytes = 0;  // most bytes of values a file, but one tensor at least; 0 = one file
  bool replace = false;     // an export that is there already
  std::shared_ptr<FileSystem> file_system = nullptr;
};

struct ExportReport {
  CheckpointInfo info;             // of the step
  std::vector<std::string> files;  // paths: the shards in order, then their index
  int64_t tensors = 0;
  int64_t bytes = 0;                  // of values
  int64_t overflowed = 0;             // finite values that the new dtype cannot hold: now infinite
  std::vector<std::string> rejected;  // newer steps that were passed over, with the reason each
};

// `path`: a root, run folder or step folder. `out`: a file "*.safetensors", or a folder, which gets
// model.safetensors, or model-00001-of-0000N.safetensors and so on with the index that Hugging Face
// loaders read. Shards are filled in the order of names; in a file larger elements come first, then
// names. The header's metadata: format "pt", step, uuid, and prefix, what was left out of the
// names.
//
// A tied tensor is written under each of its names, because the format shares no bytes and who
// loads the file expects every name. Scalars and notes are not exported. Without a step, a damaged
// one is passed over for the next older one, as load_checkpoint() does.
//
// Every byte is verified as it is read; memory is that of one tensor and less than 100 MiB.
// The files appear together, durable, when the last is whole; a failure leaves nothing, and before
// that whatever was there. Throws ounce::Error: kUsage for an existing target without `replace`, a
// dtype that the format lacks (complex128) and names it cannot hold; kNotFound; kData, for a full
// disk with the bytes needed and free, told before anything is written where the disk tells.
ExportReport export_safetensors(const std::string& path, const std::string& out,
                                const ExportOptions& options = {});

}  // namespace ounce::ckpt
