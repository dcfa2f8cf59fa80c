// SPDX-License-Identifier: MIT
// Code that a damaged file may crash or keep busy, run in a process of its own. No Torch here.
#pragma once

#include <functional>
#include <string>

namespace ounce::ckpt {

struct ChildOutput {
  std::string text;     // what the action returned, or the part of it that arrived
  std::string problem;  // why the child did not end well; "" when it did
};

// Calls `action` in a fork of this process and brings back the text it returns: at most 256 MiB,
// within `seconds`, with at most 2 GiB of memory more than this process has. An action that throws
// is a child that did not end well. No other thread of this process exists in the child, so the
// action must not need what they hold.
ChildOutput run_in_child(const std::function<std::string()>& action, unsigned seconds = 60);

}  // namespace ounce::ckpt
