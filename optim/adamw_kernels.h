// SPDX-License-Identifier: MIT
// AdamW of many tensors in one launch: what it takes. No Torch here. Pointers are of the device.
#pragma once

#include <cuda_runtime.h>
#include <ounce/optim/rounding_streams.h>

#include <cstdint>

namespace ounce::optim {

constexpr int64_t kChunk = 8192;  // elements of a block

struct AdamTensor {
  void* parameter = nullptr;       // [count]
  const void* gradient = nullptr;  // of the parameter's type
  void *exp_avg = nullptr, *exp_avg_sq = nullptr;
  const float* step = nullptr;  // a scalar: steps before this one
  uint64_t seed = 0;            // of stochastic rounding
  int64_t count = 0;
  int first_block = 0;  // blocks of the tensors before it
  bool aligned = true;  // all four at multiples of 16 bytes
};
inline int blocks_of_chunks(int64_t count) {
  return static_cast<int>((count + kChunk - 1) / kChunk);
}

// With g the gradient times `scale` and t = step + 1:
//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr weight_decay) p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
struct AdamStep {
  const AdamTensor* tensors = nullptr;  // [count] on the device
  int count = 0, blocks = 0;
  bool parameters_are_fp32 = true, moments_are_fp32 = true;  // else bf16
  bool rounds_parameters = true;  // stochastically, where they are bf16; moments always are
  const float* lr = nullptr;      // a scalar
  const float* scale = nullptr;   // a scalar; null = 1
  const float* skip = nullptr;    // a scalar: nonzero changes nothing; null = 0
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
};
cudaError_t adamw(const AdamStep& step, cudaStream_t stream);

// steps [count] on the device: adds 1 to each unless `skip`, which may be null, is nonzero.
cudaError_t advance(float* const* steps, int count, const float* skip, cudaStream_t stream);

}  // namespace ounce::optim
