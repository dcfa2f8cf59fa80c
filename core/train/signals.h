// SPDX-License-Identifier: MIT
#pragma once

namespace ounce {

// While it lives, the first SIGINT or SIGTERM is remembered instead of ending the process, and the
// second acts as it would have without the guard. One at a time.
class SignalGuard {
 public:
  SignalGuard();
  ~SignalGuard();
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

  // Name of the signal that arrived ("SIGINT"), or null.
  static const char* received();
};

}  // namespace ounce
