// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/optim/clip.h>
#include <ounce/optim/fused_adamw.h>
#include <torch/torch.h>

#include <cmath>
#include <cstring>
#include <sstream>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/no_sync.h"
#include "support/registered_optimizers.h"
#include "support/rms_error.h"

namespace {

using ounce::Options;
using ounce::StepControl;
using ounce::optim::AdamWOptions;
using ounce::optim::FusedAdamW;
using ounce::optim::NamedOptimizer;
using ounce::optim::NamedParameters;
using ounce::test::rms_error;

// Shapes with tails of the vector loop, a scalar, nothing at all, and a transposed layout.
std::vector<at::Tensor> make_parameters(at::ScalarType type, uint64_t seed,
                                        at::Device device = at::kCPU) {
  torch::manual_seed(seed);
  std::vector<at::Tensor> made;
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{33, 17}, {5}, {}, {0, 3}, {64}}) {
    made.push_back(torch::randn(sizes, type).to(device).requires_grad_(true));
  }
  made.push_back(torch::randn({6, 9}, type).to(device).t().requires_grad_(true));
  return made;
}

std::vector<at::Tensor> copies(const std::vector<at::Tensor>& from) {
  std::vector<at::Tensor> result;
  for (const auto& tensor : from) {
    result.push_back(tensor.detach().clone(at::MemoryFormat::Preserve).requires_grad_(true));
  }
  return result;
}

std::vector<at::Tensor> gradients_of(const std::vector<at::Tensor>& parameters, int64_t step) {
  torch::manual_seed(static_cast<uint64_t>(1000 + step));
  std::vector<at::Tensor> result;
  for (const auto& parameter : parameters) result.push_back(torch::randn_like(parameter.detach()));
  return result;
}

void set_gradients(const std::vector<at::Tensor>& parameters,
                   const std::vector<at::Tensor>& values) {
  for (size_t i = 0; i < parameters.size(); ++i) parameters[i].mutable_grad() = values[i].clone();
}

// Every tensor that the optimizer presents, cloned.
std::map<std::string, at::Tensor> state_of(FusedAdamW& optimizer) {
  struct Copy : ounce::StateVisitor {
    void tensor(std::string_view name, at::Tensor& value, ounce::StateClass) override {
      found[full_name(name)] = value.clone();
    }
    void integer(std::string_view, int64_t&) override {}
    void number(std::string_view, double&) override {}
    void text(std::string_view, std::string&) override {}
    bool loading() const override { return false; }
    std::map<std::string, at::Tensor> found;
  } copy;
  optimizer.visit_state(copy);
  return copy.found;
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  const auto x = a.detach().cpu().contiguous(), y = b.detach().cpu().contiguous();
  return x.sizes() == y.sizes() && std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0;
}

bool same_state(FusedAdamW& optimizer, const std::map<std::string, at::Tensor>& before) {
  const auto now = state_of(optimizer);
  if (now.size() != before.size()) return false;
  for (const auto& [name, value] : now) {
    if (!same_bits(value, before.at(name))) return false;
  }
  return true;
}

// One rule that gives every parameter the decay torch::optim::AdamW gives it.
AdamWOptions like_torch(bool amsgrad) {
  AdamWOptions options;
  options.lr = 3e-2;
  options.beta2 = 0.99;
  options.amsgrad = amsgrad;
  options.groups = {{"*", Options::parse("weight_decay = 0.1", "test")}};
  return options;
}

class FusedAdamWOnDevice : public ounce::test::OnDevice {};
OUNCE_ON_EACH_DEVICE(FusedAdamWOnDevice);

TEST_P(FusedAdamWOnDevice, FiftyStepsEqualTorch) {
  for (const auto type : {at::kDouble, at::kFloat}) {
    for (const bool amsgrad : {false, true}) {
      const auto ours = make_parameters(type, 1, device()), theirs = copies(ours);
      FusedAdamW optimizer(ours, like_torch(amsgrad));
      torch::optim::AdamW reference(
          theirs,
          torch::optim::AdamWOptions(3e-2).betas({0.9, 0.99}).weight_decay(0.1).amsgrad(amsgrad));
      for (int64_t step = 0; step < 50; ++step) {
        set_gradients(ours, gradients_of(ours, step));
        set_gradients(theirs, gradients_of(ours, step));
        optimizer.step();
        reference.step();
      }
      // A GPU contracts to fused multiply-adds.
      const double bound = type == at::kDouble ? 1e-12 : on_gpu() ? 1e-5 : 2e-6;
      double worst = 0;
      for (size_t i = 0; i < ours.size(); ++i) {
        worst = std::max(worst, rms_error(ours[i], theirs[i]));
      }
      std::printf("worst error %.2e, bound %.0e\n", worst, bound);
      EXPECT_LT(worst, bound);
    }
  }
}

