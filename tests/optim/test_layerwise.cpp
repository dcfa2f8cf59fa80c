// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/galore.h>
#include <ounce/optim/layerwise.h>
#include <ounce/optim/trion.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <memory>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/rms_error.h"

namespace ounce::optim {

namespace {

using at::Tensor;
using ounce::test::rms_error;

// Two layers of a shape, one that reads the first one's weight again, and a bias.
struct Net {
  NamedParameters parameters;

  explicit Net(at::Device device) {
    torch::manual_seed(1);
    const auto make = [&](const char* name, at::IntArrayRef sizes) {
      const auto p = torch::randn(sizes, at::kDouble) / 3;
      parameters.emplace_back(name, p.to(device).requires_grad_());
    };
    make("first", {8, 8});
    make("second", {8, 8});
    make("bias", {8});
    make("last", {4, 8});
  }
  Tensor loss(int64_t step) const {
    torch::manual_seed(static_cast<uint64_t>(step));
    const auto x = torch::randn({16, 8}, at::kDouble).to(parameters[0].second.device());
    auto y = torch::tanh(at::matmul(x, parameters[0].second.t()));
    y = torch::tanh(at::matmul(y, parameters[1].second.t()) + parameters[2].second);
    y = torch::tanh(at::matmul(y, parameters[0].second));
    return at::matmul(y, parameters[3].second.t()).square().mean();
  }
  int64_t gradients() const {
    return std::count_if(parameters.begin(), parameters.end(),
                         [](const auto& p) { return p.second.grad().defined(); });
  }
};

using Make = std::function<std::unique_ptr<NamedOptimizer>(NamedParameters)>;

std::vector<std::pair<const char*, Make>> optimizers() {
  return {
      {"adamw", [](NamedParameters p) { return std::make_unique<FusedAdamW>(p); }},
      {"dct_adamw",
       [](NamedParameters p) {
         DctAdamWOptions o;
         o.rank = 3;
         o.residual = Residual::kErrorFeedback;
         return std::make_unique<DctAdamW>(p, o);
       }},
      {"galore",
       [](NamedParameters p) {
         GaLoreOptions o;
         o.rank = 3;
         return std::make_unique<GaLore>(p, o);
       }},
      {"trion",
       [](NamedParameters p) {
         TrionOptions o;
         o.rank = 3;
         return std::make_unique<Trion>(p, o);
       }},
      {"muon", [](NamedParameters p) { return std::make_unique<Muon>(p); }},
  };
}

class Layerwise : public ounce::test::OnDevice {};
OUNCE_ON_EACH_DEVICE(Layerwise);

TEST_P(Layerwise, StepsAsAStepAfterBackwardDoes) {
  for (const auto& [name, make] : optimizers()) {
    const Net one(device()), other(device());
    const auto inside = make(one.parameters), after = make(other.parameters);
    LayerwiseStepper stepper(*inside);
    int64_t steps = 0;
    inside->before_update([&](at::TensorList) {
      EXPECT_EQ(one.gradients(), 1) << name;  // and no other is alive
      ++steps;
    });
    for (int64_t step = 0; step < 10; ++step) {
      const auto scalar = [&](double x) { return torch::tensor(x, torch::device(device())); };
      const StepControl control{.lr = scalar(0.01 / static_cast<double>(step + 1)),
                                .grad_scale = scalar(0.5)};
      stepper.set_control(control);
      one.loss(step).backward();
      EXPECT_EQ(one.gradients(), 0) << name;
      other.loss(step).backward();
      std::vector<Tensor> all;
      for (const auto& [parameter, p] : other.parameters) all.push_back(p.grad().flatten());
      EXPECT_LE(rms_error(stepper.take_norm(), at::cat(all).norm()), 1e-9) << name;
      EXPECT_FALSE(stepper.take_norm().defined());
      after->step(control);
      after->zero_grad();
    }
    EXPECT_EQ(steps, 40) << name;
    for (size_t i = 0; i < one.parameters.size(); ++i) {
      EXPECT_LE(rms_error(one.parameters[i].second, other.parameters[i].second), 1e-11) << name;
    }
  }
}

// Steps of three backward() calls each, but the first: it chooses the columns for all.
TEST_P(Layerwise, AccumulatedGradientsAreOneStep) {
  const std::pair<const char*, Make> both[] = {
      {"adamw", [](NamedParameters p) { return std::make_unique<FusedAdamW>(p); }},
      {"dct_adamw", [](NamedParameters p) {
         DctAdamWOptions o;
         o.rank = 3;
         o.update_interval = 100;
         return std::make_unique<DctAdamW>(p, o);
       }}};
  for (const auto& [name, make] : both) {
    SCOPED_TRACE(name);
    const Net one(device()), other(device());
    const auto inside = make(one.parameters), after = make(other.parameters);
    LayerwiseStepper stepper(*inside);
    for (int64_t step = 0; step < 6; ++step) {
      const int parts = step == 0 ? 1 : 3;
      for (int part = 0; part < parts; ++part) {
        stepper.accumulate(part + 1 < parts);
        one.loss(10 * step + part).backward();
        EXPECT_EQ(one.gradients(), 0);
        other.loss(10 * step + part).backward();
      }
      after->step();
      after->zero_grad();
    }
    for (size_t i = 0; i < one.parameters.size(); ++i) {
      EXPECT_LE(rms_error(one.parameters[i].second, other.parameters[i].second), 1e-11);
    }
  }
}

TEST_P(Layerwise, OneBrokenPartBreaksItsStep) {
  const Net net(device());
  DctAdamWOptions o;
  o.rank = 3;
  DctAdamW optimizer(net.parameters, o);
  LayerwiseStepper stepper(optimizer);
  std::vector<Tensor> before;
  for (const auto& [name, p] : net.parameters) before.push_back(p.detach().clone());
  stepper.accumulate(true);
  (net.loss(0) + (net.parameters[1].second * std::nan("")).sum() +
   (net.parameters[2].second * std::nan("")).sum())
      .backward();
  stepper.accumulate(false);
  net.loss(1).backward();
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(at::equal(net.parameters[i].second.detach(), before[i]), i == 1 || i == 2);
  }
  net.loss(2).backward();  // and is forgotten
  EXPECT_FALSE(at::equal(net.parameters[1].second.detach(), before[1]));
  EXPECT_TRUE(net.parameters[1].second.detach().isfinite().all().item<bool>());
}

// What the last backward does not reach steps all the same.
TEST_P(Layerwise, FlushStepsWhatIsLeft) {
  const Net one(device()), other(device());
  DctAdamWOptions o;
  o.rank = 3;
  DctAdamW inside(one.parameters, o), after(other.parameters, o);
  LayerwiseStepper stepper(inside);
  stepper.accumulate(true);
  one.loss(0).backward();
  stepper.accumulate(false);
  one.parameters[2].second.sum().backward();  // the bias alone
  stepper.flush();
  other.loss(0).backward();
  other.parameters[2].second.sum().backward();
  after.step();
  for (size_t i = 0; i < one.parameters.size(); ++i) {
    EXPECT_LE(rms_error(one.parameters[i].second, other.parameters[i].second), 1e-11);
  }
  const auto before = one.parameters[0].second.detach().clone();
  stepper.flush();
  EXPECT_TRUE(at::equal(one.parameters[0].second.detach(), before));
}

TEST_P(Layerwise, AResidualIsNotAccumulated) {
  const Net net(device());
  DctAdamWOptions o;
  o.rank = 3;
  o.residual = Residual::kSign;
  DctAdamW optimizer(net.parameters, o);
  LayerwiseStepper stepper(optimizer);
  stepper.accumulate(true);
  EXPECT_OUNCE_ERROR(net.loss(0).backward(), kUsage, "expected residual = none where projected");
}

TEST_P(Layerwise, WhatIsNotFiniteSkipsAlone) {
  const Net net(device());
  FusedAdamW optimizer(net.parameters);
  const LayerwiseStepper stepper(optimizer);
  const auto before = net.parameters[3].second.detach().clone();
  const auto first = net.parameters[0].second.detach().clone();
  (net.loss(0) + (net.parameters[3].second * std::nan("")).sum()).backward();
  EXPECT_TRUE(at::equal(net.parameters[3].second.detach(), before));
  EXPECT_FALSE(at::equal(net.parameters[0].second.detach(), first));
  EXPECT_EQ(net.gradients(), 0);
}

TEST_P(Layerwise, GradientsLiveAgainWithoutIt) {
  const Net net(device());
  FusedAdamW optimizer(net.parameters);
  { const LayerwiseStepper stepper(optimizer); }
  const auto before = net.parameters[0].second.detach().clone();
  net.loss(0).backward();
  EXPECT_EQ(net.gradients(), 4);
  EXPECT_TRUE(at::equal(net.parameters[0].second.detach(), before));
}

TEST_P(Layerwise, PausedItOnlyFrees) {
  const Net net(device());
  FusedAdamW optimizer(net.parameters);
  LayerwiseStepper stepper(optimizer);
  const auto before = net.parameters[0].second.detach().clone();
  stepper.pause(true);
  net.loss(0).backward();
  EXPECT_EQ(net.gradients(), 0);
  EXPECT_TRUE(at::equal(net.parameters[0].second.detach(), before));
  stepper.pause(false);
  net.loss(0).backward();
  EXPECT_FALSE(at::equal(net.parameters[0].second.detach(), before));
}

TEST_P(Layerwise, RefusesByName) {
  const Net net(device());
  FusedAdamW optimizer(net.parameters);
  net.loss(0).backward();
  EXPECT_OUNCE_ERROR(LayerwiseStepper(std::ref(optimizer)), kUsage,
                     "'first': expected no gradient");
  optimizer.zero_grad();
  const LayerwiseStepper stepper(optimizer);
  EXPECT_OUNCE_ERROR(LayerwiseStepper(std::ref(optimizer)), kUsage,
                     "'first' has a post-accumulate");
  // The error of a step comes out of backward.
  optimizer.before_update([](at::TensorList) { fail(Fault::kData, "no room"); });
  EXPECT_ANY_THROW(net.loss(0).backward());
}

}  // namespace

}  // namespace ounce::optim
