// SPDX-License-Identifier: MIT
// The CUDA half of device.h.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nvtx3/nvToolsExt.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <torch/torch.h>

#include <cctype>

namespace ounce::detail {

namespace {

// Dense bf16 matrix rates without sparsity, TFLOP/s, from the vendor's data sheets. The first one
// whose words the device's name has wins.
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
  // Whole words ("A100-SXM4-80GB" is an A100, "RTX A4000" no A40).
  const auto in_word = [&](size_t i) { return i < name.size() && std::isalnum(name[i]) != 0; };
  for (const auto& peak : kPeaks) {
    const auto at = name.find(peak.name);
    if (at == std::string::npos || (at > 0 && in_word(at - 1))) continue;
    if (!in_word(at + std::string_view(peak.name).size())) return peak.tflops * 1e12;
  }
  return 0;
}

// "580.95.05" from NVML, which comes with the driver; empty where it cannot say.
std::string driver_version() {
  char version[96] = "";
  void* nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (nvml == nullptr) return version;
  const auto init = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlInit_v2"));
  const auto ask =
      reinterpret_cast<int (*)(char*, unsigned)>(dlsym(nvml, "nvmlSystemGetDriverVersion"));
  if (init == nullptr || ask == nullptr || init() != 0 || ask(version, sizeof version) != 0) {
    version[0] = 0;
  }
  return version;
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
    // What the caching allocator holds unused is free to tensors as well.
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(initialised(device));
    facts.free_bytes = static_cast<int64_t>(free) + stats.reserved_bytes[0].current -
                       stats.allocated_bytes[0].current;
    facts.total_bytes = static_cast<int64_t>(total);
  }
  facts.peak_bf16_flops = peak_flops(facts.name);
  static const auto driver = driver_version();
  facts.driver = driver;
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
