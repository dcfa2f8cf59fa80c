// SPDX-License-Identifier: MIT
// A dataset that is two token streams: everything but the meaning of its tokens.
#pragma once

#include <ounce/core/data/windows.h>

#include <string>
#include <utility>
#include <vector>

namespace ounce::data {

class WindowedDataset : public Dataset {
 public:
  int64_t train_tokens() const override { return windows_.train_tokens(); }
  int64_t valid_tokens() const override { return windows_.valid_tokens(); }
  Batch train_batch(int64_t index) const override { return windows_.train_batch(index); }
  int64_t valid_batches() const override { return windows_.valid_batches(); }
  Batch valid_batch(int64_t index) const override { return windows_.valid_batch(index); }
  std::string identity() const override { return identity_; }
  std::vector<std::string> describe() const override {
    auto lines = description_;
    lines.push_back(std::to_string(train_tokens()) + " training tokens, " +
                    std::to_string(valid_tokens()) + " for validation; an epoch is " +
                    std::to_string(windows_.batches_per_epoch()) + " batches");
    return lines;
  }

 protected:
  WindowedDataset(Windows windows, std::string identity, std::vector<std::string> description)
      : windows_(std::move(windows)),
        identity_(std::move(identity)),
        description_(std::move(description)) {}

 private:
  Windows windows_;
  std::string identity_;
  std::vector<std::string> description_;
};

}  // namespace ounce::data
