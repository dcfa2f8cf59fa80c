// SPDX-License-Identifier: MIT
#include <ounce/core/device.h>
#include <ounce/core/version.h>
#include <torch/version.h>

namespace ounce {

std::string version() { return OUNCE_VERSION; }

std::string version_line() {
  return "ounce " + version() + ", LibTorch " TORCH_VERSION ", " +
         (detail::cuda_built() ? "CUDA 13" : "no CUDA");
}

}  // namespace ounce
