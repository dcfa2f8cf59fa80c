// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/autocast.h>
#include <ounce/core/nn/forward_context.h>
#include <ounce/core/nn/parts.h>
#include <ounce/core/nn/rms_norm.h>
#include <ounce/core/registry.h>
#include <ounce/kernels/norm/norm.h>
#include <torch/torch.h>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/rms_error.h"

namespace ounce {

namespace {

using at::Tensor;
using test::rms_error;

Tensor composed(const Tensor& x, const Tensor& weight, double eps) {
  const auto y = x / torch::sqrt(x.square().mean(-1, true) + eps);
  return weight.defined() ? y * weight : y;
}

Tensor leaf(const Tensor& t, at::ScalarType type) {
  return t.detach().to(type).clone().requires_grad_();
}

const std::vector<std::vector<int64_t>> kShapes = {{1},    {7},    {3, 1},    {0},
                                                   {0, 5}, {3, 0}, {129, 33}, {2, 5, 768}};

class NormOnDevice : public test::OnDevice {
 protected:
  Tensor randn(at::IntArrayRef shape, at::ScalarType type = at::kFloat) const {
    return torch::randn(shape, type).to(device());
  }
};
OUNCE_ON_EACH_DEVICE(NormOnDevice);

TEST_P(NormOnDevice, EqualsComposedInFp64) {
  for (const auto& shape : kShapes) {
    for (const bool with_weight : {true, false}) {
      const auto x = leaf(randn(shape), at::kDouble), x_ref = leaf(x, at::kDouble);
      Tensor w, w_ref;
      if (with_weight) {
        w = leaf(randn({shape.back()}), at::kDouble);
        w_ref = leaf(w, at::kDouble);
      }
      const auto up = randn(shape, at::kDouble);
      const auto y = rms_norm(x, w, 1e-3), y_ref = composed(x_ref, w_ref, 1e-3);
      EXPECT_LE(rms_error(y, y_ref), 1e-14);
      y.backward(up);
      y_ref.backward(up);
      EXPECT_LE(rms_error(x.grad(), x_ref.grad()), 1e-11);  // at d = 1 a small difference
      if (with_weight) {
        EXPECT_LE(rms_error(w.grad(), w_ref.grad()), 1e-12);
      }
    }
  }
}

TEST_P(NormOnDevice, AddEqualsComposedForEveryUseOfItsOutputs) {
  for (const bool use_sum : {true, false}) {
    for (const bool use_normed : {true, false}) {
      if (!use_sum && !use_normed) continue;
      const auto a = leaf(randn({4, 9, 40}), at::kDouble), a_ref = leaf(a, at::kDouble);
      const auto d = leaf(randn({4, 9, 40}), at::kDouble), d_ref = leaf(d, at::kDouble);
      const auto w = leaf(randn({40}), at::kDouble), w_ref = leaf(w, at::kDouble);
      const auto up = randn({4, 9, 40}, at::kDouble);
      const auto value = [&](const Tensor& sum, const Tensor& normed) {
        auto total = torch::zeros({}, sum.options());
        if (use_sum) total = total + (sum * up).sum() * 0.7;
        if (use_normed) total = total + (normed * up).sum();
        return total;
      };
      const auto [sum, normed] = add_rms_norm(a, d, w);
      const auto sum_ref = a_ref + d_ref, normed_ref = composed(sum_ref, w_ref, 1e-5);
      EXPECT_TRUE(at::equal(sum, sum_ref));
      EXPECT_LE(rms_error(normed, normed_ref), 1e-14);
      value(sum, normed).backward();
      value(sum_ref, normed_ref).backward();
      EXPECT_LE(rms_error(a.grad(), a_ref.grad()), 1e-12);
      EXPECT_LE(rms_error(d.grad(), d_ref.grad()), 1e-12);
      EXPECT_EQ(w.grad().defined(), use_normed);
      if (use_normed) {
        EXPECT_LE(rms_error(w.grad(), w_ref.grad()), 1e-12);
      }
    }
  }
}

TEST(Norm, GradientIsTheDifferenceQuotient) {
  torch::manual_seed(3);
  const auto x = leaf(torch::randn({3, 8}), at::kDouble), w = leaf(torch::randn({8}), at::kDouble);
  const auto value = [](const Tensor& at, const Tensor& weight) {
    return rms_norm(at, weight, 0.1).square().sum();
  };
  value(x, w).backward();
  torch::NoGradGuard no_grad;
  const auto dx = torch::randn_like(x), dw = torch::randn_like(w);
  const double step = 1e-6;
  const double quotient =
      (value(x + dx * step, w + dw * step) - value(x - dx * step, w - dw * step)).item<double>() /
      (2 * step);
  const double slope = ((x.grad() * dx).sum() + (w.grad() * dw).sum()).item<double>();
  EXPECT_NEAR(slope, quotient, 1e-7 * std::abs(quotient));
}

// Sixteen-bit inputs are computed in fp32 and rounded once.
TEST_P(NormOnDevice, SixteenBitIsOneRoundingAway) {
  for (const auto type : {at::kBFloat16, at::kHalf, at::kFloat}) {
    const auto x = leaf(randn({64, 256}), type), w = leaf(randn({256}), type);
    const auto x_ref = leaf(x, at::kDouble), w_ref = leaf(w, at::kDouble);
    const auto up = randn({64, 256}).to(type);
    const auto y = rms_norm(x, w), y_ref = composed(x_ref, w_ref, 1e-5);
    y.backward(up);
    y_ref.backward(up.to(at::kDouble));
    const auto check = [&](const Tensor& t, const Tensor& ref) {
      EXPECT_EQ(t.scalar_type(), type);
      const double rounding = rms_error(ref.to(type), ref);
      EXPECT_LE(rms_error(t, ref), 1.1 * rounding + 1e-6) << type;
    };
    check(y, y_ref);
    check(x.grad(), x_ref.grad());
    check(w.grad(), w_ref.grad());
  }
}

TEST_P(NormOnDevice, MixedTypesUnderAutocast) {
  const auto residual = randn({5, 16}).requires_grad_();
  const auto delta = randn({5, 16}).to(at::kBFloat16).requires_grad_();
  const auto weight = torch::ones({16}, device()).requires_grad_();
  AutocastGuard autocast(GetParam(), at::kBFloat16);
  const auto [sum, normed] = add_rms_norm(residual, delta, weight);
  EXPECT_EQ(sum.scalar_type(), at::kFloat);
  EXPECT_EQ(normed.scalar_type(), at::kFloat);
  (sum + normed).sum().backward();
  EXPECT_EQ(delta.grad().scalar_type(), at::kBFloat16);
  EXPECT_EQ(residual.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(rms_norm(delta, weight).scalar_type(), at::kBFloat16);
}

TEST_P(NormOnDevice, StridedInputsAndRepeats) {
  const auto x = randn({6, 7, 5}).permute({2, 0, 1});
  const auto plain = x.contiguous();
  const auto w = randn({14}).slice(0, 0, 14, 2);
  const auto y = rms_norm(x, w);
  EXPECT_TRUE(y.is_contiguous());
  EXPECT_TRUE(at::equal(y, rms_norm(plain, w.contiguous())));
  const auto input = x.clone().requires_grad_();
  const auto loss = rms_norm(input, w).square().sum();
  const auto first = torch::autograd::grad({loss}, {input}, {}, true);
  const auto second = torch::autograd::grad({loss}, {input}, {}, true);
  EXPECT_TRUE(at::equal(first[0], second[0]));
}

TEST(Norm, FrozenInputsGetNothing) {
  const auto x = torch::randn({3, 4}), w = torch::randn({4}).requires_grad_();
  rms_norm(x, w).sum().backward();
  EXPECT_TRUE(w.grad().defined());
  const auto y = torch::randn({3, 4}).requires_grad_(), frozen = w.detach();
  rms_norm(y, frozen).sum().backward();
  EXPECT_TRUE(y.grad().defined());
  EXPECT_FALSE(frozen.grad().defined());
}

TEST(Norm, DoubleBackwardThrowsByName) {
  const auto x = torch::randn({2, 4}).requires_grad_();
  const auto first = torch::autograd::grad({rms_norm(x).square().sum()}, {x}, {}, true, true);
  EXPECT_OUNCE_ERROR(first[0].sum().backward(), kUsage,
                     "[rms_norm] expected a first derivative, got double backward");
}

TEST(Norm, ErrorsNameWhatIsWrong) {
  const auto x = torch::ones({2, 4});
  const auto expect = [](const char* text, auto call) {
    test::expect_error(Fault::kUsage, {text}, call);
  };
  expect("[rms_norm] expected x of a floating dtype, got Long", [&] { rms_norm(x.to(at::kLong)); });
  expect("[rms_norm] expected x of a floating dtype, got an undefined",
         [&] { rms_norm(Tensor()); });
  expect("[rms_norm] expected x [..., d], got a scalar", [&] { rms_norm(x.sum()); });
  expect("[rms_norm] expected weight [d] with d = 4, got [3]",
         [&] { rms_norm(x, torch::ones({3})); });
  expect("[rms_norm] expected eps > 0, got 0", [&] { rms_norm(x, x[0], 0); });
  expect("[add_rms_norm] expected residual and delta of one shape and floating dtypes",
         [&] { add_rms_norm(x, torch::ones({4}), x[0]); });
}

// --- the registered norm ------------------------------------------------------------------------

std::shared_ptr<Norm> make_norm(int64_t dim) {
  if (!registry_store("norm").contains("rms_norm")) register_norm();
  Norm::Context context;
  context.dim = dim;
  return registry<Norm>().make(Value("rms_norm"), context);
}

TEST(NormModule, ParameterIsCalledWeight) {
  const auto norm = make_norm(6);
  EXPECT_EQ(norm->named_parameters().keys(), std::vector<std::string>{"weight"});
  const auto x = torch::randn({2, 3, 6});
  EXPECT_LE(rms_error(norm->forward(x), composed(x.to(at::kDouble), {}, 1e-5)), 1e-6);
  const auto [sum, normed] = norm->forward_add(x, Tensor());
  EXPECT_TRUE(sum.is_same(x));
  EXPECT_TRUE(at::equal(normed, norm->forward(x)));
  const auto pair = norm->forward_add(x, x);
  EXPECT_TRUE(at::equal(pair.first, x + x));
  EXPECT_TRUE(at::equal(pair.second, norm->forward(x + x)));
}

// Replaces what a norm does by the doubled weight.
struct Doubling : nn::ForwardContext {
  Tensor linear(nn::LinearImpl&, const Tensor& x) override { return x; }
  Tensor embedding(nn::EmbeddingImpl&, const Tensor& x) override { return x; }
  Tensor rms_norm(nn::RMSNormImpl& module, const Tensor& x) override {
    seen = module.weight;
    return ounce::rms_norm(x, module.weight * 2, module.eps);
  }
  Tensor seen;
};

TEST(NormModule, ForwardContextSeesIt) {
  const auto norm = make_norm(6);
  norm->to(at::kDouble);
  {
    torch::NoGradGuard no_grad;
    norm->parameters()[0].normal_();
  }
  const auto x = torch::randn({2, 6}, at::kDouble), d = torch::randn({2, 6}, at::kDouble);
  const auto plain = norm->forward(x);
  const auto plain_sum = norm->forward_add(x, d);
  Doubling doubling;
  nn::ForwardContextGuard guard(&doubling);
  EXPECT_LE(rms_error(norm->forward(x), plain * 2), 1e-14);
  EXPECT_TRUE(doubling.seen.is_same(norm->parameters()[0]));
  const auto [sum, normed] = norm->forward_add(x, d);
  EXPECT_TRUE(at::equal(sum, plain_sum.first));
  EXPECT_LE(rms_error(normed, plain_sum.second * 2), 1e-14);
}

}  // namespace

}  // namespace ounce
