// SPDX-License-Identifier: MIT
// While it lives, whatever makes the host wait for a GPU throws: PyTorch's synchronisation debug
// mode. Does nothing on another device.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef OUNCE_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>
#endif

namespace ounce::test {

class NoSync {
 public:
  explicit NoSync(at::Device device) : on_gpu_(device.is_cuda()) { set(true); }
  ~NoSync() { set(false); }
  NoSync(const NoSync&) = delete;
  NoSync& operator=(const NoSync&) = delete;

 private:
  void set([[maybe_unused]] bool on) const {
    if (!on_gpu_) return;
#ifdef OUNCE_WITH_CUDA
    using Mode = c10::cuda::SyncDebugMode;
    c10::cuda::warning_state().set_sync_debug_mode(on ? Mode::L_ERROR : Mode::L_DISABLED);
#else
    TORCH_CHECK(!on, "built without CUDA, which these tests need for a GPU");
#endif
  }
  bool on_gpu_;
};

}  // namespace ounce::test
