// SPDX-License-Identifier: MIT
#include <ounce/kernels/cce/cce_fused.h>
#include <ounce/kernels/common/implementation.h>

namespace ounce::fused {

std::string why_not(const at::Tensor&, const at::Tensor&, bool, const LinearCrossEntropyOptions&) {
  return kNotBuilt;
}

reference::Tokens describe_tokens(const at::Tensor&, const std::optional<at::Tensor>&,
                                  const std::optional<at::Tensor>&, int64_t,
                                  const LinearCrossEntropyOptions&) {
  fail(Fault::kProblem, "[linear_cross_entropy] the fused path is not built");
}

std::string why_not_in_forward(const at::Tensor&, const at::Tensor&, bool,
                               const LinearCrossEntropyOptions&) {
  return kNotBuilt;
}

std::tuple<reference::ForwardRows, at::Tensor, at::Tensor> linear_cross_entropy_rows_with_gradients(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const reference::Tokens&,
    const LinearCrossEntropyOptions&, std::array<bool, 2>) {
  fail(Fault::kProblem, "[linear_cross_entropy] the fused path is not built");
}

at::Tensor rounded_gradient(const at::Tensor&, const at::Tensor&) {
  fail(Fault::kProblem, "[linear_cross_entropy] the fused path is not built");
}

bool scales(const at::Tensor&, const at::Tensor&) { return false; }

void scale_gradient(at::Tensor&, const at::Tensor&) {
  fail(Fault::kProblem, "[linear_cross_entropy] the fused path is not built");
}

reference::ForwardRows linear_cross_entropy_rows(const at::Tensor&, const at::Tensor&,
                                                 const std::optional<at::Tensor>&,
                                                 const std::optional<at::Tensor>&,
                                                 const reference::Tokens&,
                                                 const LinearCrossEntropyOptions&) {
  fail(Fault::kProblem, "[linear_cross_entropy] the fused path is not built");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_rows_backward(
    const Upstream&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const reference::Tokens&, const Results&,
    const LinearCrossEntropyOptions&, std::array<bool, 3>, at::ScalarType) {
  fail(Fault::kProblem, "[linear_cross_entropy] the fused path is not built");
}

}  // namespace ounce::fused
