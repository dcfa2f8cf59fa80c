// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/nn/construction.h>
#include <ounce/core/nn/embedding.h>
#include <ounce/core/nn/forward_context.h>
#include <ounce/core/nn/linear.h>
#include <ounce/core/nn/rms_norm.h>
#include <torch/torch.h>

#include <cmath>

namespace ounce::nn {

namespace {
thread_local ForwardContext* current_context = nullptr;
thread_local at::TensorOptions current_options = at::TensorOptions(at::kFloat).device(at::kCPU);
}  // namespace

at::TensorOptions construction_options() { return current_options; }

ConstructionGuard::ConstructionGuard(at::TensorOptions options) : previous_(current_options) {
  current_options = options;
}

ConstructionGuard::~ConstructionGuard() { current_options = previous_; }

ForwardContext* ForwardContext::current() { return current_context; }

ForwardContextGuard::ForwardContextGuard(ForwardContext* context) : previous_(current_context) {
  current_context = context;
}

ForwardContextGuard::~ForwardContextGuard() { current_context = previous_; }

LinearImpl::LinearImpl(int64_t in, int64_t out, bool with_bias, double std) {
  OUNCE_CHECK(in > 0 && out > 0, "[Linear] expected positive sizes, got in = ", in,
              ", out = ", out);
  weight = register_parameter("weight", torch::empty({out, in}, construction_options()));
  bias = with_bias ? register_parameter("bias", torch::zeros({out}, construction_options()))
                   : register_parameter("bias", at::Tensor(), /*requires_grad=*/false);
  torch::NoGradGuard no_grad;
  weight.normal_(0, std < 0 ? 1 / std::sqrt(static_cast<double>(in)) : std);
}

at::Tensor LinearImpl::forward(const at::Tensor& x) {
  if (auto* context = ForwardContext::current()) return context->linear(*this, x);
  return plain_forward(x);
}

at::Tensor LinearImpl::plain_forward(const at::Tensor& x) const {
  return at::linear(x, weight, bias);
}

double LinearImpl::flops(int64_t tokens) const {
  return 2.0 * static_cast<double>(tokens) * static_cast<double>(weight.numel());
}

EmbeddingImpl::EmbeddingImpl(int64_t count, int64_t dim, double std) {
  OUNCE_CHECK(count > 0 && dim > 0, "[Embedding] expected positive sizes, got count = ", count,
              ", dim = ", dim);
  weight = register_parameter("weight", torch::empty({count, dim}, construction_options()));
  torch::NoGradGuard no_grad;
  weight.normal_(0, std);
}

at::Tensor EmbeddingImpl::forward(const at::Tensor& indices) {
  if (auto* context = ForwardContext::current()) return context->embedding(*this, indices);
  return plain_forward(indices);
}

at::Tensor EmbeddingImpl::plain_forward(const at::Tensor& indices) const {
  return at::embedding(weight, indices);
}

RMSNormImpl::RMSNormImpl(int64_t dim, double eps_) : eps(eps_) {
  OUNCE_CHECK(dim > 0, "[RMSNorm] expected a positive size, got ", dim);
  OUNCE_CHECK(eps > 0, "[RMSNorm] expected eps > 0, got ", eps);
  weight = register_parameter("weight", torch::ones({dim}, construction_options()));
}

at::Tensor RMSNormImpl::forward(const at::Tensor& x) {
  if (auto* context = ForwardContext::current()) return context->rms_norm(*this, x);
  return plain_forward(x);
}

at::Tensor RMSNormImpl::plain_forward(const at::Tensor& x) const {
  const auto compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto wide = x.to(compute);
  const auto scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
  return (wide * scale * weight.to(compute)).to(x.scalar_type());
}

}  // namespace ounce::nn
