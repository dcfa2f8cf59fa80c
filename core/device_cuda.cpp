// SPDX-License-Identifier: MIT
// The CUDA half of device.h.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <torch/torch.h>

#include <algorithm>

namespace ounce::detail {

namespace {

// Dense bf16 matrix rates without sparsity, TFLOP/s, from the vendor's data sheets. The first name
// that the device's name contains wins.
struct Peak {
  const char* name;
  double tflops;
};
constexpr Peak kPeaks[] = {
    {"H100 PCIe", 756},  {"H100 NVL", 835},   {"H100", 989},      {"H200", 989},
    {"GH200", 989},      {"H20", 148},        {"H800", 989},      {"B300", 2250},
    {"B200", 2250},      {"GB200", 2500},     {"A100", 312},      {"A800", 312},
    {"A30", 165},        {"A40", 149.7},      {"A10G", 70},       {"A10", 125},
    {"L40S", 362},       {"L40", 181},        {"L4", 121},        {"RTX 6000 Ada", 364},
    {"RTX 5090", 209.5}, {"RTX 4090", 165.2}, {"RTX 4080", 97.5}, {"RTX 3090", 71},
};

double peak_flops(const std::string& name) {
  for (const auto& peak : kPeaks) {
    if (name.find(peak.name) != std::string::npos) return peak.tflops * 1e12;
  }
  return 0;
}

// The device's index, the current one's without; the allocator refuses to speak before CUDA is
// initialised.
c10::DeviceIndex initialised(at::Device device) {
  at::globalContext().lazyInitDevice(at::kCUDA);
  return device.has_index() ? device.index() : c10::cuda::current_device();
}

}  // namespace

bool cuda_built() { return true; }

std::string cuda_missing_reason() {
  int count = 0;
  const auto error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count == 0 ? "no GPU is visible" : "";
}

DeviceFacts cuda_facts(at::Device device) {
  cudaDeviceProp properties{};
  OUNCE_CHECK(cudaGetDeviceProperties(&properties, device.index()) == cudaSuccess, "[device] ",
              device.str(), " is not a device here");
  DeviceFacts facts;
  facts.name = properties.name;
  const c10::DeviceGuard guard(device);
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) == cudaSuccess) {
    facts.free_bytes = static_cast<int64_t>(free);
    facts.total_bytes = static_cast<int64_t>(total);
  }
  facts.peak_bf16_flops = peak_flops(facts.name);
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess) {
    facts.driver = std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  }
  return facts;
}

MemoryUse cuda_memory(at::Device device) {
  const auto all =
      c10::cuda::CUDACachingAllocator::getDeviceStats(initialised(device)).allocated_bytes[0];
  return {all.current, all.peak};
}

void cuda_reset_peak(at::Device device) {
  c10::cuda::CUDACachingAllocator::resetPeakStats(initialised(device));
}

void cuda_range_push(const char* name) { nvtxRangePushA(name); }
void cuda_range_pop() { nvtxRangePop(); }

}  // namespace ounce::detail
