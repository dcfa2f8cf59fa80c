// SPDX-License-Identifier: MIT
// Token shards as llm.c writes them (dev/data/data_common.py): a header of 256 little-endian int32,
// magic, version, number of tokens, zeros; then the tokens. Magic 20240520 with version 1 is uint16
// (GPT-2), 20240801 with version 7 is uint32 (Llama 3).
#pragma once

#include <ounce/core/data/token_source.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ounce::data {

// One file, memory-mapped, read-only. The file must not shrink while it is open.
class TokenShard {
 public:
  // Fault::kData when unreadable, not a shard, or of another size than its header says.
  explicit TokenShard(const std::string& path);
  ~TokenShard();
  TokenShard(const TokenShard&) = delete;
  TokenShard& operator=(const TokenShard&) = delete;

  int64_t size() const { return tokens_; }
  // Tokens [begin, begin + count) of this shard; an id >= vocab_size is Fault::kData.
  void read(int64_t begin, int64_t count, int64_t vocab_size, int64_t* out) const;
  // Over the width and number of tokens and what they are: all of them up to 64 MiB, beyond that
  // 256 pieces of 64 KiB, evenly spaced, so that opening a corpus does not read it.
  uint64_t fingerprint() const;

 private:
  template <class T>
  void copy(int64_t begin, int64_t count, int64_t vocab_size, int64_t* out) const;
  void check_header(size_t bytes);

  std::string path_;
  const char* data_ = nullptr;
  size_t mapped_ = 0;
  int64_t width_ = 0;  // bytes a token
  int64_t tokens_ = 0;
};

// A range of the tokens of several shards in a row.
class ShardSource final : public TokenSource {
 public:
  // Tokens [begin, end) of the concatenation; `end` < 0 = to its end.
  ShardSource(std::vector<std::shared_ptr<const TokenShard>> shards, int64_t vocab_size,
              int64_t begin = 0, int64_t end = -1);

  int64_t size() const override { return end_ - begin_; }
  void read(int64_t begin, int64_t count, int64_t* out) const override;

 private:
  std::vector<std::shared_ptr<const TokenShard>> shards_;
  std::vector<int64_t> starts_;  // of each shard, and the end of the last
  int64_t vocab_size_;
  int64_t begin_;
  int64_t end_;
};

}  // namespace ounce::data
