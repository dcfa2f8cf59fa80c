// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace ounce::nn {

// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 for 16-bit
// inputs and returned in x's dtype (Zhang and Sennrich 2019, eq. 4). weight [dim] starts at one.
// Consults ForwardContext.
class RMSNormImpl : public torch::nn::Module {
 public:
  explicit RMSNormImpl(int64_t dim, double eps = 1e-5);

  at::Tensor forward(const at::Tensor& x);
  at::Tensor plain_forward(const at::Tensor& x) const;

  at::Tensor weight;
  double eps;
};
TORCH_MODULE(RMSNorm);

}  // namespace ounce::nn