TEST_P(FusedAdamWOnDevice, RepeatsBitForBit) {
  const auto first = make_parameters(at::kFloat, 11, device()), second = copies(first);
  FusedAdamW a(first, like_torch(true)), b(second, like_torch(true));
  for (int64_t step = 0; step < 10; ++step) {
    set_gradients(first, gradients_of(first, step));
    set_gradients(second, gradients_of(first, step));
    a.step();
    b.step();
  }
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(same_bits(first[i], second[i])) << i;
  EXPECT_TRUE(same_state(a, state_of(b)));
}

// With its scalars on the device, as the trainer keeps them.
TEST_P(FusedAdamWOnDevice, AStepDoesNotWaitForTheDevice) {
  const auto parameters = make_parameters(at::kFloat, 12, device());
  FusedAdamW optimizer(parameters);
  set_gradients(parameters, gradients_of(parameters, 0));
  const auto scalar = [&](double value) { return torch::full({}, value, device()); };
  const ounce::StepControl control{.lr = scalar(1e-3), .grad_scale = scalar(1), .skip = scalar(0)};
  const auto gradients = gradients_of(parameters, 1);
  const auto step = [&] {
    ounce::optim::clip_by_norm(gradients, 1);
    optimizer.step(control);
  };
  step();
  const ounce::test::NoSync no_sync(device());
  EXPECT_NO_THROW(step());
  if (on_gpu()) {
    EXPECT_THROW(control.lr.item<float>(), c10::Error) << "a wait goes unseen";
  }
}

TEST_P(FusedAdamWOnDevice, DeviceLearningRateEqualsHostLearningRate) {
  const auto host = make_parameters(at::kFloat, 2, device()), device = copies(host);
  auto options = like_torch(false);
  options.lr = 0.03125;  // exact in fp32
  options.groups.insert(options.groups.begin(), {"1", Options::parse("lr_scale = 0.5", "test")});
  FusedAdamW a(host, options), b(device, options);
  for (int64_t step = 0; step < 5; ++step) {
    set_gradients(host, gradients_of(host, step));
    set_gradients(device, gradients_of(host, step));
    a.step();
    b.step({.lr = torch::tensor(0.03125f), .grad_scale = {}, .skip = torch::zeros({})});
  }
  for (size_t i = 0; i < host.size(); ++i) EXPECT_TRUE(same_bits(host[i], device[i])) << i;
}

TEST_P(FusedAdamWOnDevice, GradientsAreMultipliedByTheScale) {
  const auto scaled = make_parameters(at::kFloat, 3, device()), plain = copies(scaled);
  FusedAdamW a(scaled), b(plain);
  for (int64_t step = 0; step < 5; ++step) {
    auto gradients = gradients_of(scaled, step);
    set_gradients(scaled, gradients);
    for (auto& gradient : gradients) gradient = gradient * 0.25;
    set_gradients(plain, gradients);
    a.step({.lr = {}, .grad_scale = torch::tensor(0.25f), .skip = {}});
    b.step();
  }
  for (size_t i = 0; i < scaled.size(); ++i) EXPECT_TRUE(same_bits(scaled[i], plain[i])) << i;
  EXPECT_TRUE(same_state(a, state_of(b)));
}

TEST_P(FusedAdamWOnDevice, SkippedStepChangesNothing) {
  const auto parameters = make_parameters(at::kFloat, 4, device()), twins = copies(parameters);
  FusedAdamW a(parameters), b(twins);
  const auto train = [](FusedAdamW& optimizer, const std::vector<at::Tensor>& members,
                        int64_t step) {
    set_gradients(members, gradients_of(members, step));
    optimizer.step(
        {.lr = torch::tensor(0.01f), .grad_scale = torch::tensor(0.5f), .skip = torch::zeros({})});
  };
  train(a, parameters, 0);
  train(b, twins, 0);
  const auto before = state_of(a);
  for (const float flag : {1.0f, 3.0f, -1.0f}) {
    set_gradients(parameters, gradients_of(parameters, 1));
    parameters[0].mutable_grad().fill_(std::nan(""));
    a.step({.lr = torch::tensor(0.01f),
            .grad_scale = torch::tensor(std::nanf("")),
            .skip = torch::tensor(flag)});
    EXPECT_TRUE(same_state(a, before)) << "skip = " << flag;
    for (size_t i = 0; i < twins.size(); ++i) EXPECT_TRUE(same_bits(parameters[i], twins[i])) << i;
  }
  train(a, parameters, 2);
  train(b, twins, 2);
  EXPECT_TRUE(same_state(a, state_of(b)));
  for (size_t i = 0; i < twins.size(); ++i) EXPECT_TRUE(same_bits(parameters[i], twins[i])) << i;
  EXPECT_EQ(state_of(a).at("0/step").item<float>(), 2);
}

