// SPDX-License-Identifier: MIT
// Facts about the device a run uses. The CUDA half is in device_cuda.cpp; a build without CUDA
// takes device_none.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace ounce {

struct DeviceFacts {
  std::string name;            // "NVIDIA H100 80GB HBM3", or the CPU's model name
  int64_t total_bytes = 0;     // memory of the GPU; of the machine for a CPU
  int64_t free_bytes = 0;      // of it free for tensors now
  double peak_bf16_flops = 0;  // dense bf16 matrix FLOP/s from a table of GPUs; 0 = not known
  std::string driver;          // the GPU driver's version, empty on a CPU
};

// "auto" (a GPU when there is one this build can use), "cpu", "cuda" or "cuda:N". CUDA asked for
// and absent is Fault::kUsage, with the reason.
at::Device choose_device(const std::string& name);
DeviceFacts device_facts(at::Device device);

// Bytes of tensors alive now and at their peak since the last reset. On a CPU counted by an
// allocator of ours that wraps ATen's: install with count_cpu_memory() before the first tensor,
// else 0.
struct MemoryUse {
  int64_t current = 0;
  int64_t peak = 0;
};
void count_cpu_memory();
MemoryUse memory_use(at::Device device);
void reset_peak_memory(at::Device device);

void synchronize(at::Device device);

// Seeds every generator of the process (CPU, and CUDA where there is one).
void seed_everything(uint64_t seed);
// The default generator of a device.
at::Generator default_generator(at::Device device);

// Deterministic ATen algorithms without filling uninitialised memory, and a fixed cuBLAS workspace.
// Call before the first CUDA work.
void use_deterministic_algorithms(bool on);

// A named range for profilers (NVTX) while it lives; costs nothing without CUDA.
class ProfileRange {
 public:
  explicit ProfileRange(const char* name);
  ~ProfileRange();
  ProfileRange(const ProfileRange&) = delete;
  ProfileRange& operator=(const ProfileRange&) = delete;
};

namespace detail {
// The CUDA half. Each is a harmless constant in a build without CUDA.
bool cuda_built();
std::string cuda_missing_reason();  // empty = a GPU is usable
DeviceFacts cuda_facts(at::Device device);
MemoryUse cuda_memory(at::Device device);
void cuda_reset_peak(at::Device device);
void cuda_range_push(const char* name);
void cuda_range_pop();
}  // namespace detail

}  // namespace ounce
