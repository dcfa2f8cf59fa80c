// SPDX-License-Identifier: MIT
// A stream of tokens that can be read anywhere: what a split of a dataset is to the code that cuts
// it into rows. Immutable, so that reads need no lock.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace ounce::data {

class TokenSource {
 public:
  virtual ~TokenSource() = default;

  virtual int64_t size() const = 0;  // tokens
  // Copies the tokens [begin, begin + count) of [0, size()) to `out`. Throws Fault::kData when one
  // is outside the vocabulary.
  virtual void read(int64_t begin, int64_t count, int64_t* out) const = 0;
};

// Bytes as tokens 0 to 255. Holds them.
class ByteSource final : public TokenSource {
 public:
  explicit ByteSource(std::string bytes) : bytes_(std::move(bytes)) {}

  const std::string& bytes() const { return bytes_; }
  int64_t size() const override { return static_cast<int64_t>(bytes_.size()); }
  void read(int64_t begin, int64_t count, int64_t* out) const override {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<unsigned char>(bytes_[begin + i]);
  }

 private:
  std::string bytes_;
};

}  // namespace ounce::data
