// SPDX-License-Identifier: MIT
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <ounce/core/stateful.h>
#include <torch/torch.h>

#include <map>

#include "support/expect_error.h"

namespace ounce {
namespace {

// Keeps what it is shown; with `load` set, overwrites from what an earlier visit kept.
class Memory : public StateVisitor {
 public:
  void tensor(std::string_view name, at::Tensor& value, StateClass cls) override {
    const auto key = full_name(name);
    if (load) {
      torch::NoGradGuard no_grad;
      value.copy_(tensors.at(key));
    } else {
      tensors[key] = value.detach().clone();
      classes[key] = cls;
      order.push_back(key);
    }
  }
  void integer(std::string_view name, int64_t& value) override {
    load ? value = integers.at(full_name(name)) : integers[full_name(name)] = value;
  }
  void number(std::string_view, double&) override {}
  void text(std::string_view, std::string&) override {}
  bool loading() const override { return load; }
  using StateVisitor::full_name;

  bool load = false;
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, StateClass> classes;
  std::map<std::string, int64_t> integers;
  std::vector<std::string> order;
};

// An embedding whose weight is registered a second time, as a head that is tied to it.
struct TiedImpl : torch::nn::Module {
  TiedImpl() {
    embedding = register_module("embedding", torch::nn::Embedding(5, 3));
    norm = register_module("norm", torch::nn::BatchNorm1d(3));
    head = register_parameter("head", embedding->weight);
  }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  at::Tensor head;
};

TEST(Stateful, ScopesJoinNames) {
  Memory memory;
  EXPECT_EQ(memory.full_name("a"), "a");
  {
    const auto outer = memory.scope("model");
    {
      const auto inner = memory.scope("layers.0");
      EXPECT_EQ(memory.full_name("w"), "model/layers.0/w");
    }
    EXPECT_EQ(memory.full_name("w"), "model/w");
  }
  EXPECT_EQ(memory.full_name("w"), "w");
}

TEST(Stateful, RefusesNamesThatCannotBeStored) {
  Memory memory;
  using namespace std::string_view_literals;
  EXPECT_OUNCE_ERROR(memory.full_name(""), kUsage, "name");
  EXPECT_OUNCE_ERROR(memory.full_name("a\0b"sv), kUsage, "NUL");
  EXPECT_OUNCE_ERROR(memory.full_name(".."), kUsage, "'..'");
  EXPECT_OUNCE_ERROR(memory.full_name("a/../b"), kUsage, "'..'");
  EXPECT_EQ(memory.full_name("a..b"), "a..b");
  const auto scope = memory.scope("..");
  EXPECT_OUNCE_ERROR(memory.full_name("x"), kUsage, "'..'");
}

TEST(Stateful, ModulesUnderTheirPyTorchNames) {
  TiedImpl model;
  Memory memory;
  visit_module(model, memory);
  EXPECT_EQ(memory.order,
            (std::vector<std::string>{"head", "norm.weight", "norm.bias", "norm.running_mean",
                                      "norm.running_var", "norm.num_batches_tracked"}));
  EXPECT_EQ(memory.classes.at("head"), StateClass::kStep);
  EXPECT_EQ(memory.classes.at("norm.running_mean"), StateClass::kForward);
}

TEST(Stateful, LoadsInPlace) {
  TiedImpl model;
  Memory memory;
  visit_module(model, memory);
  const auto* storage = model.embedding->weight.data_ptr();
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : model.parameters()) parameter.zero_();
    model.norm->running_mean.fill_(7);
  }
  memory.load = true;
  visit_module(model, memory);
  EXPECT_EQ(model.embedding->weight.data_ptr(), storage);
  EXPECT_TRUE(model.embedding->weight.equal(memory.tensors.at("head")));
  EXPECT_TRUE(model.head.is_same(model.embedding->weight));
  EXPECT_EQ(model.norm->running_mean.abs().sum().item<float>(), 0);
  EXPECT_TRUE(model.embedding->weight.requires_grad());
}

TEST(Stateful, GeneratorGoesOnWhereItWas) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(11);
  // A normal draw leaves a cached second one behind: it belongs to the state.
  at::randn({3}, generator);
  Memory memory;
  visit_generator(generator, "cpu", memory);
  const auto expected = at::randn({101}, generator);
  EXPECT_FALSE(at::randn({101}, generator).equal(expected));
  memory.load = true;
  visit_generator(generator, "cpu", memory);
  EXPECT_TRUE(at::randn({101}, generator).equal(expected));
  EXPECT_EQ(memory.classes.at("cpu"), StateClass::kHost);
}

}  // namespace
}  // namespace ounce
