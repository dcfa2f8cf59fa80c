// SPDX-License-Identifier: MIT
// Writes what a Capture copies as a step of a root, and commits it (FORMAT.md, "Commit").
#pragma once

#include <ounce/ckpt/capture.h>
#include <ounce/ckpt/vote.h>

#include <functional>
#include <string>
#include <vector>

namespace ounce::ckpt {

struct WriteRequest {
  std::string root;
  SyncPolicy sync = SyncPolicy::kFull;
  bool direct = true;
  int64_t writers = 4;
  Manifest manifest;  // uuid, step, sequence, names, shapes, dtypes; the rest is filled in
  // Called when a phase begins: create, data, sync, manifest, publish. May be empty.
  std::function<void(const char* phase)> on_phase;
  // Asked before the step is published: false = it was cancelled.
  std::function<bool()> may_publish;
};

struct WriteResult {
  Manifest manifest;
  std::string path;
  int64_t retries = 0;
  std::vector<std::string> warnings;
};

// On return the step is durable. Throws StorageError, or ounce::Error (kProblem) with the capture's
// failure; the temporary folder is then gone and every older step untouched.
WriteResult write_step(FileSystem& files, Vote& vote, const WriteRequest& request,
                       Capture& capture);

}  // namespace ounce::ckpt
