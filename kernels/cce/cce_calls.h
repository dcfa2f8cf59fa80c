// SPDX-License-Identifier: MIT
// linear_cross_entropy on tensors that have values, without autograd: between the operators and the
// two paths (cce_reference.h, cce_fused.h). Not installed API.
#pragma once

#include <ounce/kernels/cce/cce_checks.h>

#include <tuple>

namespace ounce::detail {

// loss, lse, z_loss, n_valid, correct, dropped_mass, nll, entropy, and the loss's gradients of
// hidden (not yet rounded to 16 bits), weight and bias; those without a value are empty [0]
// tensors.
using CceOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
               at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using CceGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using CceWanted = std::array<bool, 3>;  // of the gradients

inline bool any(const CceWanted& wanted) { return wanted[0] || wanted[1] || wanted[2]; }

inline std::optional<at::Tensor> drop_undefined(const std::optional<at::Tensor>& t) {
  return t && t->defined() ? t : std::nullopt;
}

// What backward takes from forward, per token; entropy only where it has an upstream.
struct CceSaved {
  const at::Tensor lse, nll;
  const std::optional<at::Tensor> entropy;
};

// Throws where gradients are asked of forward that it cannot make.
void check_wanted(const CceInputs& in, const CceOptions& options, CceWanted wanted);

CceOutputs forward(const CceInputs& in, const CceOptions& options, CceWanted wanted);

// hidden's gradient in hidden_type.
CceGradients backward(const std::optional<at::Tensor>& grad_loss,
                      const std::optional<at::Tensor>& grad_lse,
                      const std::optional<at::Tensor>& grad_entropy, const CceInputs& in,
                      const CceSaved& saved, CceOptions options, CceWanted wanted,
                      at::ScalarType hidden_type);

}  // namespace ounce::detail
