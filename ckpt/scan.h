// SPDX-License-Identifier: MIT
// The steps under a root. The folder itself decides what is there; LATEST is only written for
// people and never read. No Torch here.
#pragma once

#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/manifest.h>

#include <string>
#include <vector>

namespace ounce::ckpt {

struct StepEntry {
  std::string path;
  Manifest manifest;
};

struct BadStep {
  std::string path;
  int64_t step = 0;
  std::string problem;
  bool newer_format = false;
};

struct Scan {
  std::vector<StepEntry> steps;  // by sequence, newest first
  std::vector<BadStep> bad;      // step folders whose manifest does not hold
};

// The manifest of a step folder. The folder must be called after its step. Throws StorageError.
Manifest read_manifest(FileSystem& files, const std::string& folder);

// Reads only: a step that a dead writer left under its `.old-` name is listed as it lies. Throws
// StorageError when the root cannot be listed (kMissing: it is not there).
Scan scan_root(FileSystem& files, const std::string& root);

// A run folder stands for its ckpt/ folder; other paths stand for themselves, without slashes at
// the end.
std::string root_of(FileSystem& files, const std::string& path);

bool is_step_folder(FileSystem& files, const std::string& path);

}  // namespace ounce::ckpt
