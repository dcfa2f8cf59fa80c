// SPDX-License-Identifier: MIT
// The further levels of a Checkpointer: a committed step is copied from root to root, file by file.
// No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>

#include <memory>
#include <string>
#include <vector>

namespace ounce::ckpt {

// Copies a committed step into another root, where it is the same step to the last byte. Every byte
// is verified on the way, and the protocol is that of a save. Returns warnings; throws
// StorageError. Allocates 16 MiB.
std::vector<std::string> copy_step(std::shared_ptr<FileSystem> files, const std::string& folder,
                                   const std::string& root, SyncPolicy sync, bool direct);

}  // namespace ounce::ckpt
