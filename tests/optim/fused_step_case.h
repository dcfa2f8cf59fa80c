// SPDX-License-Identifier: MIT
// What the tests of fused steps share: the same parameters under a fused and a composed optimizer.
#pragma once

#include <gtest/gtest.h>
#include <ounce/optim/dct_adamw.h>
#include <torch/torch.h>

#include <functional>
#include <memory>

#include "support/devices.h"
#include "support/residuals.h"
#include "support/rms_error.h"
#include "support/state_tensors.h"

namespace ounce::optim {

using at::Tensor;
using ounce::test::residuals_of;
using ounce::test::rms_error;
using Shapes = std::vector<std::vector<int64_t>>;

class FusedStepCase : public ounce::test::OnDevice {
 protected:
  Tensor scalar(double x) const { return torch::full({}, x, torch::device(device())); }
};

// Gradients whose columns, in the basis, differ by much and drift: no choice of them is close.
inline Tensor gradient_of(const Tensor& p, int64_t step) {
  torch::manual_seed(static_cast<uint64_t>(100 + step));
  auto g = torch::randn(p.sizes(), torch::device(p.device()));
  if (p.dim() == 2) {
    const auto n = std::min(p.size(0), p.size(1));
    const auto scale =
        (3 * torch::sin(torch::arange(n, g.options()) * 1.3 + 0.2 * static_cast<double>(step)))
            .exp();
    const auto basis = dct_basis(n, Basis::kDct2, g.options());
    g = p.size(0) >= p.size(1) ? torch::mm(g * scale, basis)
                               : torch::mm(basis.t(), scale.unsqueeze(1) * g);
  }
  return g.to(p.scalar_type());
}

// Gradients of 32 large columns in the basis, others at each step, so that what was held back does
// not decide the choice.
inline Tensor clear_gradient_of(const Tensor& p, int64_t step, Basis basis, bool right) {
  torch::manual_seed(static_cast<uint64_t>(200 + step));
  const auto g = torch::randn(p.sizes(), torch::device(p.device()));
  if (p.dim() != 2) return g.to(p.scalar_type());
  const auto n = p.size(right ? 1 : 0);
  auto scale = torch::full({n}, 0.3, g.options());
  scale.index_fill_(0, (torch::arange(32, scale.options().dtype(at::kLong)) * 17 + 5 * step) % n,
                    8);
  const auto b = dct_basis(n, basis, g.options());
  return (right ? torch::mm(g * scale, b) : torch::mm(b.t(), scale.unsqueeze(1) * g))
      .to(p.scalar_type());
}

// The same parameters under a fused and a composed optimizer.
template <class O, class Options>
struct Pair {
  std::vector<Tensor> fused, composed;
  std::unique_ptr<O> ours, reference;
  std::function<Tensor(const Tensor&, int64_t)> gradient = gradient_of;

  Pair(const Shapes& shapes, at::ScalarType type, at::Device device, Options options) {
    torch::manual_seed(1);
    for (const auto& shape : shapes) {
      const auto p = torch::randn(shape, torch::device(device)).to(type);
      fused.push_back(p.clone().requires_grad_());
      composed.push_back(p.clone().requires_grad_());
    }
    options.implementation = "fused";
    ours = std::make_unique<O>(fused, options);
    options.implementation = "reference";
    reference = std::make_unique<O>(composed, options);
  }
  void step(int64_t at, const StepControl& control) {
    for (size_t i = 0; i < fused.size(); ++i) {
      fused[i].mutable_grad() = gradient(fused[i], at);
      composed[i].mutable_grad() = fused[i].grad().clone();
    }
    ours->step(control);
    reference->step(control);
  }
  // Of what both have changed, the part that differs.
  double difference(const std::vector<Tensor>& before) const {
    double worst = 0;
    for (size_t i = 0; i < fused.size(); ++i) {
      const auto change = composed[i].detach().to(at::kDouble) - before[i].to(at::kDouble);
      worst = std::max(worst, rms_error(fused[i].detach().to(at::kDouble) - before[i], change));
    }
    return worst;
  }
  std::vector<Tensor> copies() const {
    std::vector<Tensor> all;
    for (const auto& p : composed) all.push_back(p.detach().clone());
    return all;
  }
};

inline std::vector<Tensor> state_of(NamedOptimizer& optimizer) {
  std::vector<Tensor> all;
  for (const auto& [name, tensor] : ounce::test::state_tensors(optimizer)) all.push_back(tensor);
  return all;
}

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16};

constexpr ResidualType kResidualTypes[] = {ResidualType::kFp32, ResidualType::kBf16,
                                           ResidualType::kInt8};
inline DctAdamWOptions feeding_back(ResidualType type) {
  DctAdamWOptions o;
  o.rank = 32;
  o.residual = Residual::kErrorFeedback;
  o.residual_type = type;
  return o;
}

}  // namespace ounce::optim
