// SPDX-License-Identifier: MIT
// linear_cross_entropy on Hopper, over cce_kernels.h. The logits exist in registers. Either forward
// makes the gradients too, from bf16 exponentials of a chunk of tokens, or backward makes the
// logits again, a slab of the vocabulary at a time, as bf16 dloss/dlogits of all tokens. Inputs as
// in cce_reference.h. cce_fused_cuda.cpp holds it, cce_fused_none.cpp stands in where it is not
// built.
#pragma once

#include <ounce/kernels/cce/cce_reference.h>

#include <string>

namespace ounce::fused {

// What keeps a call from this path; "" = nothing.
std::string why_not(const at::Tensor& hidden, const at::Tensor& weight, bool has_bias,
                    const LinearCrossEntropyOptions& options);

// target [N] int32 or int64. The floating results are fp32.
reference::Tokens describe_tokens(const at::Tensor& target,
                                  const std::optional<at::Tensor>& token_weight,
                                  const std::optional<at::Tensor>& class_weight, int64_t vocab,
                                  const LinearCrossEntropyOptions& options);

reference::ForwardRows linear_cross_entropy_rows(const at::Tensor& hidden, const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& bias,
                                                 const std::optional<at::Tensor>& class_weight,
                                                 const reference::Tokens& tokens,
                                                 const LinearCrossEntropyOptions& options);

// [N] or scalar, fp32; all but the loss's may be undefined.
struct Upstream {
  at::Tensor loss, lse, entropy;
};
// [N], as forward gave them; entropy may be undefined where it has no upstream.
struct Results {
  at::Tensor lse, nll, entropy;
};
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_rows_backward(
    const Upstream& upstream, const at::Tensor& hidden, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& class_weight,
    const reference::Tokens& tokens, const Results& results,
    const LinearCrossEntropyOptions& options, std::array<bool, 3> wanted,
    at::ScalarType hidden_type);

// What keeps this path's forward from making the gradients; "" = nothing.
std::string why_not_in_forward(const at::Tensor& hidden, const at::Tensor& weight, bool has_bias,
                               const LinearCrossEntropyOptions& options);

// Forward and the gradients of hidden, in fp32, and weight, each an empty [0] tensor where `wanted`
// is false: three products of 2NDV FLOP. `upstream` of every row's loss: an fp32 scalar. With a
// filter this is the only forward.
std::tuple<reference::ForwardRows, at::Tensor, at::Tensor> linear_cross_entropy_rows_with_gradients(
    const at::Tensor& upstream, const at::Tensor& hidden, const at::Tensor& weight,
    const reference::Tokens& tokens, const LinearCrossEntropyOptions& options,
    std::array<bool, 2> wanted);

// Whether the two below take them: a contiguous and aligned gradient of fp32 or bf16, a scalar fp32
// factor, both on a GPU that this build knows.
bool scales(const at::Tensor& gradient, const at::Tensor& factor);
// gradient *= factor
void scale_gradient(at::Tensor& gradient, const at::Tensor& factor);
// factor gradient in bf16, of an fp32 gradient.
at::Tensor rounded_gradient(const at::Tensor& gradient, const at::Tensor& factor);

}  // namespace ounce::fused
