// SPDX-License-Identifier: MIT
#define XXH_INLINE_ALL
#include <ounce/ckpt/sums.h>
#include <xxhash.h>

namespace ounce::ckpt {

uint64_t block_sum(const void* data, size_t size) { return XXH3_64bits(data, size); }

struct RunningSum::State {
  XXH3_state_t hash;
};

RunningSum::RunningSum() : state_(new State) { XXH3_128bits_reset(&state_->hash); }
RunningSum::~RunningSum() = default;

void RunningSum::add(const void* data, size_t size) {
  XXH3_128bits_update(&state_->hash, data, size);
}

std::string RunningSum::digits() const {
  const auto sum = XXH3_128bits_digest(&state_->hash);
  return hex_digits(sum.high64) + hex_digits(sum.low64);
}

std::string hex_digits(uint64_t value) {
  std::string text(16, '0');
  for (int place = 15; place >= 0; --place, value >>= 4) {
    text[place] = "0123456789abcdef"[value & 15];
  }
  return text;
}

bool parse_hex_digits(std::string_view text, uint64_t& value) {
  if (text.size() != 16) return false;
  value = 0;
  for (const char digit : text) {
    const auto place = std::string_view("0123456789abcdef").find(digit);
    if (place == std::string_view::npos) return false;
    value = value << 4 | place;
  }
  return true;
}

}  // namespace ounce::ckpt
