// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/nn/parts.h>
#include <ounce/core/registry.h>
#include <torch/torch.h>

#include <mutex>

#include "kernels/cce_composed.h"
#include "support/devices.h"
#include "support/expect_error.h"
#include "support/rms_error.h"

namespace ounce {

namespace {

using at::Tensor;
using cce_test::CceCase;
using cce_test::composed;
using cce_test::random_case;
using test::expect_error;
using test::rms_error;

// --- filtering ----------------------------------------------------------------------------------

struct Filtered {
  Tensor kept_nv;  // 1 where the entry's tile is kept
  Tensor dlogits_nv, dropped_mass;
};

// The definition, entry by entry, for reduction = sum without further options.
Filtered filtered(const CceCase& c, double eps) {
  const auto p = torch::softmax(torch::matmul(c.hidden, c.weight.t()), -1).detach();
  const auto tokens = p.size(0), vocab = p.size(1);
  const auto counted = c.target != c.options.ignore_index();
  const auto y = c.target.masked_fill(~counted, 0);
  auto hit = torch::zeros_like(p).scatter_(1, y.unsqueeze(1), 1);
  const auto live = counted.unsqueeze(1).to(p.dtype());
  Filtered f{torch::zeros_like(p), (p - hit) * live, {}};
  for (int64_t r = 0; r < tokens; r += 128) {
    for (int64_t v = 0; v < vocab; v += 128) {
      const auto tile = [&](const Tensor& t) {
        return t.narrow(0, r, std::min<int64_t>(128, tokens - r))
            .narrow(1, v, std::min<int64_t>(128, vocab - v));
      };
      const bool has_target = tile(hit * live).sum().item<double>() > 0;
      const bool large = tile(p * live).max().item<double>() >= eps;
      if (has_target || large) tile(f.kept_nv).fill_(1);
    }
  }
  f.dropped_mass = (p * live * (1 - f.kept_nv)).sum(1);
  return f;
}

class CceFilter : public test::OnDevice {};
OUNCE_ON_EACH_DEVICE(CceFilter);

CceCase filter_case(at::Device device, GradMode mode, int64_t workspace = 0) {
  auto c = random_case({300}, 24, 700, false);
  c.weight.narrow(0, 0, 200).mul_(4);  // a few likely classes, the rest negligible
  c.target.masked_fill_(c.target >= 200, 7);
  c.target.narrow(0, 128, 100).fill_(650);
  c.options.grad_mode(mode).filter_eps(0.05).reduction(Reduction::kSum);
  c.options.workspace_bytes(workspace);
  return c.on(device).as(at::kDouble);
}

TEST_P(CceFilter, DropsTheTilesOfItsDefinition) {
  constexpr int64_t kTwoHundredRows = 200 * 2 * (700 + 24) * 8;  // not a whole number of tiles
  for (const auto& [mode, workspace] : {std::pair(GradMode::kFilterHidden, int64_t{0}),
                                        std::pair(GradMode::kFilter, kTwoHundredRows)}) {
    const auto c = filter_case(device(), mode, workspace);
    const auto f = filtered(c, 0.05);
    const auto kept = f.kept_nv.mean().item<double>();
    EXPECT_GT(kept, 0.1);
    EXPECT_LT(kept, 0.9);
    const auto out = c.run();
    EXPECT_LE(rms_error(out.dropped_mass, f.dropped_mass), 1e-12);
    EXPECT_GT(f.dropped_mass.max().item<double>(), 1e-6);
    out.loss.backward();
    const auto some = f.dlogits_nv * f.kept_nv;
    const auto& for_weight = mode == GradMode::kFilter ? some : f.dlogits_nv;
    EXPECT_LE(rms_error(c.hidden.grad(), torch::matmul(some, c.weight)), 1e-12);
    EXPECT_LE(rms_error(c.weight.grad(), torch::matmul(for_weight.t(), c.hidden)), 1e-12);
  }
}

TEST_P(CceFilter, OnlyTheFullFilterStarvesRareClasses) {
  const auto rows_without_gradient = [&](GradMode mode) {
    const auto c = filter_case(device(), mode);
    c.run().loss.backward();
    return (c.weight.grad().abs().sum(1) == 0).sum().item<int64_t>();
  };
  EXPECT_EQ(rows_without_gradient(GradMode::kExact), 0);
  EXPECT_EQ(rows_without_gradient(GradMode::kFilterHidden), 0);
  EXPECT_GT(rows_without_gradient(GradMode::kFilter), 100);
}

TEST_P(CceFilter, NegligibleThresholdChangesNothing) {
  auto exact = filter_case(device(), GradMode::kExact),
       filter = filter_case(device(), GradMode::kFilter);
  filter.options.filter_eps(1e-300);
  const auto out = filter.run();
  out.loss.backward();
  exact.run().loss.backward();
  EXPECT_EQ(out.dropped_mass.sum().item<double>(), 0);
  EXPECT_LE(rms_error(filter.hidden.grad(), exact.hidden.grad()), 1e-14);
  EXPECT_LE(rms_error(filter.weight.grad(), exact.weight.grad()), 1e-14);
}

// --- main_grad ----------------------------------------------------------------------------------

class CceMainGrad : public test::OnDevice {};
OUNCE_ON_EACH_DEVICE(CceMainGrad);

TEST_P(CceMainGrad, BackwardAddsTheWeightsGradientToIt) {
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(type);
    auto plain = random_case({30}, 8, 300, true).on(device()).as(type), into = plain.as(type);
    const auto sums = torch::device(device()).dtype(type == at::kDouble ? at::kDouble : at::kFloat);
    plain.options.workspace_bytes(0);
    into.options.workspace_bytes(0).main_grad(torch::full({300, 8}, 0.5, sums));
    plain.run().loss.backward(torch::full({}, 3, sums));
    const auto loss = into.run().loss;
    for (int i = 0; i < 3; ++i) loss.backward({}, /*retain_graph=*/true);
    EXPECT_FALSE(into.weight.grad().defined());
    EXPECT_EQ(into.options.main_grad()._version(), 3);
    const double bound = type == at::kDouble ? 1e-12 : type == at::kFloat ? 3e-5 : 8e-3;
    EXPECT_LE(rms_error(into.options.main_grad() - 0.5, plain.weight.grad()), bound);
    EXPECT_LE(rms_error(into.hidden.grad(), plain.hidden.grad()), 2 * bound);
    EXPECT_LE(rms_error(into.bias.grad(), plain.bias.grad()), 2 * bound);
  }
}

TEST(CceMainGradRefuses, WhatItCannotAddTo) {
  const auto run = [](const Tensor& main_grad, Recompute recompute) {
    auto c = random_case({4}, 8, 20, false).as(at::kBFloat16);
    c.options.main_grad(main_grad).recompute(recompute);
    c.run();
  };
  EXPECT_OUNCE_ERROR(run(torch::zeros({20, 8}), Recompute::kNever), kUsage, "got never");
  EXPECT_OUNCE_ERROR(run(torch::zeros({20, 8}, at::kBFloat16), Recompute::kAuto), kUsage,
                     "expected main_grad contiguous, Float [20, 8]");
  EXPECT_OUNCE_ERROR(run(torch::zeros({8, 20}).t(), Recompute::kAuto), kUsage, "with strides");
  EXPECT_OUNCE_ERROR(run(torch::zeros({161}).slice(0, 1).view({20, 8}), Recompute::kAuto), kUsage,
                     "at a multiple of 16 bytes");
  EXPECT_OUNCE_ERROR(run(torch::zeros({20, 8}).requires_grad_(), Recompute::kAuto), kUsage,
                     "without a gradient of its own");
}

// --- outputs ------------------------------------------------------------------------------------

TEST(CceOutput, OnlyWhatWasAskedFor) {
  auto c = random_case({2, 6}, 8, 20, false).as(at::kFloat);
  const auto plain = c.run();
  EXPECT_TRUE(plain.n_valid.defined());
  EXPECT_FALSE(plain.lse.defined() || plain.z_loss.defined() || plain.correct.defined() ||
               plain.log_prob.defined() || plain.entropy.defined() || plain.dropped_mass.defined());
  c.options.return_correct(true).return_lse(true).return_z_loss(true).z_loss(0.01).shift(1);
  const auto out = c.run();
  const auto counted = c.target.narrow(1, 1, 5) != -100;
  EXPECT_EQ(out.n_valid.item<int64_t>(), counted.sum().item<int64_t>());
  const auto best = torch::matmul(c.hidden.narrow(1, 0, 5), c.weight.t()).argmax(-1);
  EXPECT_TRUE(at::equal(out.correct.narrow(1, 1, 5), (best == c.target.narrow(1, 1, 5)) & counted));
  EXPECT_FALSE(out.correct.select(1, 0).any().item<bool>());
  EXPECT_TRUE(out.lse.requires_grad());
  EXPECT_FALSE(out.z_loss.requires_grad());
}

TEST(CceOutput, MinusTheRowLossIsTheLogProbability) {
  auto c = random_case({40}, 8, 20, false).as(at::kDouble);
  c.target.masked_fill_(c.target == -100, 0);
  c.options.reduction(Reduction::kNone);
  const auto log_p = torch::log_softmax(torch::matmul(c.hidden, c.weight.t()), -1);
  const auto expected = log_p.gather(1, c.target.unsqueeze(1)).squeeze(1);
  EXPECT_LE(rms_error(-c.run().loss, expected), 1e-13);
}

// What reinforcement learning asks for beside the loss.
TEST(CceOutput, LogProbabilitiesAndEntropy) {
  auto c = random_case({4, 10}, 8, 300, false).as(at::kDouble);
  c.options.shift(1).softcap(4).logit_scale(1.4).return_log_prob(true).return_entropy(true);
  c.options.label_smoothing(0.1).workspace_bytes(0);
  auto composed = c.as(at::kDouble);
  const auto x = composed.hidden.narrow(1, 0, 9);
  const auto z = torch::tanh(torch::matmul(x, composed.weight.t()) * (1.4 / 4)) * 4;
  const auto log_p = torch::log_softmax(z, -1);
  const auto target = c.target.narrow(1, 1, 9);
  const auto ignored = target == -100;
  const auto hit = log_p.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1);
  const auto entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(ignored, 0);
  const auto out = c.run();
  EXPECT_LE(rms_error(out.log_prob.narrow(1, 1, 9), hit.masked_fill(ignored, 0)), 1e-13);
  EXPECT_LE(rms_error(out.entropy.narrow(1, 1, 9), entropy), 1e-13);
  EXPECT_EQ(out.entropy.select(1, 0).abs().sum().item<double>(), 0);
  EXPECT_FALSE(out.log_prob.requires_grad());
  const auto weights = torch::rand_like(entropy);
  (out.entropy.narrow(1, 1, 9) * weights).sum().backward();
  (entropy * weights).sum().backward();
  EXPECT_LE(rms_error(c.hidden.grad(), composed.hidden.grad()), 1e-12);
  EXPECT_LE(rms_error(c.weight.grad(), composed.weight.grad()), 1e-12);
}