TEST(FusedAdamW, UndefinedGradientsAreLeftAlone) {
  const auto parameters = make_parameters(at::kFloat, 5);
  FusedAdamW optimizer(parameters);
  const auto before = parameters[0].detach().clone();
  parameters[1].mutable_grad() = torch::ones({5});
  optimizer.step();
  EXPECT_TRUE(same_bits(parameters[0], before));
  const auto state = state_of(optimizer);
  EXPECT_EQ(state.at("0/step").item<float>(), 0);
  EXPECT_EQ(state.at("1/step").item<float>(), 1);
}

TEST(FusedAdamW, GradientOfAnotherLayout) {
  torch::manual_seed(6);
  const auto a = torch::randn({4, 7}).requires_grad_(true), b = copies({a})[0];
  FusedAdamW first(std::vector<at::Tensor>{a}), second(std::vector<at::Tensor>{b});
  const auto gradient = torch::randn({7, 4});
  a.mutable_grad() = gradient.t();
  b.mutable_grad() = gradient.t().contiguous();
  first.step();
  second.step();
  EXPECT_TRUE(same_bits(a, b));
}

TEST(FusedAdamW, TiedParameterIsSteppedOnce) {
  torch::manual_seed(7);
  struct Tied : torch::nn::Module {
    Tied() {
      embed = register_parameter("table", torch::randn({3, 3}));
      head = register_parameter("head", embed);
    }
    at::Tensor embed, head;
  } model;
  const auto twin = copies({model.embed})[0];
  FusedAdamW tied(model), single(NamedParameters{{"table", twin}});
  EXPECT_EQ(tied.parameters().size(), 1u);
  EXPECT_EQ(tied.name_of(model.head), "table");
  const auto gradient = torch::randn({3, 3});
  model.embed.mutable_grad() = gradient;
  twin.mutable_grad() = gradient.clone();
  tied.step();
  single.step();
  EXPECT_TRUE(same_bits(model.head, twin));
}

TEST(FusedAdamW, TwentyMoreStepsAfterLoadingAreBitEqual) {
  const auto parameters = make_parameters(at::kFloat, 8);
  FusedAdamW optimizer(parameters, like_torch(true));
  const auto train = [](FusedAdamW& each, const std::vector<at::Tensor>& members, int64_t from) {
    for (int64_t step = from; step < from + 20; ++step) {
      set_gradients(members, gradients_of(members, step));
      each.step();
    }
  };
  train(optimizer, parameters, 0);
  optimizer.param_groups()[0].options().set_lr(5e-3);
  std::stringstream file;
  torch::save(optimizer, file);
  const auto resumed = copies(parameters);
  train(optimizer, parameters, 20);

  FusedAdamW loaded(resumed, like_torch(true));
  torch::load(loaded, file);
  train(loaded, resumed, 20);
  for (size_t i = 0; i < resumed.size(); ++i)
    EXPECT_TRUE(same_bits(parameters[i], resumed[i])) << i;
  EXPECT_TRUE(same_state(loaded, state_of(optimizer)));
}

TEST(FusedAdamW, StateBytesAreTheState) {
  const auto parameters = make_parameters(at::kFloat, 9);
  FusedAdamW plain(parameters), largest(parameters, like_torch(true));
  int64_t weights = 0;
  for (const auto& parameter : parameters) weights += parameter.numel();
  const auto scalars = static_cast<int64_t>(4 * parameters.size());
  EXPECT_EQ(plain.state_bytes(), 8 * weights + scalars);
  EXPECT_EQ(largest.state_bytes(), 12 * weights + scalars);
}

