// SPDX-License-Identifier: MIT
// A keyed permutation of [0, n) that is evaluated one index at a time: no table, so an epoch over
// any number of windows is shuffled without memory, and index i of it is known without indices
// before it. A balanced Feistel network over the next power of four >= n (Luby and Rackoff 1988),
// walked until the result is below n again (Black and Rogaway 2002): below four rounds of the
// network on average.
#pragma once

#include <cstdint>

namespace ounce::data {

// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on
// every bit of x.
constexpr uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// One key of two numbers; the order of the arguments matters.
constexpr uint64_t mix64(uint64_t a, uint64_t b) { return mix64(mix64(a) ^ b); }

class KeyedPermutation {
 public:
  // n <= 2^62.
  constexpr KeyedPermutation(uint64_t n, uint64_t key) : n_(n) {
    while ((uint64_t{1} << (2 * half_)) < n) ++half_;
    mask_ = (uint64_t{1} << half_) - 1;
    for (int round = 0; round < kRounds; ++round) keys_[round] = mix64(key, round);
  }

  constexpr uint64_t size() const { return n_; }

  // Where `index` < size() goes.
  constexpr uint64_t operator()(uint64_t index) const {
    do {
      index = scramble(index);
    } while (index >= n_);
    return index;
  }

 private:
  static constexpr int kRounds = 8;

  constexpr uint64_t scramble(uint64_t index) const {
    uint64_t left = index >> half_;
    uint64_t right = index & mask_;
    for (const auto key : keys_) {
      const uint64_t next = left ^ (mix64(key + right) & mask_);
      left = right;
      right = next;
    }
    return (left << half_) | right;
  }

  uint64_t n_;
  int half_ = 0;
  uint64_t mask_ = 0;
  uint64_t keys_[kRounds] = {};
};

}  // namespace ounce::data
