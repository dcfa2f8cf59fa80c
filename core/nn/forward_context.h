// SPDX-License-Identifier: MIT
// A thread-local hook under ounce::nn::{Linear, Embedding, RMSNorm}: what a weight does in a
// forward pass can be replaced without the model knowing (evolution strategies perturb through it;
// the C++ frontend's modules are not virtual and have no hooks).
#pragma once

#include <ATen/core/Tensor.h>

namespace ounce::nn {

class LinearImpl;
class EmbeddingImpl;
class RMSNormImpl;

class ForwardContext {
 public:
  virtual ~ForwardContext() = default;
  virtual at::Tensor linear(LinearImpl& module, const at::Tensor& x) = 0;
  virtual at::Tensor embedding(EmbeddingImpl& module, const at::Tensor& indices) = 0;
  virtual at::Tensor rms_norm(RMSNormImpl& module, const at::Tensor& x) = 0;

  // The context of this thread, or null: plain forward passes.
  static ForwardContext* current();
};

// Makes `context` current on this thread until the guard dies. Does not own it; null is allowed.
class ForwardContextGuard {
 public:
  explicit ForwardContextGuard(ForwardContext* context);
  ~ForwardContextGuard();
  ForwardContextGuard(const ForwardContextGuard&) = delete;
  ForwardContextGuard& operator=(const ForwardContextGuard&) = delete;

 private:
  ForwardContext* previous_;
};

}  // namespace ounce::nn
