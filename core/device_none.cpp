// SPDX-License-Identifier: MIT
// The CUDA half of device.h in a build without CUDA.
#include <ounce/core/device.h>

namespace ounce::detail {

bool cuda_built() { return false; }
std::string cuda_missing_reason() {
  return "this build has no CUDA; a GPU needs a CUDA 13 toolkit at build time";
}
DeviceFacts cuda_facts(at::Device) { return {}; }
MemoryUse cuda_memory(at::Device) { return {}; }
void cuda_reset_peak(at::Device) {}
void cuda_range_push(const char*) {}
void cuda_range_pop() {}

}  // namespace ounce::detail
