// SPDX-License-Identifier: MIT
#pragma once

#include <string>

namespace ounce {

std::string version();  // "0.1.0"
// One line for `--version` and for records: this project, LibTorch built with, CUDA built with.
// "ounce 0.1.0, LibTorch 2.11.0, CUDA 13" or "..., no CUDA".
std::string version_line();

}  // namespace ounce