TEST(CceOutput, MetaTensorsGetShapesAndTypes) {
  auto c = random_case({2, 6}, 8, 20, true).as(at::kBFloat16);
  c.options.reduction(Reduction::kNone).return_correct(true).return_lse(true).return_entropy(true);
  c.options.grad_mode(GradMode::kFilter);
  const auto real = c.run();
  for (auto t : {&c.hidden, &c.weight, &c.bias}) {
    *t = t->detach().to(torch::kMeta).requires_grad_();
  }
  for (auto t : {&c.target, &c.token_weight, &c.class_weight}) *t = t->to(torch::kMeta);
  const auto meta = c.run();
  const auto same = [](const Tensor& a, const Tensor& b) {
    EXPECT_EQ(a.sizes(), b.sizes());
    EXPECT_EQ(a.strides(), b.strides());
    EXPECT_EQ(a.scalar_type(), b.scalar_type());
  };
  same(meta.loss, real.loss);
  same(meta.lse, real.lse);
  same(meta.correct, real.correct);
  same(meta.entropy, real.entropy);
  same(meta.dropped_mass, real.dropped_mass);
  same(meta.n_valid, real.n_valid);
  meta.loss.sum().backward();
  same(c.hidden.grad(), c.hidden);
  same(c.weight.grad(), c.weight);
}

