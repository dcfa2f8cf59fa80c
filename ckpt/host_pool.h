// SPDX-License-Identifier: MIT
// A bounded pool of host memory in buffers of one size: mapped once, on huge pages where there are
// any, touched and (for a GPU) registered in the background, buffer by buffer ready for use.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace ounce::ckpt {

class HostPool {
 public:
  // `buffer_bytes` is rounded up to whole pages (huge ones, when it is larger than one). Throws
  // StorageError (kUsage) when the address space does not hold it.
  HostPool(int64_t count, int64_t buffer_bytes, bool for_gpu);
  ~HostPool();
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  int64_t count() const { return count_; }
  int64_t buffer_bytes() const { return buffer_bytes_; }
  bool for_gpu() const { return for_gpu_; }

  // A free buffer that is ready, or null. Any order of give() is fine.
  char* take();
  void give(char* buffer);
  // Buffers are still being made ready: take() may find one soon although none was given back.
  bool growing() const;

 private:
  void make_ready();

  const int64_t count_, buffer_bytes_;
  const bool for_gpu_;
  char* memory_ = nullptr;
  int64_t mapped_ = 0;
  std::vector<std::pair<char*, bool>> ranges_;  // begin, registered
  mutable std::mutex mutex_;
  std::vector<char*> free_;
  bool growing_ = true, stop_ = false;
  std::thread thread_;  // makes the buffers ready
};

// Memory of its own that begins at a page. Throws std::bad_alloc.
struct FreePages {
  void operator()(char* memory) const { std::free(memory); }
};
using Pages = std::unique_ptr<char, FreePages>;
Pages allocate_pages(int64_t bytes);

// 40 % of the memory that this process can still get, by the kernel and by its control group.
int64_t host_memory_budget();

}  // namespace ounce::ckpt
