// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/optim/fused_adamw.h>
#include <torch/torch.h>

#include <sstream>

#include "support/expect_error.h"
#include "support/registered_optimizers.h"

namespace {

using ounce::glob_matches;
using ounce::Options;
using ounce::registry;
using ounce::optim::AdamWOptions;
using ounce::optim::FusedAdamW;
using ounce::optim::named_parameters;
using ounce::optim::NamedOptimizer;
using ounce::optim::NamedParameters;

at::Tensor leaf(at::IntArrayRef sizes) { return torch::randn(sizes).requires_grad_(true); }

struct TwoLayers : torch::nn::Module {
  TwoLayers() {
    embed = register_module("embed", torch::nn::Embedding(7, 4));
    norm = register_module("final_norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})));
    head = register_module("head", torch::nn::Linear(4, 7));
  }
  torch::nn::Embedding embed{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear head{nullptr};
};

// An optimizer as a user writes one: one slot, one counter, nothing else.
class Momentum : public NamedOptimizer {
 public:
  explicit Momentum(NamedParameters parameters)
      : NamedOptimizer(std::move(parameters), Options::parse("lr = 0.1", "momentum"), {}) {
    for (const auto& [name, parameter] : this->parameters()) {
      velocity.push_back(at::zeros_like(parameter.detach()));
    }
  }
  void update(const ounce::StepControl&) override {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < velocity.size(); ++i) {
      at::Tensor parameter = parameters()[i].second;
      velocity[i].mul_(0.9).add_(parameter.grad());
      parameter.sub_(velocity[i], param_groups()[0].options().get_lr());
    }
    ++steps;
  }
  void visit_state(ounce::StateVisitor& visitor) override {
    for (size_t i = 0; i < velocity.size(); ++i) {
      visitor.tensor(parameters()[i].first + "/velocity", velocity[i], ounce::StateClass::kStep);
    }
    visitor.integer("steps", steps);
  }

  std::vector<at::Tensor> velocity;
  int64_t steps = 0;
};

TEST(Glob, MatchesWholeNames) {
  EXPECT_TRUE(glob_matches("*norm*", "blocks.3.norm1.weight"));
  EXPECT_TRUE(glob_matches("*.weight", "a.b.weight"));
  EXPECT_TRUE(glob_matches("blocks.?.w", "blocks.1.w"));
  EXPECT_TRUE(glob_matches("", ""));
  EXPECT_TRUE(glob_matches("*", ""));
  EXPECT_TRUE(glob_matches("a*b*c", "a.b.b.xc"));
  EXPECT_FALSE(glob_matches("blocks.?.w", "blocks.12.w"));
  EXPECT_FALSE(glob_matches("weight", "a.weight"));
  EXPECT_FALSE(glob_matches("*bias", "bias.weight"));
  EXPECT_FALSE(glob_matches("?", ""));
}

TEST(NamedParameters, NamesOfModulesAndLists) {
  TwoLayers model;
  model.norm->weight.requires_grad_(false);
  std::vector<std::string> names;
  for (const auto& [name, parameter] : named_parameters(model)) names.push_back(name);
  EXPECT_EQ(names, (std::vector<std::string>{"embed.weight", "final_norm.bias", "head.weight",
                                             "head.bias"}));
  const auto shared = leaf({2});
  const auto plain = named_parameters(std::vector<at::Tensor>{shared, shared, leaf({3})});
  ASSERT_EQ(plain.size(), 2u);
  EXPECT_EQ(plain[1].first, "2");
}

TEST(NamedOptimizer, DefaultGroupsSpareNormsBiasesEmbeddings) {
  TwoLayers model;
  FusedAdamW optimizer(model);
  ASSERT_EQ(optimizer.param_groups().size(), 2u);
  const auto decay = [&](size_t group) {
    return static_cast<const NamedOptimizer::GroupOptions&>(
               optimizer.param_groups()[group].options())
        .values.number("weight_decay");
  };
  EXPECT_EQ(decay(0), 0.1);
  ASSERT_EQ(optimizer.param_groups()[0].params().size(), 1u);
  EXPECT_EQ(optimizer.name_of(optimizer.param_groups()[0].params()[0]), "head.weight");
  EXPECT_EQ(decay(1), 0.0);
  EXPECT_EQ(optimizer.param_groups()[1].params().size(), 4u);
}

TEST(NamedOptimizer, RulesOverrideInOrder) {
  TwoLayers model;
  AdamWOptions options;
  options.lr = 1e-2;
  options.groups = {{"embed.*", Options::parse("lr = 5e-3", "a")},
                    {"*.weight", Options::parse("lr_scale = 0.25\nweight_decay = 0.3", "b")},
                    {"*", Options::parse("beta1 = 0.5", "c")}};
  FusedAdamW optimizer(model, options);
  const auto of = [&](const at::Tensor& wanted) -> const NamedOptimizer::GroupOptions& {
    for (const auto& group : optimizer.param_groups()) {
      for (const auto& parameter : group.params()) {
        if (parameter.is_same(wanted)) {
          return static_cast<const NamedOptimizer::GroupOptions&>(group.options());
        }
      }
    }
    throw std::runtime_error("in no group");
  };
  EXPECT_DOUBLE_EQ(of(model.embed->weight).lr_scale, 0.5);
  EXPECT_DOUBLE_EQ(of(model.embed->weight).lr, 5e-3);
  EXPECT_EQ(of(model.embed->weight).values.number("weight_decay"), 0.0);
  EXPECT_DOUBLE_EQ(of(model.head->weight).lr, 2.5e-3);
  EXPECT_EQ(of(model.norm->weight).values.number("weight_decay"), 0.3);  // asked for by name
  EXPECT_EQ(of(model.head->bias).values.number("beta1"), 0.5);
  EXPECT_EQ(of(model.head->bias).values.number("weight_decay"), 0.0);
}

TEST(NamedOptimizer, BadGroupsAndParametersAreNamed) {
  const auto with = [](const std::string& match, const std::string& toml) {
    AdamWOptions options;
    options.groups = {{match, Options::parse(toml, "test")}};
    TwoLayers model;
    FusedAdamW optimizer(model, options);
  };
  EXPECT_OUNCE_ERROR(with("*nrom*", "weight_decay = 0.0"), kUsage, "'*nrom*' matches no parameter");
  EXPECT_OUNCE_ERROR(with("*", "weight_decai = 0.0"), kUsage, "did you mean 'weight_decay'?");
  EXPECT_OUNCE_ERROR(with("*", "weight_decay = true"), kUsage, "expected a number");
  EXPECT_OUNCE_ERROR(with("*", "lr = 0.1\nlr_scale = 2.0"), kUsage, "lr or lr_scale, got both");
  EXPECT_OUNCE_ERROR(NamedOptimizer::parse_groups(ounce::Value(ounce::Value::Array{1})), kUsage,
                     "'match'");
  EXPECT_OUNCE_ERROR(FusedAdamW(std::vector<at::Tensor>{}), kUsage, "got none");
  EXPECT_OUNCE_ERROR(FusedAdamW(NamedParameters{{"a", leaf({1})}, {"a", leaf({1})}}), kUsage,
                     "'a' is empty or given");
  EXPECT_OUNCE_ERROR(FusedAdamW(NamedParameters{{"a", leaf({1}) * 2}}), kUsage, "leaf");
  FusedAdamW optimizer(std::vector<at::Tensor>{leaf({2, 3})});
  EXPECT_OUNCE_ERROR(optimizer.name_of(leaf({5})), kUsage,
                     "[5] is not a parameter of this optimizer");
}

// Not at the first step, when a run has begun.
TEST(NamedOptimizer, FusedIsRefusedAtConstruction) {
  ounce::test::register_optimizers_once();
  const auto refused = [](const char* name, const NamedParameters& parameters) {
    const auto options =
        Options::parse(c10::str("name = \"", name, "\"\nimplementation = \"fused\""), "test");
    EXPECT_OUNCE_ERROR(registry<NamedOptimizer>().make(options, {parameters}), kUsage,
                       c10::str("[", name, "] 'w' BFloat16", parameters[0].second.sizes(),
                                ": expected what the fused path takes, got "));
  };
  for (const auto* name : {"adamw", "dct_adamw", "trion", "muon"}) {
    refused(name, {{"w", leaf({64, 64}).to(at::kBFloat16).detach().requires_grad_()}});
  }
  for (const auto* name : {"dct_adamw", "galore", "trion"}) {  // what AdamW steps
    refused(name, {{"w", leaf({64}).to(at::kBFloat16).detach().requires_grad_()}});
  }
}

// LibTorch keys state by position: loading it into the same parameters in another order swaps the
// moments silently.
TEST(NamedOptimizer, LoadsByNameWhateverTheOrder) {
  torch::manual_seed(1);
  const auto p = leaf({2, 2}), q = leaf({2, 2}), bias = leaf({2});
  FusedAdamW saved(NamedParameters{{"p", p}, {"q", q}, {"bias", bias}});
  p.mutable_grad() = torch::full({2, 2}, 1.0);
  q.mutable_grad() = torch::full({2, 2}, 100.0);
  bias.mutable_grad() = torch::full({2}, 7.0);
  saved.step();
  saved.param_groups()[1].options().set_lr(7e-4);
  std::stringstream file;
  torch::save(saved, file);

  FusedAdamW loaded(NamedParameters{{"bias", bias}, {"q", q}, {"p", p}});
  torch::load(loaded, file);
  struct Read : ounce::StateVisitor {
    void tensor(std::string_view name, at::Tensor& value, ounce::StateClass) override {
      found[full_name(name)] = value.flatten()[0].item<double>();
    }
    void integer(std::string_view, int64_t&) override {}
    void number(std::string_view name, double& value) override { found[full_name(name)] = value; }
    void text(std::string_view, std::string&) override {}
    bool loading() const override { return false; }
    std::map<std::string, double> found;
  } read;
  loaded.visit_state(read);
  EXPECT_NEAR(read.found.at("p/exp_avg"), 0.1, 1e-6);
  EXPECT_NEAR(read.found.at("q/exp_avg"), 10, 1e-5);
  EXPECT_NEAR(read.found.at("bias/exp_avg"), 0.7, 1e-6);
  EXPECT_EQ(read.found.at("p/step"), 1);
  EXPECT_EQ(read.found.at("groups/1/lr"), 7e-4);
  EXPECT_EQ(loaded.param_groups()[0].options().get_lr(), 1e-3);
}

// LibTorch loads state of another shape without a word, and throws in the next step.
TEST(NamedOptimizer, LoadChecksNamesAndShapesAndChangesNothing) {
  torch::manual_seed(2);
  const auto a = leaf({2}), b = leaf({3});
  FusedAdamW saved(NamedParameters{{"a", a}, {"b", b}});
  a.mutable_grad() = torch::ones({2});
  saved.step();
  std::stringstream file;
  torch::save(saved, file);

  const auto other = leaf({5});
  FusedAdamW reshaped(NamedParameters{{"a", a}, {"b", other}});
  EXPECT_OUNCE_ERROR(torch::load(reshaped, file), kUsage, "'b/exp_avg' is Float[3], here Float[5]");
  struct Sum : ounce::StateVisitor {
    void tensor(std::string_view, at::Tensor& value, ounce::StateClass) override {
      total += value.abs().sum().item<double>();
    }
    void integer(std::string_view, int64_t&) override {}
    void number(std::string_view, double&) override {}
    void text(std::string_view, std::string&) override {}
    bool loading() const override { return false; }
    double total = 0;
  } loaded, reference;
  reshaped.visit_state(loaded);
  saved.visit_state(reference);
  EXPECT_EQ(loaded.total, 0);
  EXPECT_GT(reference.total, 0);
  FusedAdamW renamed(NamedParameters{{"a", a}, {"c", b}});
  file.seekg(0);
  ounce::test::expect_error(ounce::Fault::kUsage,
                            {"'c/exp_avg' is missing", "'b/exp_avg' is not known here"},
                            [&] { torch::load(renamed, file); });

  std::stringstream foreign;
  torch::optim::AdamW theirs(std::vector<at::Tensor>{a});
  torch::save(theirs, foreign);
  EXPECT_OUNCE_ERROR(torch::load(renamed, foreign), kData,
                     "not written by an optimizer of this library");
}

// LibTorch saves no state at all of a user's optimizer that does not override save.
TEST(NamedOptimizer, StateOfAUsersOptimizerIsSaved) {
  torch::manual_seed(3);
  const auto p = leaf({3}), twin = p.detach().clone().requires_grad_(true);
  Momentum optimizer(NamedParameters{{"layer.p", p}});
  const auto train = [](Momentum& each, const at::Tensor& parameter, int64_t steps) {
    for (int64_t i = 0; i < steps; ++i) {
      each.zero_grad();
      (parameter.square().sum() * (i + 1)).backward();
      each.step();
    }
  };
  train(optimizer, p, 3);
  optimizer.param_groups()[0].options().set_lr(0.01);
  std::stringstream file;
  torch::save(optimizer, file);
  twin.data().copy_(p);
  train(optimizer, p, 2);

  Momentum loaded(NamedParameters{{"layer.p", twin}});
  torch::load(loaded, file);
  EXPECT_EQ(loaded.steps, 3);
  EXPECT_EQ(loaded.param_groups()[0].options().get_lr(), 0.01);
  train(loaded, twin, 2);
  EXPECT_TRUE(torch::equal(p, twin));
}

TEST(NamedOptimizer, GradientsThatAreNotFiniteSkipOrRaise) {
  const auto a = leaf({3, 4}), b = leaf({5});
  const NamedParameters parameters = {{"first", a}, {"second", b}};
  const auto run = [&](ounce::optim::CheckFinite check, float value, const auto& step) {
    AdamWOptions options;
    options.check_finite = check;
    FusedAdamW optimizer(parameters, options);
    a.mutable_grad() = torch::ones_like(a);
    b.mutable_grad() = torch::ones_like(b);
    b.mutable_grad()[2] = value;
    const auto before = a.detach().clone();
    step(optimizer);
    return !at::equal(before, a);
  };
  const auto step = [](FusedAdamW& optimizer) { optimizer.step(); };
  using ounce::optim::CheckFinite;
  for (const float broken : {INFINITY, -INFINITY, NAN}) {
    EXPECT_TRUE(run(CheckFinite::kOff, broken, step));
    b.detach().fill_(1);
    EXPECT_FALSE(run(CheckFinite::kSkip, broken, step));
    EXPECT_FALSE(run(CheckFinite::kRaise, broken, [](FusedAdamW& optimizer) {
      EXPECT_OUNCE_ERROR(optimizer.step(), kProblem,
                         "an infinity or a NaN in 'second'; nothing was changed");
    }));
  }
  EXPECT_TRUE(run(CheckFinite::kSkip, 2, step));
  EXPECT_TRUE(run(CheckFinite::kRaise, 2, step));
  // What the caller skips stays skipped, and a group may ask alone.
  EXPECT_FALSE(run(CheckFinite::kSkip, 2,
                   [](FusedAdamW& optimizer) { optimizer.step({.skip = torch::ones({})}); }));
  AdamWOptions options;
  options.groups = NamedOptimizer::parse_groups(
      *Options::parse("group = [{ match = \"first\", check_finite = \"skip\" }]", "t")
           .find("group"));
  FusedAdamW optimizer(parameters, options);
  b.mutable_grad()[2] = NAN;
  optimizer.step();
  EXPECT_TRUE(b.isnan().any().item<bool>());
  EXPECT_FALSE(a.isnan().any().item<bool>());
}

TEST(NamedOptimizer, StepLrAndClipGradNormAndClosuresWork) {
  torch::manual_seed(4);
  const auto model = std::make_shared<TwoLayers>();
  AdamWOptions options;
  options.lr = 1e-2;
  options.groups = {{"head.*", Options::parse("lr_scale = 0.5", "test")}};
  FusedAdamW optimizer(*model, options);
  torch::optim::StepLR schedule(optimizer, /*step_size=*/2, /*gamma=*/0.1);
  double loss = 0;
  for (int step = 0; step < 4; ++step) {
    loss = optimizer
               .step([&] {
                 optimizer.zero_grad();
                 auto value =
                     model->head(model->norm(model->embed(torch::arange(7)))).square().mean();
                 value.backward();
                 torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0);
                 return value;
               })
               .item<double>();
    schedule.step();
  }
  EXPECT_GT(loss, 0);
  for (const auto& group : optimizer.param_groups()) {
    const auto& set = static_cast<const NamedOptimizer::GroupOptions&>(group.options());
    // LibTorch's StepLR counts its first call as step 0: one decay in four calls.
    EXPECT_NEAR(set.lr, 1e-3 * set.lr_scale, 1e-12);
  }
}

}  // namespace
