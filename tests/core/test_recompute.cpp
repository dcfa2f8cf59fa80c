// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/autocast.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/nn/forward_context.h>
#include <ounce/core/nn/linear.h>
#include <ounce/core/recompute.h>
#include <torch/torch.h>

#include "support/expect_error.h"

namespace {

using ounce::recompute;
using Tensors = std::vector<at::Tensor>;

at::Device test_device() {
  return torch::cuda::is_available() ? at::Device(at::kCUDA) : at::Device(at::kCPU);
}

struct Mlp : torch::nn::Module {
  explicit Mlp(int64_t dim = 16) {
    up = register_module("up", ounce::nn::Linear(dim, 3 * dim));
    down = register_module("down", ounce::nn::Linear(3 * dim, dim));
    to(test_device());
  }
  at::Tensor forward(const at::Tensor& x) {
    return down(at::dropout(at::silu(up(x)), 0.3, /*train=*/true));
  }
  ounce::nn::Linear up{nullptr}, down{nullptr};
};

at::Tensor through(Mlp& mlp, const at::Tensor& x) {
  return recompute([&mlp](const Tensors& in) { return Tensors{mlp.forward(in[0])}; }, {x})[0];
}

struct Result {
  at::Tensor output, input_gradient;
  Tensors gradients;
};

// Two layers, a random draw after them, and gradients; with the same seed each time.
template <class Layer>
Result train(Mlp& mlp, bool input_needs_gradient, const Layer& layer) {
  mlp.zero_grad();
  ounce::seed_everything(11);
  const auto x = torch::randn({5, 16}, test_device()).requires_grad_(input_needs_gradient);
  const auto y = layer(mlp, layer(mlp, x));
  const auto loss = (y * at::randn_like(y)).sum();
  loss.backward();
  Result result{y.detach(), x.grad(), {}};
  for (const auto& parameter : mlp.parameters())
    result.gradients.push_back(parameter.grad().clone());
  return result;
}

void expect_same(const Result& a, const Result& b) {
  EXPECT_TRUE(torch::equal(a.output, b.output));
  ASSERT_EQ(a.input_gradient.defined(), b.input_gradient.defined());
  if (a.input_gradient.defined()) {
    EXPECT_TRUE(torch::equal(a.input_gradient, b.input_gradient));
  }
  ASSERT_EQ(a.gradients.size(), b.gradients.size());
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    EXPECT_TRUE(torch::equal(a.gradients[i], b.gradients[i])) << i;
  }
}

const auto plain = [](Mlp& mlp, const at::Tensor& x) { return mlp.forward(x); };

TEST(Recompute, GradientsWithDropoutAreBitEqual) {
  Mlp mlp;
  for (const bool input_needs_gradient : {true, false}) {
    expect_same(train(mlp, input_needs_gradient, through), train(mlp, input_needs_gradient, plain));
  }
}

TEST(Recompute, Nested) {
  Mlp mlp;
  const auto twice = [](Mlp& m, const at::Tensor& x) {
    return recompute(
        [&m](const Tensors& outer) {
          return recompute([&m](const Tensors& in) { return Tensors{m.forward(in[0])}; }, outer);
        },
        {x})[0];
  };
  expect_same(train(mlp, true, twice), train(mlp, true, plain));
}

TEST(Recompute, AutocastIsRestored) {
  Mlp mlp, other;
  // A weight used in two layers has its gradients summed in another precision by autocast's cache,
  // so each model here is used once.
  const auto with = [&](const auto& layer) {
    mlp.zero_grad();
    other.zero_grad();
    ounce::seed_everything(12);
    const auto x = torch::randn({5, 16}, test_device()).requires_grad_(true);
    at::Tensor y;
    {
      const ounce::AutocastGuard autocast(test_device().type(), at::kBFloat16);
      y = layer(other, layer(mlp, x));
    }
    EXPECT_EQ(y.scalar_type(), at::kBFloat16);
    y.to(at::kFloat).square().sum().backward();
    Result result{y.detach(), x.grad(), {}};
    for (auto* model : {&mlp, &other}) {
      for (const auto& parameter : model->parameters()) {
        result.gradients.push_back(parameter.grad().clone());
      }
    }
    return result;
  };
  expect_same(with(through), with(plain));
  EXPECT_TRUE(at::autocast::is_autocast_cache_enabled());
}

// A weight that is first used inside, then outside: the cast made without grad mode is not reused.
TEST(Recompute, AutocastCacheKeepsTheHistoryOfWeights) {
  Mlp mlp;
  const auto x = torch::randn({5, 16}, test_device());
  const ounce::AutocastGuard autocast(test_device().type(), at::kBFloat16);
  through(mlp, x);
  mlp.up(x).sum().backward();
  EXPECT_TRUE(mlp.up->weight.grad().defined());
}

TEST(Recompute, GeneratorIsAfterwardsAsBefore) {
  Mlp mlp;
  const auto y = through(mlp, torch::randn({5, 16}, test_device()));
  ounce::seed_everything(13);
  const auto expected = torch::rand({4}, test_device());
  ounce::seed_everything(13);
  y.sum().backward();
  EXPECT_TRUE(torch::equal(torch::rand({4}, test_device()), expected));
}

