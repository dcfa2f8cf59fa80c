// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/data/files.h>
#include <ounce/core/data/gpt2_vocabulary.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

namespace ounce::data {

namespace {

constexpr int kCharacters = 256 + 68;

// Printable bytes of Latin-1 stand for themselves; the other 68 for U+0100 and on, in order.
constexpr bool stands_for_itself(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

// Code point -> byte, or -1.
constexpr std::array<int, kCharacters> byte_of_character() {
  std::array<int, kCharacters> bytes = {};
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    if (!stands_for_itself(byte)) bytes[byte] = -1;
    bytes[stands_for_itself(byte) ? byte : next++] = byte;
  }
  return bytes;
}

}  // namespace

Gpt2Vocabulary::Gpt2Vocabulary(const std::string& path, int64_t vocab_size)
    : path_(path), texts_(vocab_size) {
  const auto json = nlohmann::json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
  OUNCE_CHECK_AS(Fault::kData, json.is_object() && !json.empty(), "[data] vocabulary: '", path,
                 "' is not a JSON object of token to id; give GPT-2's encoder.json");
  for (const auto& [key, id] : json.items()) {
    OUNCE_CHECK_AS(Fault::kData, id.is_number_unsigned() && id.get<uint64_t>() < texts_.size(),
                   "[data] vocabulary: '", path, "': expected an id below ", vocab_size, " for '",
                   key, "', got ", id.dump(), "; set data.vocab_size to the vocabulary's");
    add(key, id.get<int64_t>());
  }
}

void Gpt2Vocabulary::add(const std::string& key, int64_t id) {
  static constexpr auto kBytes = byte_of_character();
  std::string text;
  // Every character that can occur is below U+0800: one or two bytes of valid UTF-8.
  for (size_t i = 0; i < key.size(); ++i) {
    int point = static_cast<unsigned char>(key[i]);
    if (point >= 0xc0 && i + 1 < key.size()) {
      point = (point & 0x3f) << 6 | (static_cast<unsigned char>(key[++i]) & 0x3f);
    }
    const int byte = point < kCharacters ? kBytes[point] : -1;
    OUNCE_CHECK_AS(Fault::kData, byte >= 0, "[data] vocabulary: '", path_, "': '", key,
                   "' has a character that GPT-2's byte table lacks; give GPT-2's encoder.json");
    text += static_cast<char>(byte);
  }
  OUNCE_CHECK_AS(Fault::kData, !text.empty() && texts_[id].empty(), "[data] vocabulary: '", path_,
                 "': the entry '", key, "' is empty, or its id ", id,
                 " is given twice; give GPT-2's encoder.json");
  longest_ = std::max(longest_, text.size());
  ids_.emplace(text, id);
  texts_[id] = std::move(text);
}

std::string Gpt2Vocabulary::decode(const std::vector<int64_t>& tokens) const {
  std::string text;
  for (const auto token : tokens) {
    OUNCE_CHECK(token >= 0 && token < static_cast<int64_t>(texts_.size()),
                "[data] vocabulary: expected an id in [0, ", texts_.size(), "), got ", token);
    text += texts_[token].empty() ? "\xef\xbf\xbd" : texts_[token];
  }
  return text;
}

std::vector<int64_t> Gpt2Vocabulary::encode(const std::string& text) const {
  std::vector<int64_t> tokens;
  for (size_t at = 0; at < text.size();) {
    auto length = std::min(longest_, text.size() - at);
    auto found = ids_.end();
    for (; length > 0; --length) {
      found = ids_.find(text.substr(at, length));
      if (found != ids_.end()) break;
    }
    OUNCE_CHECK(found != ids_.end(), "[data] vocabulary: '", path_, "' has no entry for byte ", at,
                " of the text '", text, "'; leave it out");
    tokens.push_back(found->second);
    at += length;
  }
  return tokens;
}

}  // namespace ounce::data
