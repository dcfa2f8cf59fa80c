// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ounce/kernels/norm/norm_reference.h>

namespace ounce::reference {

namespace {

at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor inverse_rms(const at::Tensor& wide, double eps) {
  return at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  const auto compute = compute_type(x);
  const auto wide = x.to(compute);
  auto y = (wide * inverse_rms(wide, eps)).contiguous();
  if (weight) y.mul_(weight->to(compute));
  return y.to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const std::optional<at::Tensor>& weight,
                                                     double eps,
                                                     const std::optional<at::Tensor>& grad_residual,
                                                     std::array<bool, 2> wanted) {
  const auto compute = compute_type(x);
  const auto wide = x.to(compute);
  const auto scale = inverse_rms(wide, eps);
  const auto unit = wide * scale;
  const auto upstream = grad.to(compute);
  at::Tensor grad_x = at::empty({0}, x.options());
  at::Tensor grad_weight = at::empty({0}, (weight ? *weight : x).options());
  if (wanted[1]) {
    grad_weight = (upstream * unit).sum_to_size(weight->sizes()).to(weight->scalar_type());
  }
  if (wanted[0]) {
    const auto g = weight ? upstream * weight->to(compute) : upstream;
    auto dx = (g - unit * (g * unit).mean(-1, /*keepdim=*/true)) * scale;
    if (grad_residual) dx += grad_residual->to(compute);
    grad_x = dx.to(x.scalar_type()).contiguous();
  }
  return {grad_x, grad_weight};
}

}  // namespace ounce::reference
