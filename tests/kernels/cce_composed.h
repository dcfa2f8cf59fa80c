// SPDX-License-Identifier: MIT
// The loss of cce.h written out on the full logits, differentiable: what the tests compare with.
#pragma once

#include <ounce/kernels/cce/cce.h>
#include <torch/torch.h>

#include <vector>

namespace ounce::cce_test {

struct CceCase {
  at::Tensor hidden, weight, target, bias, token_weight, class_weight;
  LinearCrossEntropyOptions options;

  LinearCrossEntropyOutput run() const {
    return linear_cross_entropy(hidden, weight, target, bias, token_weight, class_weight, options);
  }
  CceCase on(at::Device device) const {
    CceCase out = *this;
    for (auto* t :
         {&out.hidden, &out.weight, &out.target, &out.bias, &out.token_weight, &out.class_weight}) {
      if (t->defined()) *t = t->to(device);
    }
    return out;
  }
  // The same values in another dtype, as leaves that want gradients.
  CceCase as(at::ScalarType type) const {
    CceCase out = *this;
    const auto leaf = [&](const at::Tensor& t) {
      return t.defined() ? t.detach().to(type).clone().requires_grad_() : t;
    };
    out.hidden = leaf(hidden);
    out.weight = leaf(weight);
    out.bias = leaf(bias);
    return out;
  }
};

struct Shape {
  int64_t tokens, vocab, dim;
};
inline const std::vector<Shape> kRaggedShapes = {{1, 1, 1},      {1, 2, 5},       {129, 7, 33},
                                                 {7, 1, 16},     {256, 512, 128}, {252, 507, 123},
                                                 {193, 517, 70}, {329, 123, 31}};

// Unit variance hidden and logits, a fifth of the targets ignored.
inline CceCase random_case(std::vector<int64_t> shape, int64_t dim, int64_t vocab, bool all_options,
                           uint64_t seed = 1) {
  torch::manual_seed(seed);
  CceCase c;
  auto hidden_shape = shape;
  hidden_shape.push_back(dim);
  c.hidden = torch::randn(hidden_shape, at::kDouble);
  c.weight = torch::randn({vocab, dim}, at::kDouble) / std::sqrt(static_cast<double>(dim));
  c.target = torch::randint(vocab, shape, at::kLong);
  c.target.masked_fill_(torch::rand(shape) < 0.2, -100);
  if (all_options) {
    c.bias = torch::randn({vocab}, at::kDouble) * 0.5;
    c.token_weight = torch::rand(shape, at::kDouble) + 0.5;
    c.class_weight = torch::rand({vocab}, at::kDouble) + 0.5;
    c.target.masked_fill_(c.target == -100, vocab / 2);
    c.options.ignore_index(vocab / 2).label_smoothing(0.1).z_loss(1e-2).softcap(3).logit_scale(0.7);
  }
  return c;
}

struct Composed {
  at::Tensor loss, lse, z_loss, entropy;
};

inline Composed composed(const CceCase& c) {
  const auto& o = c.options;
  const auto vocab = c.weight.size(0);
  auto counted = c.target != o.ignore_index();
  auto x = c.hidden;
  if (const auto k = o.shift()) {
    const auto length = c.target.size(-1);
    counted.narrow(-1, 0, k).fill_(false);
    x = torch::cat({torch::zeros_like(x.narrow(-2, 0, k)), x.narrow(-2, 0, length - k)}, -2);
  }
  x = torch::where(counted.unsqueeze(-1), x, torch::zeros_like(x));
  auto z = torch::matmul(x, c.weight.t());
  if (c.bias.defined()) z = z + c.bias;
  z = z * o.logit_scale();
  if (o.softcap() > 0) z = torch::tanh(z / o.softcap()) * o.softcap();
  const auto log_p = torch::log_softmax(z, -1);
  const auto lse = torch::logsumexp(z, -1);
  const auto y = c.target.to(at::kLong).masked_fill(~counted, 0);
  const auto classes =
      c.class_weight.defined() ? c.class_weight.to(z.dtype()) : torch::ones({vocab}, z.options());
  const auto t = c.token_weight.defined() ? c.token_weight.to(z.dtype())
                                          : torch::ones(c.target.sizes(), z.options());
  const auto nll = -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1) * classes.index({y});
  const auto spread = -(log_p * classes).sum(-1);
  const double a = o.label_smoothing();
  const auto zero = torch::zeros_like(lse);
  const auto square = torch::where(counted, lse.square() * o.z_loss() * t, zero);
  const auto rows =
      torch::where(counted, (nll * (1 - a) + spread * (a / vocab)) * t, zero) + square;
  const auto reduce = [&](const at::Tensor& r) {
    if (o.reduction() == Reduction::kNone) return r;
    if (o.reduction() == Reduction::kSum) return r.sum();
    const auto weights = torch::where(counted, t * classes.index({y}), zero).sum();
    return r.sum() / (weights.item<double>() == 0 ? torch::ones_like(weights) : weights);
  };
  const auto entropy = -(log_p.exp() * log_p).sum(-1);
  return {reduce(rows), torch::where(counted, lse, zero), reduce(square),
          torch::where(counted, entropy, zero)};
}

// Backward of those that are defined, with fixed upstreams of either sign.
inline void backward(const at::Tensor& loss, const at::Tensor& lse,
                     const at::Tensor& entropy = {}) {
  const auto upstream = [](const at::Tensor& t) {
    return torch::linspace(0.3, 1.7, std::max<int64_t>(t.numel(), 1), at::kDouble)
        .narrow(0, 0, t.numel())
        .reshape(t.sizes())
        .to(t.device(), t.scalar_type());
  };
  std::vector<at::Tensor> outputs, upstreams;
  for (const auto& t : {loss, lse, entropy}) {
    if (!t.defined()) continue;
    outputs.push_back(t);
    upstreams.push_back(upstream(t) * (outputs.size() == 3 ? -1 : 1));
  }
  torch::autograd::backward(outputs, upstreams);
}

}  // namespace ounce::cce_test
