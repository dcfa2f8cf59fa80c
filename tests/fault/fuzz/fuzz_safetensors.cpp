// SPDX-License-Identifier: MIT
// SafetensorsReader on any file: as it is, and with the length that its header would need.
#include <errno.h>
#include <ounce/ckpt/safetensors.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "fuzz.h"

namespace ounce::ckpt::fuzz {
namespace {

constexpr size_t kPrefix = 8;      // bytes of the header's length
constexpr size_t kValues = 4096;   // bytes behind a header, so that shapes find values
constexpr size_t kMostRead = 100;  // bytes a call, so that reading loops

// One file that can only be read.
class OneFile : public FileSystem {
 public:
  explicit OneFile(std::string bytes) : bytes_(std::move(bytes)) {}

  int open(const std::string&, Mode mode, int& descriptor) override {
    descriptor = 3;
    return mode == Mode::kRead ? 0 : EROFS;
  }
  int pread(int, void* data, size_t size, int64_t offset, size_t& done) override {
    expect(offset >= 0, "no read begins before the file");
    const auto from = std::min(static_cast<size_t>(offset), bytes_.size());
    done = std::min({size, bytes_.size() - from, kMostRead});
    std::memcpy(data, bytes_.data() + from, done);
    return 0;
  }
  int stat(const std::string&, FileInfo& info) override {
    info = {FileKind::kFile, static_cast<int64_t>(bytes_.size())};
    return 0;
  }
  int close(int) override { return 0; }

  int pwrite(int, const void*, size_t, int64_t, size_t&) override { return EROFS; }
  int allocate(int, int64_t) override { return EROFS; }
  int sync(int) override { return EROFS; }
  int rename(const std::string&, const std::string&) override { return EROFS; }
  int exchange(const std::string&, const std::string&) override { return EROFS; }
  int sync_directory(const std::string&) override { return EROFS; }
  int make_directory(const std::string&) override { return EROFS; }
  int unlink(const std::string&) override { return EROFS; }
  int remove_directory(const std::string&) override { return EROFS; }
  int list(const std::string&, std::vector<std::string>&) override { return ENOTDIR; }
  int free_bytes(const std::string&, int64_t&) override { return EROFS; }

 private:
  std::string bytes_;
};

// The bytes with the length of everything from the ninth to the last brace before them, and values
// behind that.
std::string with_length(std::string_view bytes) {
  bytes.remove_prefix(std::min(kPrefix, bytes.size()));
  const auto length = bytes.rfind('}') + 1;
  std::string result(kPrefix, '\0');
  for (size_t i = 0; i < kPrefix; ++i) result[i] = static_cast<char>(length >> (8 * i));
  return result.append(bytes) + std::string(kValues, '\0');
}

void feed(const std::string& bytes) {
  const auto files = std::make_shared<OneFile>(bytes);
  std::unique_ptr<SafetensorsReader> reader;
  if (!parses(bytes.size(), [&] { reader = std::make_unique<SafetensorsReader>(files, "f"); })) {
    return;
  }
  uint64_t length = 0;
  for (size_t i = kPrefix; i-- > 0;) length = length << 8 | static_cast<unsigned char>(bytes[i]);
  expect_apart(reader->tensors(), {{"f", static_cast<int64_t>(bytes.size()), ""}},
               static_cast<int64_t>(kPrefix + length));
  for (const auto& tensor : reader->tensors()) {
    std::string values(tensor.bytes, '\1');
    reader->read(tensor, values.data());
    expect(values == std::string_view(bytes).substr(tensor.offset, tensor.bytes),
           "the values are those of the file");
  }
}

}  // namespace
}  // namespace ounce::ckpt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  ounce::ckpt::fuzz::feed(bytes);
  ounce::ckpt::fuzz::feed(ounce::ckpt::fuzz::with_length(bytes));
  return 0;
}
