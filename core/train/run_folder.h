// SPDX-License-Identifier: MIT
// The folder of one run: config.toml metrics.jsonl events.out.tfevents.* ckpt/ samples.txt
#pragma once

#include <ounce/core/options.h>

#include <string>
#include <vector>

namespace ounce {

class RunFolder {
 public:
  // Fault::kUsage where a folder of a new run holds something already: nothing is overwritten.
  static void check_free(const std::string& path);
  // A new folder: `path`, or the first free runs/<name>-<n> when it is empty. Writes config.toml.
  static RunFolder create(const std::string& path, const std::string& name, const Options& config);
  // An existing run. Without config.toml: Fault::kNotFound.
  static RunFolder open(const std::string& path);
  // The newest runs/<name>-<n>; none: Fault::kNotFound.
  static RunFolder newest(const std::string& name);

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  // Complete, as read_config makes it.
  Options config() const;
  // Replaces config.toml durably in one step (a resumed run may change intervals).
  void write_config(const Options& config) const;
  // The folders of the checkpoints, level by level; below the run unless absolute.
  std::vector<std::string> checkpoints(const Options& config) const;

 private:
  explicit RunFolder(std::string path) : path_(std::move(path)) {}

  std::string path_;
};

}  // namespace ounce
