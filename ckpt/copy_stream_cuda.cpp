// SPDX-License-Identifier: MIT
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <ounce/ckpt/copy_stream.h>

#include <mutex>
#include <utility>

namespace ounce::ckpt {
namespace {

// Hands out events again, which are dear to make.
class EventPool {
 public:
  explicit EventPool(unsigned flags) : flags_(flags) {}
  ~EventPool() {
    for (auto* event : idle_) cudaEventDestroy(event);
  }
  cudaEvent_t take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        auto* event = idle_.back();
        idle_.pop_back();
        return event;
      }
    }
    cudaEvent_t event = nullptr;
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, flags_));
    return event;
  }
  void give(cudaEvent_t event) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(event);
  }

 private:
  unsigned flags_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> idle_;
};

class Mark : public CopyMark {
 public:
  explicit Mark(EventPool& pool) : pool_(pool), event_(pool.take()) {}
  ~Mark() override { pool_.give(event_); }
  void wait() override { C10_CUDA_CHECK(cudaEventSynchronize(event_)); }
  cudaEvent_t event() const { return event_; }

 private:
  EventPool& pool_;
  cudaEvent_t event_;
};

void enqueue(const std::vector<Copy>& copies, cudaStream_t stream) {
  if (copies.size() == 1) {
    const auto& one = copies[0];
    C10_CUDA_CHECK(cudaMemcpyAsync(one.to, one.from, one.bytes, cudaMemcpyDefault, stream));
    return;
  }
  std::vector<void*> to;
  std::vector<const void*> from;
  std::vector<size_t> bytes;
  for (const auto& copy : copies) {
    to.push_back(copy.to);
    from.push_back(copy.from);
    bytes.push_back(copy.bytes);
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first = 0;
  C10_CUDA_CHECK(cudaMemcpyBatchAsync(to.data(), from.data(), bytes.data(), copies.size(),
                                      &attributes, &first, 1, stream));
}

class CudaCopyStream : public CopyStream {
 public:
  explicit CudaCopyStream(int device) : device_(static_cast<c10::DeviceIndex>(device)) {
    const c10::cuda::CUDAGuard guard(device_);
    for (auto* stream : {&turns_[0], &turns_[1], &clones_}) {
      C10_CUDA_CHECK(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
    }
  }
  ~CudaCopyStream() override {
    const c10::cuda::CUDAGuard guard(device_);
    for (auto* stream : {turns_[0], turns_[1], clones_}) {
      cudaStreamSynchronize(stream);
      cudaStreamDestroy(stream);
    }
    for (const auto& [begin, end] : stalls_) {
      cudaEventDestroy(begin);
      cudaEventDestroy(end);
    }
  }

  void follow_compute() override {
    const c10::cuda::CUDAGuard guard(device_);
    const Mark now(events_);
    C10_CUDA_CHECK(cudaEventRecord(now.event(), compute()));
    copies_wait_for(now);
  }

  std::shared_ptr<CopyMark> copy(const std::vector<Copy>& copies) override {
    const c10::cuda::CUDAGuard guard(device_);
    const std::lock_guard lock(mutex_);
    std::swap(turns_[0], turns_[1]);
    if (last_) C10_CUDA_CHECK(cudaStreamWaitEvent(turns_[0], last_->event(), 0));
    auto mark = std::make_shared<Mark>(events_);
    enqueue(copies, turns_[0]);
    C10_CUDA_CHECK(cudaEventRecord(mark->event(), turns_[0]));
    last_ = mark;
    return mark;
  }

  void hold_compute(const CopyMark& mark) override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto begin = timed_.take(), end = timed_.take();
    C10_CUDA_CHECK(cudaEventRecord(begin, compute()));
    C10_CUDA_CHECK(cudaStreamWaitEvent(compute(), static_cast<const Mark&>(mark).event(), 0));
    C10_CUDA_CHECK(cudaEventRecord(end, compute()));
    const std::lock_guard lock(mutex_);
    stalls_.emplace_back(begin, end);
  }

  double stalled_seconds() override {
    const std::lock_guard lock(mutex_);
    double seconds = 0;
    std::erase_if(stalls_, [&](const auto& stall) {
      if (cudaEventQuery(stall.second) != cudaSuccess) return false;
      float milliseconds = 0;
      if (cudaEventElapsedTime(&milliseconds, stall.first, stall.second) == cudaSuccess) {
        seconds += milliseconds / 1e3;
      }
      timed_.give(stall.first);
      timed_.give(stall.second);
      return true;
    });
    return seconds;
  }

  // On a stream of its own: a batch cannot run on the default stream, which compute often is.
  void clone(const std::vector<Copy>& copies) override {
    const c10::cuda::CUDAGuard guard(device_);
    const Mark now(events_), done(events_);
    C10_CUDA_CHECK(cudaEventRecord(now.event(), compute()));
    C10_CUDA_CHECK(cudaStreamWaitEvent(clones_, now.event(), 0));
    enqueue(copies, clones_);
    C10_CUDA_CHECK(cudaEventRecord(done.event(), clones_));
    C10_CUDA_CHECK(cudaStreamWaitEvent(compute(), done.event(), 0));
    copies_wait_for(done);
  }

  int64_t spare_bytes() override {
    const c10::cuda::CUDAGuard guard(device_);
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) return 0;
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device_);
    return static_cast<int64_t>(free) + stats.reserved_bytes[0].current -
           stats.allocated_bytes[0].current;
  }

 private:
  cudaStream_t compute() const { return c10::cuda::getCurrentCUDAStream(device_).stream(); }

  void copies_wait_for(const Mark& mark) {
    const std::lock_guard lock(mutex_);
    for (auto* stream : turns_) C10_CUDA_CHECK(cudaStreamWaitEvent(stream, mark.event(), 0));
  }

  const c10::DeviceIndex device_;
  // Batches take turns on two streams, each waiting for the one before: a copy engine that has the
  // next copy of the same stream at hand serves others only when a time slice of many milliseconds
  // ends, but it looks around whenever a stream has to wait.
  cudaStream_t turns_[2] = {nullptr, nullptr};
  cudaStream_t clones_ = nullptr;
  EventPool events_{cudaEventDisableTiming | cudaEventBlockingSync};
  std::shared_ptr<Mark> last_;
  EventPool timed_{cudaEventDefault};
  std::mutex mutex_;
  std::vector<std::pair<cudaEvent_t, cudaEvent_t>> stalls_;
};

}  // namespace

std::unique_ptr<CopyStream> open_copy_stream(int device) {
  return std::make_unique<CudaCopyStream>(device);
}

bool register_host_memory(void* data, size_t bytes) {
  if (cudaHostRegister(data, bytes, cudaHostRegisterPortable) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

void unregister_host_memory(void* data) { cudaHostUnregister(data); }

}  // namespace ounce::ckpt
