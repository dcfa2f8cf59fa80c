// SPDX-License-Identifier: MIT
// Copies between a GPU and the host beside its compute stream. copy_stream_cuda.cpp holds it; a
// build without CUDA takes copy_stream_none.cpp, where there is no GPU to copy from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace ounce::ckpt {

struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  size_t bytes = 0;
};

// The end of a batch; belongs to the stream that made it, which must outlive it.
class CopyMark {
 public:
  virtual ~CopyMark() = default;
  virtual void wait() = 0;  // the host waits, without spinning
};

// One GPU's. "Current stream" is the calling thread's, of that GPU. Calls may come from different
// threads. Throws c10::Error when the GPU reports one.
class CopyStream {
 public:
  virtual ~CopyStream() = default;

  // What is enqueued from here on waits for what the current stream holds now.
  virtual void follow_compute() = 0;
  // One batch, whatever the number of copies; between host and device in either direction. Batches
  // end in their order; copies of other streams get through between two of them. Host memory that
  // is not registered makes it synchronous.
  virtual std::shared_ptr<CopyMark> copy(const std::vector<Copy>& copies) = 0;
  // The current stream waits for the mark. Measured: stalled_seconds() is the sum of the waits that
  // have ended, since it was last asked.
  virtual void hold_compute(const CopyMark& mark) = 0;
  virtual double stalled_seconds() = 0;
  // Copies on the device in the order of the current stream, which goes on when they are done. What
  // the copy stream gets after it waits for them as well.
  virtual void clone(const std::vector<Copy>& copies) = 0;
  // Memory that an allocation could get without taking it from another.
  virtual int64_t spare_bytes() = 0;
};

std::unique_ptr<CopyStream> open_copy_stream(int device);

// Makes host memory known to all GPUs, page by page in place: copies to and from it run at the full
// rate and beside the host. False = not registered; the memory serves all the same.
bool register_host_memory(void* data, size_t bytes);
void unregister_host_memory(void* data);

}  // namespace ounce::ckpt
