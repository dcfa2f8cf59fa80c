// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/autocast.h>
#include <ounce/core/device.h>
#include <torch/torch.h>

#include <cmath>

#include "kernels/cce_composed.h"
#include "support/devices.h"
#include "support/expect_error.h"
#include "support/rms_error.h"

namespace ounce {

namespace {

using at::Tensor;
using cce_test::backward;
using cce_test::CceCase;
using cce_test::composed;
using test::rms_error;

class Cce : public test::OnDevice {
 protected:
  // Made on the CPU, so that every device sees the same numbers.
  CceCase random_case(const std::vector<int64_t>& shape, int64_t dim, int64_t vocab,
                      bool all_options) const {
    return cce_test::random_case(shape, dim, vocab, all_options).on(device());
  }
  // Beside the result, a GPU rounds dloss/dlogits to bf16.
  double bf16_bound(double one_rounding, double on_cpu) const {
    return one_rounding * (on_gpu() ? 2 : on_cpu);
  }
};
OUNCE_ON_EACH_DEVICE(Cce);

// Loss, lse and all gradients of `c` in fp64 against the composed formula.
void expect_equal_fp64(const CceCase& c, double bound = 1e-12) {
  auto ours = c.as(at::kDouble), theirs = c.as(at::kDouble);
  ours.options.return_lse(true).return_z_loss(true);
  const auto out = ours.run();
  const auto ref = composed(theirs);
  EXPECT_EQ(out.loss.sizes(), ref.loss.sizes());
  EXPECT_LE(rms_error(out.loss, ref.loss), bound);
  EXPECT_LE(rms_error(out.lse, ref.lse), bound);
  EXPECT_LE(rms_error(out.z_loss, ref.z_loss), bound);
  backward(out.loss, out.lse);
  backward(ref.loss, ref.lse);
  EXPECT_LE(rms_error(ours.hidden.grad(), theirs.hidden.grad()), bound);
  EXPECT_LE(rms_error(ours.weight.grad(), theirs.weight.grad()), bound);
  if (!c.bias.defined()) return;
  EXPECT_LE(rms_error(ours.bias.grad(), theirs.bias.grad()), bound);
}

TEST_P(Cce, EqualsComposedOnRaggedShapes) {
  for (const auto& s : cce_test::kRaggedShapes) {
    for (const bool all_options : {false, true}) {
      SCOPED_TRACE(c10::str(s.tokens, " ", s.vocab, " ", s.dim, " ", all_options));
      expect_equal_fp64(random_case({s.tokens}, s.dim, s.vocab, all_options));
    }
  }
}

TEST_P(Cce, EqualsComposedForEachOptionAndReduction) {
  const auto base = [] { return cce_test::random_case({3, 17}, 24, 131, false); };
  std::vector<CceCase> cases(9, base());
  cases[0].options.label_smoothing(0.2);
  cases[1].options.z_loss(0.1);
  cases[2].options.softcap(2);
  cases[3].options.logit_scale(-1.5);
  cases[4].options.shift(2);
  cases[5].token_weight = torch::rand({3, 17}, at::kFloat);
  cases[6].class_weight = torch::rand({131}, at::kDouble);
  cases[7].bias = torch::randn({131}, at::kDouble);
  cases[8] = cce_test::random_case({3, 17}, 24, 131, true);
  cases[8].options.shift(1);
  for (size_t i = 0; i < cases.size(); ++i) {
    cases[i] = cases[i].on(device());
    for (const auto reduction : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
      for (const int64_t workspace : {int64_t{-1}, int64_t{0}, int64_t{2 * 131 * 8 * 4}}) {
        SCOPED_TRACE(c10::str("case ", i, " workspace ", workspace));
        cases[i].options.reduction(reduction).workspace_bytes(workspace);
        expect_equal_fp64(cases[i]);
      }
    }
  }
}

TEST_P(Cce, GradientIsTheDifferenceQuotient) {
  auto c = random_case({5, 3}, 6, 11, true).as(at::kDouble);
  c.options.reduction(Reduction::kNone).return_lse(true).shift(1);
  const auto value = [](const CceCase& at) {
    const auto out = at.run();
    return out.loss.sum() * 0.8 + out.lse.square().sum() * 0.3;
  };
  value(c).backward();
  for (auto CceCase::*input : {&CceCase::hidden, &CceCase::weight, &CceCase::bias}) {
    const auto direction = torch::randn_like(c.*input);
    const double step = 1e-6;
    torch::NoGradGuard no_grad;
    auto up = c, down = c;
    up.*input = c.*input + direction * step;
    down.*input = c.*input - direction * step;
    const double quotient = (value(up) - value(down)).item<double>() / (2 * step);
    const double slope = ((c.*input).grad() * direction).sum().item<double>();
    EXPECT_NEAR(slope, quotient, 1e-7 * std::max(1.0, std::abs(quotient)));
  }
}

// A 16-bit path may err by twice what the composed formula in the same dtype does.
TEST_P(Cce, SixteenBitErrorIsAtMostTwiceThatOfComposed) {
  for (const auto type : {at::kBFloat16, at::kHalf, at::kFloat}) {
    for (const bool all_options : {false, true}) {
      const auto rounded = random_case({300}, 64, 517, all_options).as(type);
      auto ours = rounded.as(type), theirs = rounded.as(type), exact = rounded.as(at::kDouble);
      if (all_options) ours.options.workspace_bytes(0);  // a token at a time
      const auto loss = ours.run().loss, ref = composed(exact).loss;
      auto plain = composed(theirs).loss;
      EXPECT_EQ(loss.scalar_type(), at::kFloat);
      EXPECT_LE(rms_error(loss, ref), std::max(1e-6, 2 * rms_error(plain, ref)));
      for (const auto& t : {loss, plain, ref}) t.backward();
      const auto check = [&](const char* name, Tensor CceCase::*input) {
        if (!(ours.*input).defined()) return;
        EXPECT_EQ((ours.*input).grad().scalar_type(), type);
        const double mine = rms_error((ours.*input).grad(), (exact.*input).grad());
        const double plain_error = rms_error((theirs.*input).grad(), (exact.*input).grad());
        EXPECT_LE(mine, std::max(1e-6, 2 * plain_error)) << name << " " << type;
      };
      check("hidden", &CceCase::hidden);
      check("weight", &CceCase::weight);
      check("bias", &CceCase::bias);
    }
  }
}

// One rounding of the exact gradient to bf16 has an error of about 1.7e-3.
TEST_P(Cce, WeightGradientErrorDoesNotGrowWithTokens) {
  for (const int64_t tokens : {1024, 8192, 65536}) {
    auto c = random_case({tokens}, 16, 32, false).as(at::kBFloat16);
    auto exact = c.as(at::kDouble);
    c.options.workspace_bytes(1 << 20);
    c.run().loss.backward();
    composed(exact).loss.backward();
    const auto rounded = exact.weight.grad().to(at::kBFloat16);
    const double one_rounding = rms_error(rounded, exact.weight.grad());
    EXPECT_LE(rms_error(c.weight.grad(), exact.weight.grad()), bf16_bound(one_rounding, 1.2))
        << tokens;
  }
}

TEST_P(Cce, BiasOfAWideLayer) {
  auto c = cce_test::random_case({9}, 2304, 64, false);
  c.bias = torch::randn({64}, at::kDouble) * 0.02;
  expect_equal_fp64(c.on(device()));
}

// Converted in three slabs of the vocabulary: to fp32 on a CPU, to bf16 on a GPU.
TEST_P(Cce, WeightLargerThanASlab) {
  auto ours = random_case({5}, 2304, on_gpu() ? 20001 : 4001, true).as(at::kBFloat16);
  if (on_gpu()) ours.weight = ours.weight.detach().to(at::kFloat).requires_grad_();
  if (on_gpu()) ours.bias = ours.bias.detach().to(at::kFloat).requires_grad_();
  ours.options.workspace_bytes(1 << 20);
  auto exact = ours.as(at::kDouble);
  const auto loss = ours.run().loss, ref = composed(exact).loss;
  EXPECT_LE(rms_error(loss, ref), 1e-6);
  loss.backward();
  ref.backward();
  for (auto CceCase::*input : {&CceCase::hidden, &CceCase::weight, &CceCase::bias}) {
    const auto gradient = (exact.*input).grad();
    const double one_rounding = rms_error(gradient.to(at::kBFloat16), gradient);
    EXPECT_LE(rms_error((ours.*input).grad(), gradient), bf16_bound(one_rounding, 1.1));
  }
}

// --- numerics -----------------------------------------------------------------------------------

TEST_P(Cce, CommonLogitOffsetOfAThousand) {
  auto c = random_case({512}, 64, 1000, false);
  c.hidden.select(1, 0).fill_(1);
  c.weight.select(1, 0).fill_(1000);
  c = c.as(at::kFloat);
  auto exact = c.as(at::kDouble);
  const auto loss = c.run().loss, ref = composed(exact).loss;
  EXPECT_NEAR(loss.item<double>(), ref.item<double>(), 1e-4);
  loss.backward();
  ref.backward();
  EXPECT_LE(rms_error(c.weight.grad(), exact.weight.grad()), 1e-3);
}

TEST_P(Cce, TargetsFarUnderTheLargestLogit) {
  for (const double gap : {1e-3, 1.0, 9.99, 10.01, 50.0, 100.0, 300.0}) {
    CceCase c;
    c.hidden = torch::ones({1, 1}, at::kDouble);
    c.weight = torch::tensor({0.5, gap + 0.5, 0.25}, at::kDouble).unsqueeze(1);
    c.target = torch::zeros({1}, at::kLong);
    c = c.on(device()).as(at::kFloat);
    auto exact = c.as(at::kDouble);
    const auto loss = c.run().loss, ref = composed(exact).loss;
    EXPECT_LE(rms_error(loss, ref), 1e-6) << gap;
    loss.backward();
    ref.backward();
    EXPECT_LE(rms_error(c.hidden.grad(), exact.hidden.grad()), 1e-5) << gap;
    EXPECT_LE(rms_error(c.weight.grad(), exact.weight.grad()), 1e-5) << gap;
  }
}

TEST_P(Cce, LossesNearZeroKeepTheirDigits) {
  for (const double gap : {5.0, 14.0, 30.0, 80.0}) {
    CceCase c;
    c.hidden = torch::ones({1, 1}, at::kDouble);
    c.weight = torch::tensor({gap, 0.0, 0.5}, at::kDouble).unsqueeze(1);
    c.target = torch::zeros({1}, at::kLong);
    c = c.on(device()).as(at::kFloat);
    const auto loss = c.run().loss;
    loss.backward();
    const double rest = std::exp(-gap) + std::exp(0.5 - gap);
    EXPECT_NEAR(loss.item<double>() / std::log1p(rest), 1, 1e-5) << gap;
    EXPECT_NEAR(c.weight.grad()[0].item<double>() / (-rest / (1 + rest)), 1, 1e-5) << gap;
  }
}

// --- what does not count ------------------------------------------------------------------------

TEST_P(Cce, NoTokens) {
  for (const auto reduction : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
    auto c = random_case({0}, 4, 5, false).as(at::kFloat);
    c.options.reduction(reduction).return_correct(true).grad_mode(GradMode::kFilter);
    const auto out = c.run();
    EXPECT_EQ(out.n_valid.item<int64_t>(), 0);
    EXPECT_EQ(out.loss.sum().item<float>(), 0);
    out.loss.sum().backward();
    EXPECT_TRUE(at::equal(c.weight.grad(), torch::zeros_like(c.weight)));
    EXPECT_EQ(c.hidden.grad().sizes(), c.hidden.sizes());
  }
}

TEST_P(Cce, AllIgnoredIsZeroOrNan) {
  for (const bool nan : {false, true}) {
    auto c = random_case({129}, 8, 33, false).as(at::kFloat);
    c.options.empty_is_nan(nan);
    EXPECT_FALSE(std::isnan(c.run().loss.item<float>()));
    c.target.fill_(-100);
    const auto loss = c.run().loss;
    if (nan) {
      EXPECT_TRUE(std::isnan(loss.item<float>()));
    } else {
      EXPECT_EQ(loss.item<float>(), 0);
    }
    loss.backward();
    EXPECT_TRUE(at::equal(c.weight.grad(), torch::zeros_like(c.weight)));
    EXPECT_TRUE(at::equal(c.hidden.grad(), torch::zeros_like(c.hidden)));
    c.options.reduction(Reduction::kSum);
    EXPECT_EQ(c.run().loss.item<float>(), 0);
  }
}

TEST_P(Cce, IgnoredRowsMayHoldAnything) {
  auto c = random_case({2, 40}, 16, 50, true);
  c.options.shift(1);
  const auto clean = c.as(at::kFloat);
  auto dirty = c;
  dirty.hidden = c.hidden.clone();
  const auto ignored = torch::roll(c.target == c.options.ignore_index(), -1, -1);
  dirty.hidden.index_put_({ignored}, std::nan(""));
  dirty.hidden.select(1, 39).fill_(std::numeric_limits<double>::infinity());
  auto poisoned = dirty.as(at::kFloat);
  const auto a = clean.run().loss, b = poisoned.run().loss;
  EXPECT_TRUE(at::equal(a, b));
  a.backward();
  b.backward();
  EXPECT_TRUE(at::equal(clean.weight.grad(), poisoned.weight.grad()));
  EXPECT_TRUE(at::equal(clean.bias.grad(), poisoned.bias.grad()));
  EXPECT_TRUE(at::equal(clean.hidden.grad(), poisoned.hidden.grad()));
}

TEST_P(Cce, TargetOutsideTheVocabulary) {
  for (const int64_t bad : {-1, 33, 1 << 30}) {
    auto c = random_case({20}, 8, 33, false).as(at::kFloat);
    c.target[3] = bad;
    c.options.reduction(Reduction::kNone);
    const auto rows = c.run().loss;
    EXPECT_TRUE(std::isnan(rows[3].item<float>()));
    EXPECT_EQ(rows.isnan().sum().item<int64_t>(), 1);
    c.options.validate_targets(true);
    EXPECT_OUNCE_ERROR(c.run(), kUsage,
                       c10::str("[linear_cross_entropy] expected targets in [0, 33) or "
                                "ignore_index = -100, got 1 others, the first ",
                                bad));
  }
}

TEST_P(Cce, TargetOutsideTheVocabularyIsNotCorrect) {
  CceCase c;  // the largest logit is always the first
  c.hidden = torch::ones({3, 1}, at::kDouble);
  c.weight = torch::tensor({2.0, 1.0}, at::kDouble).unsqueeze(1);
  c.target = torch::tensor({0, 2, -1}, at::kLong);
  c.options.return_correct(true);
  const auto correct = c.on(device()).run().correct.cpu();
  EXPECT_TRUE(at::equal(correct, torch::tensor({true, false, false})));
}

// --- inputs -------------------------------------------------------------------------------------

TEST_P(Cce, StridedAndUnalignedInputs) {
  const auto plain = random_case({6, 10}, 15, 40, false).as(at::kFloat);
  auto strided = plain;
  const auto storage = torch::empty({15 * 60 + 1}, device());
  strided.hidden = storage.narrow(0, 1, 15 * 60).view({15, 10, 6}).permute({2, 1, 0});
  strided.hidden.copy_(plain.hidden.detach());
  strided.hidden.requires_grad_();
  const auto wide = torch::empty({6, 20 + 1}, plain.target.options().dtype(at::kInt));
  const auto labels = wide.narrow(1, 1, 20).slice(1, 0, 20, 2);
  strided.target = labels.copy_(plain.target);
  const auto a = plain.run().loss, b = strided.run().loss;
  EXPECT_TRUE(at::equal(a, b));
  a.backward();
  const auto expected = plain.weight.grad().clone();
  plain.weight.mutable_grad().reset();
  b.backward();
  EXPECT_TRUE(at::equal(expected, plain.weight.grad()));
  EXPECT_TRUE(at::equal(plain.hidden.grad(), strided.hidden.grad()));
}

TEST_P(Cce, RepeatsBitForBit) {
  Tensor loss, hidden, weight;
  for (int i = 0; i < 10; ++i) {
    auto c = random_case({150}, 32, 200, true).as(at::kBFloat16);
    c.options.workspace_bytes(64 * 200 * 8);
    const auto out = c.run().loss;
    out.backward();
    if (i == 0) {
      loss = out;
      hidden = c.hidden.grad();
      weight = c.weight.grad();
    }
    EXPECT_TRUE(at::equal(out, loss));
    EXPECT_TRUE(at::equal(c.hidden.grad(), hidden));
    EXPECT_TRUE(at::equal(c.weight.grad(), weight));
  }
}

TEST_P(Cce, SecondBackwardEqualsTheFirst) {
  auto c = random_case({30}, 8, 50, true).as(at::kFloat);
  const auto loss = c.run().loss;
  const auto gradients = [&] {
    return torch::autograd::grad({loss}, {c.hidden, c.weight, c.bias}, {}, /*retain_graph=*/true);
  };
  const auto first = gradients(), second = gradients();
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(at::equal(first[i], second[i]));
}

TEST_P(Cce, DoubleBackwardThrowsByName) {
  auto c = random_case({5}, 4, 9, false).as(at::kDouble);
  for (const auto recompute : {Recompute::kNever, Recompute::kAlways}) {
    c.options.recompute(recompute);
    const auto first = torch::autograd::grad({c.run().loss}, {c.hidden}, {}, true, true);
    EXPECT_OUNCE_ERROR(first[0].sum().backward(), kUsage,
                       "[linear_cross_entropy] expected a first derivative, got double backward");
  }
}

TEST_P(Cce, FrozenInputsGetNothingAndChangeNothing) {
  const auto both = random_case({70}, 12, 40, true).as(at::kFloat);
  both.run().loss.backward();
  auto frozen_weight = both.as(at::kFloat), frozen_hidden = both.as(at::kFloat);
  frozen_weight.weight.requires_grad_(false);
  frozen_weight.bias.requires_grad_(false);
  frozen_weight.run().loss.backward();
  frozen_hidden.hidden.requires_grad_(false);
  frozen_hidden.run().loss.backward();
  EXPECT_FALSE(frozen_weight.weight.grad().defined());
  EXPECT_FALSE(frozen_hidden.hidden.grad().defined());
  EXPECT_TRUE(at::equal(frozen_weight.hidden.grad(), both.hidden.grad()));
  EXPECT_TRUE(at::equal(frozen_hidden.weight.grad(), both.weight.grad()));
  auto inference = both.as(at::kFloat);
  torch::NoGradGuard no_grad;
  EXPECT_FALSE(inference.run().loss.requires_grad());
}

TEST_P(Cce, AutocastCastsHiddenAndKeepsTheWeight) {
  auto c = random_case({64}, 48, 300, false).as(at::kFloat);
  auto rounded = c.as(at::kDouble);
  const auto round = [](const Tensor& t) {
    return t.detach().to(at::kBFloat16).to(at::kDouble).requires_grad_();
  };
  rounded.hidden = round(c.hidden);
  if (on_gpu()) rounded.weight = round(c.weight);  // a slab at a time
  {
    AutocastGuard autocast(GetParam(), at::kBFloat16);
    const auto loss = c.run().loss;
    EXPECT_EQ(loss.scalar_type(), at::kFloat);
    loss.backward();
    const auto ref = composed(rounded).loss.to(at::kDouble);
    EXPECT_LE(rms_error(loss, ref), 1e-6);
  }
  composed(rounded).loss.backward();
  EXPECT_EQ(c.weight.grad().scalar_type(), at::kFloat);
  EXPECT_LE(rms_error(c.weight.grad(), rounded.weight.grad()), on_gpu() ? 4e-3 : 1e-5);
  EXPECT_EQ(c.hidden.grad().scalar_type(), at::kFloat);
  EXPECT_LE(rms_error(c.hidden.grad(), rounded.hidden.grad()), 4e-3);  // rounded to bf16
}

TEST_P(Cce, StrictRefusesToFallBackOnAGpu) {
  auto c = random_case({4}, 4, 5, false).as(at::kFloat);
  setenv("OUNCE_STRICT", "1", 1);
  if (on_gpu()) EXPECT_OUNCE_ERROR(c.run(), kUsage, "expected what the fused path takes");
  if (on_gpu()) c.options.implementation("reference");
  EXPECT_NO_THROW(c.run());
  unsetenv("OUNCE_STRICT");
}

// --- memory -------------------------------------------------------------------------------------

TEST_P(Cce, NeverHoldsAllLogits) {
  count_cpu_memory();
  constexpr int64_t kTokens = 2048, kVocab = 16384, kDim = 16, kWorkspace = int64_t{4} << 20;
  constexpr int64_t kLogits = kTokens * kVocab * 4;
  auto c = random_case({kTokens}, kDim, kVocab, true).as(at::kFloat);
  c.class_weight = c.class_weight.to(at::kFloat);
  c.options.workspace_bytes(kWorkspace);
  c.as(at::kFloat).run().loss.backward();  // what libraries keep is theirs
  const auto before = memory_use(device()).current;
  reset_peak_memory(device());
  const auto loss = c.run().loss;
  const auto forward = memory_use(device()).peak - before;
  reset_peak_memory(device());
  loss.backward();
  const auto gradients = 4 * (kTokens * kDim + kVocab * kDim + kVocab);
  const auto extra = memory_use(device()).peak - before - gradients;
  RecordProperty("forward_bytes", static_cast<int>(forward));
  RecordProperty("backward_bytes", static_cast<int>(extra));
  // Beside the workspace: vectors of a value a token or a vocabulary entry. The allocator of a GPU
  // may hand out up to 1 MiB more than a large buffer asks for.
  const int64_t bound = kWorkspace + ((on_gpu() ? 4 : 1) << 20);
  EXPECT_GT(forward, kWorkspace / 4);  // the count itself works
  EXPECT_LE(forward, bound);
  EXPECT_LE(extra, bound);
  EXPECT_LT(10 * extra, kLogits);
}

}  // namespace

}  // namespace ounce
