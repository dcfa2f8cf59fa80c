// SPDX-License-Identifier: MIT
// Loading: Torch's side of StepReader.
#pragma once

#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/reader.h>
#include <ounce/ckpt/snapshot.h>
#include <ounce/ckpt/storage_error.h>
#include <ounce/core/check.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace ounce::ckpt {

CheckpointInfo info_of(const Manifest& manifest, const std::string& path);

// A tensor of a step on the host, verified. Allocates its bytes. Throws StorageError.
at::Tensor read_tensor(const StepReader& reader, const TensorRecord& tensor);

// The folder of the step that `path` means: a step folder itself; of a root or a run folder `step`,
// or the newest step with a good manifest, with a warning (TORCH_WARN) for each bad one. Throws
// ounce::Error (kNotFound, kData, kNewerFormat).
std::string resolve_step(FileSystem& files, const std::string& path,
                         std::optional<int64_t> step = std::nullopt);

// Reads the step that `paths` mean (load_checkpoint()). Where `use` throws StorageError, because
// bytes are damaged, it is called for the next older step, and so on; the steps passed over are in
// the report. Throws StorageError and ounce::Error.
LoadReport read_step(std::shared_ptr<FileSystem> files, const std::vector<std::string>& paths,
                     std::optional<int64_t> step, bool direct,
                     const std::function<void(const StepReader&)>& use);

[[noreturn]] void rethrow(const StorageError& error);

// Runs `action`; a StorageError becomes an ounce::Error of the matching Fault.
template <class Action>
auto with_faults(const Action& action) -> decltype(action()) {
  try {
    return action();
  } catch (const StorageError& error) {
    rethrow(error);
  }
}

}  // namespace ounce::ckpt
