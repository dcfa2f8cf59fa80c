// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace ounce::nn {

// Rows of weight [count, dim] by index. Initialised from N(0, std^2). Consults ForwardContext.
class EmbeddingImpl : public torch::nn::Module {
 public:
  EmbeddingImpl(int64_t count, int64_t dim, double std = 0.02);

  at::Tensor forward(const at::Tensor& indices);
  at::Tensor plain_forward(const at::Tensor& indices) const;

  at::Tensor weight;
};
TORCH_MODULE(Embedding);

}  // namespace ounce::nn