// --- bad input ----------------------------------------------------------------------------------

TEST(CceErrors, EachNamesWhatIsWrong) {
  const auto good = [] { return random_case({4, 5}, 6, 9, true).as(at::kFloat); };
  const auto expect = [&](const char* text, auto change) {
    auto c = good();
    change(c);
    expect_error(Fault::kUsage, {std::string("[linear_cross_entropy] ") + text}, [&] { c.run(); });
  };
  EXPECT_NO_THROW(good().run());
  expect("expected weight [V, D] with D = 6 as hidden has, got [9, 7]", [](CceCase& c) {
    c.weight = torch::zeros({9, 7});
  });
  expect("expected weight [V, D] with V >= 1, got [0, 6]", [](CceCase& c) {
    c.weight = torch::zeros({0, 6});
  });
  expect("expected weight of hidden's dtype Float, got BFloat16",
         [](CceCase& c) { c.weight = c.weight.to(at::kBFloat16); });
  expect("expected weight of hidden's dtype BFloat16 or Float, got Half", [](CceCase& c) {
    c.hidden = c.hidden.to(at::kBFloat16);
    c.weight = c.weight.to(at::kHalf);
  });
  expect("expected hidden [..., D], dense and floating, got Long",
         [](CceCase& c) { c.hidden = c.hidden.to(at::kLong); });
  expect("expected hidden, weight and target, got an undefined tensor",
         [](CceCase& c) { c.target.reset(); });
  expect("expected target int64 or int32, got Float",
         [](CceCase& c) { c.target = c.target.to(at::kFloat); });
  expect("expected target of hidden's shape without D, [4, 5], got [20]",
         [](CceCase& c) { c.target = c.target.flatten(); });
  expect("expected bias [V] with V = 9, got [8]", [](CceCase& c) { c.bias = torch::zeros({8}); });
  expect("expected bias of weight's dtype Float, got Double",
         [](CceCase& c) { c.bias = c.bias.to(at::kDouble); });
  expect("expected token_weight floating, of target's shape [4, 5], got Float [5]",
         [](CceCase& c) { c.token_weight = torch::ones({5}); });
  expect("expected token_weight without gradient",
         [](CceCase& c) { c.token_weight = c.token_weight.clone().requires_grad_(); });
  expect("expected class_weight [V] floating with V = 9, got Long [9]",
         [](CceCase& c) { c.class_weight = torch::ones({9}, at::kLong); });
  expect("expected class_weight without gradient",
         [](CceCase& c) { c.class_weight = c.class_weight.clone().requires_grad_(); });
  expect("expected softcap > 0, or 0 for none, got -1", [](CceCase& c) { c.options.softcap(-1); });
  expect("expected label_smoothing in [0, 1], got 1.5",
         [](CceCase& c) { c.options.label_smoothing(1.5); });
  expect("expected z_loss >= 0, got -1", [](CceCase& c) { c.options.z_loss(-1); });
  expect("expected a finite logit_scale, got inf",
         [](CceCase& c) { c.options.logit_scale(std::numeric_limits<double>::infinity()); });
  expect("expected filter_eps > 0, got 0", [](CceCase& c) { c.options.filter_eps(0.0); });
  expect("expected 0 <= shift < T = 5, got 5", [](CceCase& c) { c.options.shift(5); });
  expect("expected 0 <= shift < T = 5, got -1", [](CceCase& c) { c.options.shift(-1); });
  expect("expected workspace_bytes >= 0, or -1 for automatic, got -2",
         [](CceCase& c) { c.options.workspace_bytes(-2); });
  expect("expected accum = float32, got BFloat16",
         [](CceCase& c) { c.options.accum(at::kBFloat16); });
  expect("expected what the fused path takes, got ",
         [](CceCase& c) { c.options.implementation("fused"); });
  expect("expected implementation = auto, fused or reference, got 'best'",
         [](CceCase& c) { c.options.implementation("best"); });
}

