// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <ounce/core/check.h>
#include <ounce/core/data/files.h>
#include <ounce/core/data/token_shards.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace ounce::data {

namespace {

static_assert(std::endian::native == std::endian::little, "shards are mapped as they are");

constexpr int64_t kHeaderBytes = 256 * 4;

struct Format {
  int32_t magic;
  int32_t version;
  int64_t width;
};
constexpr Format kFormats[] = {{20240520, 1, 2}, {20240801, 7, 4}};

}  // namespace

TokenShard::TokenShard(const std::string& path) : path_(path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const auto fail_open = [&](int error) {
    if (fd >= 0) close(fd);
    fail(Fault::kData, "[data] tokens: cannot read '", path,
         "': ", std::generic_category().message(error));
  };
  struct stat status = {};
  if (fd < 0 || fstat(fd, &status) != 0) fail_open(errno);
  if (!S_ISREG(status.st_mode)) fail_open(S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
  if (status.st_size < kHeaderBytes) {
    close(fd);
    fail(Fault::kData, "[data] tokens: '", path, "' has ", status.st_size,
         " bytes, less than the header of a shard (", kHeaderBytes, "); fetch or make it again");
  }
  mapped_ = status.st_size;
  void* mapping = mmap(nullptr, mapped_, PROT_READ, MAP_PRIVATE, fd, 0);
  if (mapping == MAP_FAILED) fail_open(errno);
  close(fd);
  data_ = static_cast<const char*>(mapping);
  try {
    check_header(mapped_);
  } catch (...) {
    munmap(mapping, mapped_);
    throw;
  }
}

TokenShard::~TokenShard() { munmap(const_cast<char*>(data_), mapped_); }

void TokenShard::check_header(size_t bytes) {
  int32_t header[3];
  std::memcpy(header, data_, sizeof header);
  for (const auto& format : kFormats) {
    if (header[0] == format.magic && header[1] == format.version) width_ = format.width;
  }
  OUNCE_CHECK_AS(Fault::kData, width_ != 0, "[data] tokens: '", path_,
                 "' is not a shard of llm.c: expected magic 20240520 version 1 or magic 20240801 "
                 "version 7, got ",
                 header[0], " version ", header[1],
                 "; give .bin files that llm.c's data scripts wrote");
  tokens_ = header[2];
  const int64_t wanted = kHeaderBytes + tokens_ * width_;
  OUNCE_CHECK_AS(Fault::kData, tokens_ > 0 && wanted == static_cast<int64_t>(bytes),
                 "[data] tokens: '", path_, "' is damaged: its header says ", tokens_,
                 " tokens, expected ", wanted, " bytes, got ", bytes, "; fetch or make it again");
}

template <class T>
void TokenShard::copy(int64_t begin, int64_t count, int64_t vocab_size, int64_t* out) const {
  const auto* tokens = reinterpret_cast<const T*>(data_ + kHeaderBytes);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = tokens[begin + i];
    if (out[i] < vocab_size) continue;
    fail(Fault::kData, "[data] tokens: '", path_, "': the id ", out[i], " at token ", begin + i,
         " (byte ", kHeaderBytes + (begin + i) * width_, ") is outside the vocabulary of ",
         vocab_size, "; set data.vocab_size to that of the tokenizer, or make the shard again");
  }
}

void TokenShard::read(int64_t begin, int64_t count, int64_t vocab_size, int64_t* out) const {
  if (width_ == 2) {
    copy<uint16_t>(begin, count, vocab_size, out);
  } else {
    copy<uint32_t>(begin, count, vocab_size, out);
  }
}

uint64_t TokenShard::fingerprint() const {
  constexpr size_t kWhole = size_t{64} << 20;
  constexpr size_t kPieces = 256;
  constexpr size_t kPiece = size_t{64} << 10;
  if (mapped_ <= kWhole) return hash64({data_, mapped_});
  std::string pieces(data_, kHeaderBytes);
  for (size_t i = 0; i < kPieces; ++i) {
    pieces.append(data_ + (mapped_ - kPiece) * i / (kPieces - 1), kPiece);
  }
  return hash64(pieces);
}

ShardSource::ShardSource(std::vector<std::shared_ptr<const TokenShard>> shards, int64_t vocab_size,
                         int64_t begin, int64_t end)
    : shards_(std::move(shards)), starts_{0}, vocab_size_(vocab_size), begin_(begin), end_(end) {
  for (const auto& shard : shards_) starts_.push_back(starts_.back() + shard->size());
  if (end_ < 0) end_ = starts_.back();
}

void ShardSource::read(int64_t begin, int64_t count, int64_t* out) const {
  begin += begin_;
  // The shard that holds `begin`: the last one that starts at or before it.
  auto shard = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
  while (count > 0) {
    const int64_t piece = std::min(count, starts_[shard + 1] - begin);
    shards_[shard]->read(begin - starts_[shard], piece, vocab_size_, out);
    begin += piece;
    out += piece;
    count -= piece;
    ++shard;
  }
}

}  // namespace ounce::data
