// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>

namespace ounce {

// A file that is only appended to, each piece in one write(): what has been appended survives the
// end of the process, and readers see whole pieces. Every failure is Fault::kData and names the
// file.
class AppendFile {
 public:
  // Makes the file when it is missing; `flags` of open(2) beside O_APPEND, O_CREAT and O_WRONLY.
  AppendFile(const std::string& path, int flags);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  void append(std::string_view piece);
  void flush_to_disk();

 private:
  std::string path_;
  int descriptor_;
};

}  // namespace ounce