TEST(CceErrors, OptionsOfPerformanceChangeNothing) {
  auto c = random_case({20}, 8, 30, true).as(at::kFloat);
  const auto expected = c.run().loss;
  c.options.implementation("reference").recompute(Recompute::kNever).deterministic(false);
  EXPECT_TRUE(at::equal(c.run().loss, expected));
}

// --- module and registry ------------------------------------------------------------------------

TEST(CceModule, OwnsOrTiesItsWeight) {
  LinearCrossEntropy own(LinearCrossEntropyModuleOptions(6, 11).bias(true));
  EXPECT_EQ(own->named_parameters().keys(), (std::vector<std::string>{"weight", "bias"}));
  EXPECT_EQ(own->flops(10), 2.0 * 10 * 6 * 11);
  const auto weight = torch::randn({11, 6}).requires_grad_();
  LinearCrossEntropy tied(LinearCrossEntropyModuleOptions(6, 11).loss(
                              LinearCrossEntropyOptions().reduction(Reduction::kSum)),
                          weight);
  EXPECT_TRUE(tied->weight.is_same(weight));
  const auto hidden = torch::randn({4, 6});
  const auto target = torch::tensor({1, 2, 3, 10});
  const auto out = tied->forward(hidden, target);
  CceCase c{hidden, weight, target, {}, {}, {}, LinearCrossEntropyOptions()};
  c.options.reduction(Reduction::kSum);
  EXPECT_LE(rms_error(out.loss, composed(c).loss), 1e-6);
  out.loss.backward();
  EXPECT_TRUE(weight.grad().defined());
  EXPECT_OUNCE_ERROR(LinearCrossEntropy(LinearCrossEntropyModuleOptions(5, 11), weight), kUsage,
                     "[LinearCrossEntropy] expected a tied weight [V, D] = [11, 5], got [11, 6]");
}

