// SPDX-License-Identifier: MIT
// Root mean square normalisation over the last dimension (Zhang and Sennrich 2019, eq. 4)
//
//   rms_norm(x)_i = x_i / sqrt(mean_j x_j^2 + eps) * weight_i
//
// and the same fused with the addition of a residual stream. Any number of leading dimensions, any
// strides, empty sizes. fp16 and bf16 are computed in fp32, fp64 in fp64. The first derivative is
// an operator of its own that recomputes the root mean square; double backward throws.
//
// For Python: torch.ops.ounce.{rms_norm, add_rms_norm}. Autocast changes nothing: outputs have the
// dtype of the input.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

namespace ounce {

// x [..., d] floating point; weight [d] of any floating dtype, absent = ones; eps > 0. Returns a
// contiguous tensor of x's shape and dtype. Keeps x and weight for backward, nothing else. Throws
// Fault::kUsage for shapes, dtypes or devices that do not fit.
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight = {},
                    double eps = 1e-5);

// (sum, normed) = (residual + delta, rms_norm(residual + delta)). residual and delta have one
// shape; the sum has their promoted dtype, as at::add. An undefined or absent delta is zero: the
// sum is then `residual` itself. Keeps the sum and weight for backward. The operator for Python
// wants a delta, for an operator may not return its input.
std::pair<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& residual,
                                               const std::optional<at::Tensor>& delta,
                                               const std::optional<at::Tensor>& weight = {},
                                               double eps = 1e-5);

// Registers the norm "rms_norm": a parameter named `weight`, seen by ounce::nn::ForwardContext as
// an ounce::nn::RMSNorm. Part of register_builtins().
void register_norm();

}  // namespace ounce
