// SPDX-License-Identifier: MIT
// Errors. Every check of this project ends in an ounce::Error (a c10::Error) whose text reads
// "[where] what was expected, what was found; what to do", on one line.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <string>
#include <utility>

namespace ounce {

// What kind of fault an Error reports. The values are the exit codes of the program.
enum class Fault : int {
  kProblem = 1,      // the work itself failed: non-finite loss, a checkpoint that does not verify
  kUsage = 2,        // flags, config, names, shapes, dtypes: the caller can fix it
  kNotFound = 3,     // nothing there
  kData = 4,         // I/O failed or data is damaged
  kNewerFormat = 5,  // written by a later version
};

class Error : public c10::Error {
 public:
  Error(Fault fault, const std::string& message)
      : c10::Error(message, /*backtrace=*/nullptr, /*caller=*/nullptr), fault_(fault) {}

  Fault fault() const { return fault_; }

 private:
  Fault fault_;
};

template <class... Args>
[[noreturn]] void fail(Fault fault, const Args&... args) {
  throw Error(fault, c10::str(args...));
}

// An exception's text without what LibTorch appends to it.
inline std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace ounce

// Throws ounce::Error(Fault::kUsage) with the concatenated arguments when `condition` is false.
#define OUNCE_CHECK(condition, ...) OUNCE_CHECK_AS(::ounce::Fault::kUsage, condition, __VA_ARGS__)

// The same with another fault.
#define OUNCE_CHECK_AS(fault, condition, ...) \
  do {                                        \
    if (!(condition)) [[unlikely]]            \
      ::ounce::fail(fault, __VA_ARGS__);      \
  } while (false)
