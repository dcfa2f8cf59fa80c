// SPDX-License-Identifier: MIT
// Which steps go after a commit. No Torch here.
#pragma once

#include <ounce/ckpt/scan.h>

#include <string>
#include <vector>

namespace ounce::ckpt {

struct RetentionRule {
  int64_t keep_last = 3;   // 0 = keep all
  int64_t keep_every = 0;  // 0 = off
  std::string keep_best;   // metric whose best values are kept; empty = off
  int64_t best_count = 1;
  bool best_is_highest = false;
};

// A step folder that holds a file of this name is never removed.
inline constexpr const char* kPinName = "PINNED";

// Folders to remove, given the steps newest first: all but the newest one, the newest keep_last
// ones, those divisible by keep_every, the best ones and those pinned.
std::vector<std::string> steps_to_remove(FileSystem& files, const std::vector<StepEntry>& steps,
                                         const RetentionRule& rule);

// Renames each folder out of sight and makes that durable; returns the new names. Errors become
// warnings: a folder that stays costs space, not the run.
std::vector<std::string> hide_steps(FileSystem& files, const std::string& root,
                                    const std::vector<std::string>& paths,
                                    std::vector<std::string>& warnings);
// Removes what was hidden, which can take a second a file.
std::vector<std::string> remove_hidden(FileSystem& files, const std::vector<std::string>& hidden);
// Both.
std::vector<std::string> remove_steps(FileSystem& files, const std::string& root,
                                      const std::vector<std::string>& paths);

}  // namespace ounce::ckpt
