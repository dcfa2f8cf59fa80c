// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <glob.h>
#include <ounce/core/check.h>
#include <ounce/core/data/files.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ounce::data {

namespace {

[[noreturn]] void fail_read(const std::string& path, int error) {
  fail(Fault::kData, "[data] cannot read '", path, "': ", std::generic_category().message(error));
}

class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail_read(path, errno);
  }
  ~Descriptor() { close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

size_t utf8_length(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  if (length == 0 || at + length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Overlong forms, surrogates, and what is beyond U+10FFFF.
  const unsigned second = byte(1);
  if ((lead == 0xe0 && second < 0xa0) || (lead == 0xed && second > 0x9f) ||
      (lead == 0xf0 && second < 0x90) || (lead == 0xf4 && second > 0x8f)) {
    return 0;
  }
  return length;
}

std::vector<std::string> expand_globs(const std::vector<std::string>& patterns,
                                      std::string_view key) {
  std::vector<std::string> files;
  for (const auto& pattern : patterns) {
    glob_t found = {};
    const int status = glob(pattern.c_str(), GLOB_NOSORT | GLOB_TILDE, nullptr, &found);
    std::vector<std::string> matches(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    OUNCE_CHECK_AS(Fault::kData, status == 0 && !matches.empty(), "[data] no file matches '",
                   pattern, "'; correct ", key);
    std::sort(matches.begin(), matches.end());
    files.insert(files.end(), matches.begin(), matches.end());
  }
  return files;
}

void check_disjoint(const std::vector<std::string>& files,
                    const std::vector<std::string>& valid_files) {
  for (const auto& path : valid_files) {
    OUNCE_CHECK(std::find(files.begin(), files.end(), path) == files.end(), "[data] '", path,
                "' is in data.files and in data.valid_files; a model must not train on its "
                "validation data");
  }
}

std::string read_file(const std::string& path) {
  const Descriptor file(path);
  struct stat status = {};
  if (fstat(file.get(), &status) != 0) fail_read(path, errno);
  OUNCE_CHECK_AS(Fault::kData, S_ISREG(status.st_mode), "[data] '", path,
                 "' is not a regular file; name files, or a glob of them");
  std::string content(status.st_size, '\0');
  size_t size = 0;
  while (size < content.size()) {
    const ssize_t got = read(file.get(), content.data() + size, content.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_read(path, errno);
    if (got == 0) break;
    size += got;
  }
  content.resize(size);
  OUNCE_CHECK_AS(Fault::kData, size > 0, "[data] '", path, "' is empty; give a file with content");
  return content;
}

std::optional<size_t> find_invalid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    uint64_t word = 0;
    if (at + sizeof word <= text.size()) {
      std::memcpy(&word, text.data() + at, sizeof word);
      if ((word & 0x8080808080808080u) == 0) {
        at += sizeof word;
        continue;
      }
    }
    const auto length = utf8_length(text, at);
    if (length == 0) return at;
    at += length;
  }
  return std::nullopt;
}

uint64_t hash64(std::string_view bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::string identity_of(const std::vector<uint64_t>& parts) {
  const auto hash = XXH3_64bits(parts.data(), parts.size() * sizeof(uint64_t));
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash));
  return digits;
}

}  // namespace ounce::data