void register_once() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (!registry_store("loss").contains("cce")) register_cce();
  });
}

TEST(CceRegistry, BothLossesAreTheSameSum) {
  register_once();
  const Loss::Context context{.dim = 16, .vocab = 90};
  for (const char* options : {"",
                              "softcap = 5.0\nz_loss = 0.01\nlabel_smoothing = 0.1\n"
                              "logit_scale = 0.5\n"}) {
    std::vector<Tensor> losses, gradients;
    for (const char* name : {"cce", "cross_entropy"}) {
      auto spec = Options::parse(options, "test");
      spec.set("name", name);
      const auto loss = registry<Loss>().make(Value(spec), context);
      EXPECT_EQ(loss->flops(7), 2.0 * 7 * 16 * 90);
      EXPECT_TRUE(loss->parameters().empty());
      const auto c = random_case({50}, 16, 90, false).as(at::kFloat);
      losses.push_back(loss->forward(c.hidden, c.weight, c.target));
      losses.back().backward();
      gradients.push_back(c.weight.grad());
      EXPECT_EQ(losses.back().scalar_type(), at::kFloat);
      EXPECT_EQ(losses.back().dim(), 0);
    }
    EXPECT_LE(rms_error(losses[0], losses[1]), 1e-6);
    EXPECT_LE(rms_error(gradients[0], gradients[1]), 1e-5);
  }
}

}  // namespace

}  // namespace ounce
