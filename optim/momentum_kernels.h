// SPDX-License-Identifier: MIT
// Momentum, error feedback and steps along given directions, of many tensors in one launch each:
// what they take.
// No Torch here. Pointers are of the device.
#pragma once

#include <ounce/optim/adamw_kernels.h>

namespace ounce::optim {

struct MomentumTensor {
  void* momentum = nullptr;        // [count]
  const void* gradient = nullptr;  // [count]
  void* direction = nullptr;       // [count] bf16, or null
  const float* step = nullptr;     // a scalar: steps before this one
  uint64_t seed = 0;               // of stochastic rounding
  int64_t count = 0;
  int first_block = 0;  // blocks of the tensors before it
  bool aligned = true;  // all at multiples of 16 bytes
};

// With g the gradient times `scale`: b = m + g;  m = keep b;  direction = b, or g + m with
// nesterov.
struct MomentumStep {
  const MomentumTensor* tensors = nullptr;  // [count] on the device
  int count = 0, blocks = 0;
  bool gradients_are_fp32 = true, momenta_are_fp32 = true;  // else bf16, momenta stochastically
  bool nesterov = false;
  float keep = 1;
  const float* scale = nullptr;  // a scalar; null = 1
  const float* skip = nullptr;   // a scalar: nonzero leaves m and makes the direction 0; null = 0
};
cudaError_t momentum(const MomentumStep& step, cudaStream_t stream);

struct FeedbackTensor {
  const int8_t* residual = nullptr;  // [count / columns, columns]
  const float* scales = nullptr;     // of each kInt8Block neighbours of a row
  const void* gradient = nullptr;    // [count]
  void* sum = nullptr;               // [count] bf16; may be the gradient
  int64_t count = 0;
  int first_block = 0;  // blocks of the tensors before it
};

// sum = scale g + residual. All at multiples of 16 bytes, columns multiples of 8, fewer than 2^32
// elements.
struct Feedback {
  const FeedbackTensor* tensors = nullptr;  // [count] on the device
  int count = 0, blocks = 0;
  bool gradients_are_fp32 = true;  // else bf16
  uint32_t columns = 0;
  const float* scale = nullptr;  // a scalar; null = 1
};
cudaError_t feed_back(const Feedback& feedback, cudaStream_t stream);

struct MovedTensor {
  void* parameter = nullptr;        // [count]
  const void* direction = nullptr;  // [count] bf16
  const float* step = nullptr;      // as above
  uint64_t seed = 0;
  int64_t count = 0;
  int first_block = 0;
  bool aligned = true;
};

// p = (1 - lr weight_decay) p - lr factor direction
struct Move {
  const MovedTensor* tensors = nullptr;  // [count] on the device
  int count = 0, blocks = 0;
  bool parameters_are_fp32 = true;  // else bf16
  bool stochastic_rounding = true;  // of those
  const float* lr = nullptr;        // a scalar
  const float* skip = nullptr;      // a scalar: nonzero leaves p; null = 0
  float weight_decay = 0, factor = 1;
};
cudaError_t move(const Move& move, cudaStream_t stream);

}  // namespace ounce::optim
