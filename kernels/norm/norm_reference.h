// SPDX-License-Identifier: MIT
// The definition of the operators of norm.h, composed from ATen. Inputs are already checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace ounce::reference {

at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps);

// (grad_x in x's dtype, grad_weight in weight's dtype), each an empty [0] tensor where `wanted` is
// false. grad_residual, where given, is added to grad_x before it is rounded.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const std::optional<at::Tensor>& weight,
                                                     double eps,
                                                     const std::optional<at::Tensor>& grad_residual,
                                                     std::array<bool, 2> wanted);

}  // namespace ounce::reference
