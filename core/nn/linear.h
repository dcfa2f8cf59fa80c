// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace ounce::nn {

// y = x W^T + b. weight [out, in], bias [out] or undefined; PyTorch's names. Initialised from
// N(0, std^2) (std < 0: 1/sqrt(in)), bias zero. Consults ForwardContext.
class LinearImpl : public torch::nn::Module {
 public:
  LinearImpl(int64_t in, int64_t out, bool bias = false, double std = -1);

  at::Tensor forward(const at::Tensor& x);
  // The computation without the hook, for contexts that wrap it.
  at::Tensor plain_forward(const at::Tensor& x) const;
  double flops(int64_t tokens) const;

  at::Tensor weight, bias;
};
TORCH_MODULE(Linear);

}  // namespace ounce::nn
