// SPDX-License-Identifier: MIT
// GPT-2's byte-level vocabulary: token ids to text and, for prompts, back.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace ounce::data {

class Gpt2Vocabulary {
 public:
  // `path`: encoder.json (also called vocab.json) of GPT-2, an object of token -> id in which every
  // byte of a token is written as one printable character (bytes_to_unicode of openai/gpt-2). Ids
  // must be below `vocab_size`. Fault::kData when it is anything else.
  Gpt2Vocabulary(const std::string& path, int64_t vocab_size);

  // Ids without an entry (a vocabulary padded for speed) become U+FFFD.
  std::string decode(const std::vector<int64_t>& tokens) const;
  // The longest entry that fits, again and again. The tokens decode to `text`, but GPT-2's own
  // merges may cut it in other places: good for prompts, not for making training data.
  // Fault::kUsage at a byte that no entry begins with.
  std::vector<int64_t> encode(const std::string& text) const;

 private:
  void add(const std::string& key, int64_t id);

  std::string path_;
  std::vector<std::string> texts_;  // by id; empty = no entry
  std::unordered_map<std::string, int64_t> ids_;
  size_t longest_ = 0;
};

}  // namespace ounce::data
