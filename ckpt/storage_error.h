// SPDX-License-Identifier: MIT
// What the parts of ckpt/ that know nothing of Torch throw. The public functions of checkpointer.h
// turn it into ounce::Error with the matching Fault.
#pragma once

#include <stdexcept>
#include <string>

namespace ounce::ckpt {

class StorageError : public std::runtime_error {
 public:
  enum class Kind {
    kIo,           // a file call failed
    kDamaged,      // the bytes are not what was written
    kNewerFormat,  // written by a later version
    kMissing,      // nothing there
    kBusy,         // another live process owns the folder
    kUsage,        // the caller asked for something that cannot be
  };

  StorageError(Kind kind, const std::string& message, int code = 0)
      : std::runtime_error(message), kind_(kind), code_(code) {}
  Kind kind() const { return kind_; }
  int code() const { return code_; }  // errno of the call that failed; 0 = none known

 private:
  Kind kind_;
  int code_;
};

}  // namespace ounce::ckpt
