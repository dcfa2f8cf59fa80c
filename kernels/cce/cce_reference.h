// SPDX-License-Identifier: MIT
// The definition of linear_cross_entropy, composed from ATen, chunked over tokens. Inputs are
// already checked; hidden is [N, D] and per-token tensors are [N], aligned with hidden (shift is
// applied by the caller).
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/kernels/cce/cce.h>

#include <array>
#include <optional>
#include <tuple>

namespace ounce::reference {

// What the loss needs to know of each token. The fused path has `place` and neither target nor
// outside.
struct Tokens {
  at::Tensor target;       // int64, 0 where not counted or outside
  at::Tensor counted;      // bool
  at::Tensor outside;      // bool: counted, with a target that is not in the vocabulary
  at::Tensor weight;       // t_m, 0 where not counted, NaN where outside
  at::Tensor hit_weight;   // class weight of the target, 1 without class weights
  at::Tensor denominator;  // scalar sum of weight * hit_weight, 1 where that is 0
  at::Tensor place;        // int32 target, -1 where there is none in the vocabulary
};

// target [N] int64, counted [N] bool. Floating results in `compute`.
Tokens describe_tokens(const at::Tensor& target, const at::Tensor& counted,
                       const std::optional<at::Tensor>& token_weight,
                       const std::optional<at::Tensor>& class_weight, int64_t vocab,
                       at::ScalarType compute);

// options.filter_eps, or its default for hidden states of a dtype.
double filter_eps(at::ScalarType hidden, const LinearCrossEntropyOptions& options);

struct ForwardRows {
  at::Tensor loss, lse, z_loss;  // [N], not reduced, 0 where not counted
  at::Tensor nll;                // [N] lse - z_y, 0 where not counted
  at::Tensor correct;            // [N] bool, or [0] when not asked for
  at::Tensor entropy;            // [N], or [0] when not asked for
  at::Tensor dropped_mass;       // [N], or [0] with GradMode::kExact
};

ForwardRows linear_cross_entropy_rows(const at::Tensor& hidden, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const std::optional<at::Tensor>& class_weight,
                                      const Tokens& tokens,
                                      const LinearCrossEntropyOptions& options);

// grad_rows, grad_lse and, or undefined, grad_entropy [N]: upstream of the rows above. Gradients of
// hidden, in `hidden_type`, weight and bias, each an empty [0] tensor where `wanted` is false; so
// is the weight's with a main_grad, which gets it.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_rows_backward(
    const at::Tensor& grad_rows, const at::Tensor& grad_lse, const at::Tensor& grad_entropy,
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& class_weight, const Tokens& tokens,
    const LinearCrossEntropyOptions& options, std::array<bool, 3> wanted,
    at::ScalarType hidden_type);

}  // namespace ounce::reference