TEST(FusedAdamW, WhatItCannotRoundIsRefusedByName) {
  const auto mixed = [](at::ScalarType type) {
    return NamedParameters{{"a", torch::randn({2}).requires_grad_(true)},
                           {"head.weight", torch::randn({2}).to(type).requires_grad_(true)}};
  };
  EXPECT_OUNCE_ERROR(FusedAdamW{mixed(at::kHalf)}, kUsage, "'head.weight' is Half: expected fp32");
  for (const auto& options : {AdamWOptions{.amsgrad = true}, AdamWOptions{.maximize = true}}) {
    EXPECT_OUNCE_ERROR((FusedAdamW{mixed(at::kBFloat16), options}), kUsage, "neither amsgrad nor");
  }
}

TEST(FusedAdamW, BadOptionsAreNamed) {
  const auto with = [](AdamWOptions options) {
    FusedAdamW(make_parameters(at::kFloat, 10), options);
  };
  EXPECT_OUNCE_ERROR(with({.lr = -1}), kUsage, "lr >= 0");
  EXPECT_OUNCE_ERROR(with({.beta1 = 1.5}), kUsage, "'beta1'");
  EXPECT_OUNCE_ERROR(with({.beta2 = 1}), kUsage, "below 1");
  EXPECT_OUNCE_ERROR(with({.eps = 0}), kUsage, "eps > 0");
  EXPECT_OUNCE_ERROR(with({.weight_decay = -0.1}), kUsage, "'weight_decay'");
  EXPECT_OUNCE_ERROR(with({.lr = std::nan("")}), kUsage, "lr >= 0");
}

TEST(FusedAdamW, WrongGradientsAndMovedParametersAreNamed) {
  const auto p = torch::randn({4, 2}).requires_grad_(true);
  FusedAdamW optimizer(NamedParameters{{"table", p}});
  p.mutable_grad() = torch::ones({4, 2}).to_sparse();
  EXPECT_OUNCE_ERROR(optimizer.step(), kUsage, "'table': expected a dense gradient");
  p.mutable_grad() = at::Tensor();
  p.set_data(torch::randn({3, 2}));
  p.mutable_grad() = torch::ones({3, 2});
  EXPECT_OUNCE_ERROR(optimizer.step(), kUsage, "'table' was");
  FusedAdamW fresh(NamedParameters{{"table", p}});
  fresh.add_param_group({{torch::ones({1}).requires_grad_(true)}});
  fresh.param_groups()[1].params()[0].mutable_grad() = torch::ones({1});
  EXPECT_OUNCE_ERROR(fresh.step(), kUsage, "is not a parameter of this optimizer");
}

TEST(FusedAdamW, RegistryDefaultsAreTheStructs) {
  auto& store = ounce::registry<NamedOptimizer>().store();
  ounce::test::register_optimizers_once();
  const auto defaults = store.resolve("adamw", "test").table();
  const AdamWOptions options;
  EXPECT_EQ(defaults.number("lr"), options.lr);
  EXPECT_EQ(defaults.number("beta1"), options.beta1);
  EXPECT_EQ(defaults.number("beta2"), options.beta2);
  EXPECT_EQ(defaults.number("eps"), options.eps);
  EXPECT_EQ(defaults.number("weight_decay"), options.weight_decay);
  EXPECT_EQ(defaults.flag("amsgrad"), options.amsgrad);
  EXPECT_EQ(defaults.flag("maximize"), options.maximize);

  const NamedOptimizer::Context context{{{"w", torch::randn({3, 3}).requires_grad_(true)},
                                         {"norm", torch::ones({3}).requires_grad_()}}};
  const auto make = [&](const std::string& toml) {
    return ounce::registry<NamedOptimizer>().make(Options::parse(toml, "test"), context);
  };
  const auto made = make("name = 'adamw'\nlr = 1e-2\ngroup = [{match = 'w', lr_scale = 0.1}]");
  ASSERT_EQ(made->param_groups().size(), 2u);
  EXPECT_EQ(made->param_groups()[0].options().get_lr(), 1e-2);
  EXPECT_NEAR(made->param_groups()[1].options().get_lr(), 1e-3, 1e-15);
  EXPECT_OUNCE_ERROR(make("name = 'adamw'\nbeta3 = 1.0"), kUsage, "did you mean 'beta1'?");
  EXPECT_OUNCE_ERROR(make("name = 'adamw'\ngroup = [{lr_scale = 1.0}]"), kUsage, "'match'");
}

}  // namespace
