// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <ounce/core/check.h>
#include <ounce/core/train/append_file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace ounce {

AppendFile::AppendFile(const std::string& path, int flags)
    : path_(path),
      descriptor_(open(path.c_str(), flags | O_APPEND | O_CREAT | O_WRONLY | O_CLOEXEC, 0644)) {
  OUNCE_CHECK_AS(Fault::kData, descriptor_ >= 0, "[run] cannot open '", path,
                 "' for writing: ", std::strerror(errno));
}

AppendFile::~AppendFile() { close(descriptor_); }

void AppendFile::append(std::string_view piece) {
  while (!piece.empty()) {
    const auto written = write(descriptor_, piece.data(), piece.size());
    if (written < 0 && errno == EINTR) continue;
    OUNCE_CHECK_AS(Fault::kData, written > 0, "[run] cannot write to '", path_,
                   "': ", std::strerror(errno));
    piece.remove_prefix(static_cast<size_t>(written));
  }
}

void AppendFile::flush_to_disk() {
  OUNCE_CHECK_AS(Fault::kData, fsync(descriptor_) == 0, "[run] cannot flush '", path_,
                 "': ", std::strerror(errno));
}

}  // namespace ounce
