// SPDX-License-Identifier: MIT
// Kernels that come to the GPU before those in front of them have ended, so that what they do
// before they touch global memory runs under the others' last blocks. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace ounce {

// The kernel calls wait_for_previous(), in every thread that touches global memory, before it reads
// what the kernel in front may write, and before it writes.
// `shared`: bytes of dynamic shared memory, which it is allowed here.
template <class Kernel, class... Arguments>
cudaError_t launch_early(Kernel kernel, dim3 grid, dim3 block, int64_t shared, cudaStream_t stream,
                         const Arguments&... arguments) {
  if (shared > 0) {  // an attribute is of the current device
    const auto allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(shared));
    if (allowed != cudaSuccess) return allowed;
  }
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Clusters of two blocks that have work and find room at once.
inline cudaError_t count_clusters(int64_t items, int* clusters) {
  int device = 0, processors = 0;
  auto error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  *clusters = static_cast<int>(std::min<int64_t>(items, processors / 2));
  return error;
}

__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Blocks of the kernel behind this one may come where there is room.
__device__ inline void let_next_come() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace ounce