TEST(Recompute, ForwardContextIsRestored) {
  struct Doubled : ounce::nn::ForwardContext {
    at::Tensor linear(ounce::nn::LinearImpl& module, const at::Tensor& x) override {
      ++calls;
      return 2 * module.plain_forward(x);
    }
    at::Tensor embedding(ounce::nn::EmbeddingImpl&, const at::Tensor&) override { return {}; }
    at::Tensor rms_norm(ounce::nn::RMSNormImpl&, const at::Tensor&) override { return {}; }
    int calls = 0;
  } doubled;
  ounce::nn::Linear linear(3, 3);
  const auto x = torch::randn({2, 3}).requires_grad_(true);
  at::Tensor y;
  {
    const ounce::nn::ForwardContextGuard guard(&doubled);
    y = recompute([&](const Tensors& in) { return Tensors{linear(in[0])}; }, {x})[0];
  }
  y.sum().backward();
  EXPECT_EQ(doubled.calls, 2);
  EXPECT_TRUE(torch::allclose(x.grad(), 2 * linear->weight.sum(0).expand({2, 3})));
  EXPECT_EQ(ounce::nn::ForwardContext::current(), nullptr);
}

TEST(Recompute, UndefinedAndOddTensors) {
  const auto x = torch::randn({3}).requires_grad_(true);
  const auto index = torch::tensor({2, 0, 1});
  const auto out = recompute(
      [](const Tensors& in) {
        EXPECT_FALSE(in[1].defined());
        return Tensors{at::Tensor(), in[0].index({in[2]}).square(), in[2] + 1, in[0],
                       in[0].view({1, 3})};
      },
      {x, at::Tensor(), index});
  ASSERT_EQ(out.size(), 5u);
  EXPECT_FALSE(out[0].defined());
  EXPECT_FALSE(out[2].requires_grad());
  EXPECT_FALSE(out[3].is_same(x));
  EXPECT_TRUE(x.is_leaf());
  (out[1].sum() + 3 * out[3].sum() + out[4].sum()).backward();
  EXPECT_TRUE(torch::allclose(x.grad(), 2 * x.detach() + 4));
  EXPECT_TRUE(recompute([](const Tensors& in) { return in; }, {}).empty());
}

TEST(Recompute, UnusedOutputsAndConstantsGiveNoGradient) {
  const auto x = torch::randn({3}).requires_grad_(true);
  const auto frozen = torch::randn({3});
  const auto out = recompute(
      [&](const Tensors& in) {
        return Tensors{in[0] * 2, frozen * 3};
      },
      {x});
  out[1].sum().backward();
  EXPECT_FALSE(x.grad().defined());
}

TEST(Recompute, WithoutGradModeItIsACall) {
  Mlp mlp;
  const at::NoGradGuard no_grad;
  const auto y = through(mlp, torch::randn({5, 16}, test_device()));
  EXPECT_FALSE(y.requires_grad());
}

TEST(Recompute, RetainGraphRunsAgain) {
  Mlp mlp;
  const auto y = through(mlp, torch::randn({5, 16}, test_device())).sum();
  y.backward({}, /*retain_graph=*/true);
  const auto once = mlp.up->weight.grad().clone();
  y.backward();
  EXPECT_TRUE(torch::equal(mlp.up->weight.grad(), once + once));
  EXPECT_OUNCE_ERROR(y.backward(), kUsage, "second backward");
}

TEST(Recompute, MisuseIsNamed) {
  const auto square = [](const Tensors& in) { return Tensors{in[0] * in[1]}; };
  const auto a = torch::randn({3}).requires_grad_(true);
  const auto b = torch::randn({3});
  auto y = recompute(square, {a, b})[0];
  b.add_(1);
  EXPECT_OUNCE_ERROR(y.sum().backward(), kUsage, "input 1 was modified in place");
  EXPECT_OUNCE_ERROR(recompute([](const Tensors& in) { return Tensors{in[1].mul_(2)}; }, {a, b}),
                     kUsage, "the function modified input 1");
  y = recompute(square, {a, b})[0].sum();
  EXPECT_OUNCE_ERROR(torch::autograd::grad({y}, {a}), kUsage, "without a list of inputs");
  y = recompute(square, {a, b})[0].sum();
  EXPECT_OUNCE_ERROR(y.backward({}, true, /*create_graph=*/true), kUsage, "double backward");
  int calls = 0;
  y = recompute([&](const Tensors& in) { return calls++ == 0 ? Tensors{in[0] * 2} : Tensors{}; },
                {a})[0];
  EXPECT_OUNCE_ERROR(y.sum().backward(), kUsage, "1 outputs first and 0");
}

TEST(Recompute, KeepsLessMemory) {
  ounce::count_cpu_memory();
  const int64_t layers = 6, rows = 512, dim = 32;
  std::vector<std::shared_ptr<Mlp>> model;
  for (int64_t i = 0; i < layers; ++i) model.push_back(std::make_shared<Mlp>(dim));
  // Bytes that the graph holds after the forward pass, and the peak of both passes above the start.
  const auto measure = [&](const auto& layer) {
    const auto device = test_device();
    auto x = torch::randn({rows, dim}, device);
    for (const auto& mlp : model) mlp->zero_grad();
    const auto start = ounce::memory_use(device).current;
    ounce::reset_peak_memory(device);
    for (const auto& mlp : model) x = layer(*mlp, x);
    const auto held = ounce::memory_use(device).current - start;
    x.sum().backward();
    return std::pair(held, ounce::memory_use(device).peak - start);
  };
  const auto [plain_held, plain_peak] = measure(plain);
  const auto [held, peak] = measure(through);
  std::printf("held %ld against %ld, peak %ld against %ld bytes\n", held, plain_held, peak,
              plain_peak);
  const int64_t boundary = rows * dim * static_cast<int64_t>(sizeof(float));
  EXPECT_LE(held,
            (layers + 1) * boundary + layers * 8192);  // the layers' inputs, generators' states
  EXPECT_LT(2 * peak, plain_peak);
}

}  // namespace
