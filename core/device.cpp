// SPDX-License-Identifier: MIT
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <torch/torch.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>

namespace ounce {

namespace {

// Wraps the allocator that was in place and counts the bytes that are alive. The size of a block is
// kept in front of it: ATen also allocates raw, where the context has to be the data itself.
class CountingAllocator final : public at::Allocator {
 public:
  explicit CountingAllocator(at::Allocator* inner) { inner_ = inner; }

  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, at::Device(at::kCPU)};
    auto* block = static_cast<char*>(inner_->raw_allocate(bytes + kFront));
    *reinterpret_cast<int64_t*>(block) = static_cast<int64_t>(bytes);
    const auto alive =
        current_.fetch_add(static_cast<int64_t>(bytes)) + static_cast<int64_t>(bytes);
    auto peak = peak_.load();
    while (alive > peak && !peak_.compare_exchange_weak(peak, alive)) {
    }
    void* data = block + kFront;
    return {data, data, &release, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  static MemoryUse use() { return {current_.load(), peak_.load()}; }
  static void reset_peak() { peak_.store(current_.load()); }

 private:
  static constexpr size_t kFront = 64;  // ATen's alignment

  static void release(void* data) {
    if (data == nullptr) return;
    auto* block = static_cast<char*>(data) - kFront;
    current_.fetch_sub(*reinterpret_cast<int64_t*>(block));
    inner_->raw_deallocate(block);
  }

  static at::Allocator* inner_;
  static std::atomic<int64_t> current_, peak_;
};

at::Allocator* CountingAllocator::inner_ = nullptr;
std::atomic<int64_t> CountingAllocator::current_{0};
std::atomic<int64_t> CountingAllocator::peak_{0};

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "CPU";
}

// What the kernel could give, caches included.
int64_t available_memory() {
  std::ifstream info("/proc/meminfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("MemAvailable:")) return std::stoll(line.substr(13)) * 1024;
  }
  return sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGE_SIZE);
}

}  // namespace

at::Device choose_device(const std::string& name) {
  if (name == "cpu") return at::kCPU;
  if (name == "auto") {
    return detail::cuda_missing_reason().empty() ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
  }
  OUNCE_CHECK(name.starts_with("cuda"), "[device] '", name,
              "' is not a device; use auto, cpu, cuda or cuda:N");
  const auto reason = detail::cuda_missing_reason();
  OUNCE_CHECK(reason.empty(), "[device] '", name, "' was asked for but cannot be used: ", reason,
              "; use --device cpu");
  at::Device device(at::kCPU);
  try {
    device = at::Device(name);
  } catch (const c10::Error&) {
    fail(Fault::kUsage, "[device] '", name, "' is not a device; use auto, cpu, cuda or cuda:N");
  }
  if (!device.has_index()) device = at::Device(at::kCUDA, 0);
  detail::cuda_facts(device);  // throws where there is no such GPU
  return device;
}

DeviceFacts device_facts(at::Device device) {
  if (device.is_cuda()) return detail::cuda_facts(device);
  DeviceFacts facts;
  facts.name = cpu_name();
  const int64_t page = sysconf(_SC_PAGE_SIZE);
  facts.total_bytes = sysconf(_SC_PHYS_PAGES) * page;
  facts.free_bytes = available_memory();
  return facts;
}

void count_cpu_memory() {
  static CountingAllocator counting(c10::GetCPUAllocator());
  c10::SetCPUAllocator(&counting, /*priority=*/1);
}

MemoryUse memory_use(at::Device device) {
  return device.is_cuda() ? detail::cuda_memory(device) : CountingAllocator::use();
}

void reset_peak_memory(at::Device device) {
  if (device.is_cuda()) {
    detail::cuda_reset_peak(device);
  } else {
    CountingAllocator::reset_peak();
  }
}

void synchronize(at::Device device) {
  if (!device.is_cuda()) return;
  const c10::impl::VirtualGuardImpl gpu(at::kCUDA);
  gpu.synchronizeDevice(device.has_index() ? device.index() : gpu.getDevice().index());
}

void seed_everything(uint64_t seed) {
  // Reaches the CPU's generator and, when one can be used, every GPU's.
  torch::manual_seed(seed);
}

at::Generator default_generator(at::Device device) {
  return at::globalContext().defaultGenerator(device);
}

void use_deterministic_algorithms(bool on) {
  at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
  if (on) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
}

ProfileRange::ProfileRange(const char* name) { detail::cuda_range_push(name); }
ProfileRange::~ProfileRange() { detail::cuda_range_pop(); }

}  // namespace ounce
