// SPDX-License-Identifier: MIT
// Checksums: XXH3 with 64 bits for a block, 128 bits for what stands for a whole file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace ounce::ckpt {

uint64_t block_sum(const void* data, size_t size);

// XXH3-128 of pieces one after the other, as 32 hexadecimal digits.
class RunningSum {
 public:
  RunningSum();
  ~RunningSum();
  void add(const void* data, size_t size);
  std::string digits() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// 16 lower-case hexadecimal digits and back; false when the text is not exactly that.
std::string hex_digits(uint64_t value);
bool parse_hex_digits(std::string_view text, uint64_t& value);

}  // namespace ounce::ckpt
