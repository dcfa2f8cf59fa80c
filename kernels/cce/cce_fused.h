// SPDX-License-Identifier: MIT
// linear_cross_entropy on Hopper, over cce_kernels.h. The logits exist in registers; backward makes
// them again, a slab of the vocabulary at a time, as bf16 dloss/dlogits of all tokens. Inputs as in
// cce_reference.h. cce_fused_cuda.cpp holds it, cce_fused_none.cpp stands in where it is not built.
#pragma once

#include <ounce/kernels/cce/cce_reference.h>

#include <string>

namespace ounce::fused {

// What keeps a call from this path; "" = nothing.
std::string why_not(const at::Tensor& hidden, const at::Tensor& weight,
                    const std::optional<at::Tensor>& class_weight,
                    const LinearCrossEntropyOptions& options);

reference::ForwardRows linear_cross_entropy_rows(const at::Tensor& hidden, const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& bias,
                                                 const reference::Tokens& tokens,
                                                 const LinearCrossEntropyOptions& options);

// lse, nll [N]: as forward gave them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_rows_backward(
    const at::Tensor& grad_rows, const at::Tensor& grad_lse, const at::Tensor& hidden,
    const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const reference::Tokens& tokens, const at::Tensor& lse, const at::Tensor& nll,
    const LinearCrossEntropyOptions& options, std::array<bool, 3> wanted);

}  // namespace ounce::fused
