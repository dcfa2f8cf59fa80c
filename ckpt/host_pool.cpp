// SPDX-License-Identifier: MIT
#include <ounce/ckpt/copy_stream.h>
#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/host_pool.h>
#include <ounce/ckpt/storage_error.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>

namespace ounce::ckpt {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
// One registration: some drivers refuse very large ones, and each holds a lock while it lasts.
constexpr int64_t kRangeBytes = int64_t{256} << 20;

int64_t rounded(int64_t bytes) {
  const auto unit = bytes > kHugePage ? kHugePage : kPageBytes;
  return std::max((bytes + unit - 1) / unit * unit, kPageBytes);
}

// The number after `key` in a file of "key number" lines, or its only number; -1 when there is
// none.
int64_t number_in(const char* path, const std::string& key = "") {
  std::ifstream file(path);
  std::string word;
  int64_t number = -1;
  while (!key.empty() && file >> word && word != key) {
  }
  return file >> number ? number : -1;
}

}  // namespace

HostPool::HostPool(int64_t count, int64_t buffer_bytes, bool for_gpu)
    : count_(count), buffer_bytes_(rounded(buffer_bytes)), for_gpu_(for_gpu) {
  if (count_ == 0) {
    growing_ = false;
    return;
  }
  // One huge page more, to begin at one.
  const auto slack = buffer_bytes_ >= kHugePage ? kHugePage : 0;
  mapped_ = count_ * buffer_bytes_ + slack;
  void* map = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) {
    throw StorageError(StorageError::Kind::kUsage,
                       "[checkpoint] cannot map a pool of " + std::to_string(mapped_) +
                           " bytes: " + std::strerror(errno) + "; set a smaller pool_bytes");
  }
  memory_ = static_cast<char*>(map);
  if (slack > 0) ::madvise(map, mapped_, MADV_HUGEPAGE);
  // A forked child has no use for it, and must not copy it page by page.
  ::madvise(map, mapped_, MADV_DONTFORK);
  thread_ = std::thread([this] { make_ready(); });
}

void HostPool::make_ready() {
  const auto huge = reinterpret_cast<uintptr_t>(memory_) % kHugePage;
  char* next = memory_ + (buffer_bytes_ >= kHugePage && huge != 0 ? kHugePage - huge : 0);
  const auto in_range = std::max<int64_t>(1, kRangeBytes / buffer_bytes_);
  for (int64_t done = 0; done < count_;) {
    const auto here = std::min(in_range, count_ - done);
    const auto bytes = static_cast<size_t>(here * buffer_bytes_);
    // Before 5.14 the kernel cannot: then the first use touches the pages.
    ::madvise(next, bytes, MADV_POPULATE_WRITE);
    const bool registered = for_gpu_ && register_host_memory(next, bytes);
    ranges_.emplace_back(next, registered);
    done += here;
    const std::lock_guard lock(mutex_);
    for (int64_t i = 0; i < here; ++i, next += buffer_bytes_) free_.push_back(next);
    growing_ = done < count_;
    if (stop_) break;
  }
}

HostPool::~HostPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  if (thread_.joinable()) thread_.join();
  for (const auto& [begin, registered] : ranges_) {
    if (registered) unregister_host_memory(begin);
  }
  if (memory_ != nullptr) ::munmap(memory_, mapped_);
}

char* HostPool::take() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return nullptr;
  // The one used last, while it may be in a cache.
  auto* buffer = free_.back();
  free_.pop_back();
  return buffer;
}

void HostPool::give(char* buffer) {
  const std::lock_guard lock(mutex_);
  free_.push_back(buffer);
}

bool HostPool::growing() const {
  const std::lock_guard lock(mutex_);
  return growing_;
}

Pages allocate_pages(int64_t bytes) {
  auto* memory = static_cast<char*>(std::aligned_alloc(kPageBytes, rounded(bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  return Pages(memory);
}

int64_t host_memory_budget() {
  auto free = number_in("/proc/meminfo", "MemAvailable:") * 1024;
  const auto limit = number_in("/sys/fs/cgroup/memory.max");
  const auto used = number_in("/sys/fs/cgroup/memory.current");
  if (limit > 0 && used >= 0) free = std::min(free, limit - used);
  return std::max<int64_t>(free, 0) / 5 * 2;
}

}  // namespace ounce::ckpt
