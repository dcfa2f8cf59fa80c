// SPDX-License-Identifier: MIT
// What the fused path's general passes can do: moments of a row, gradients that are more than a
// factor of the probability, fp16.
#include <limits>

#include "kernels/cce_fused_case.h"

namespace ounce {

namespace {

using at::Tensor;
using namespace cce_test;
using test::rms_error;

class CceFusedOptions : public OnFused {};
OUNCE_ON_GPU(CceFusedOptions);

constexpr at::ScalarType kTypes[] = {at::kBFloat16, at::kHalf};
// Of the upstreams: what makes gradients normal numbers in fp16.
constexpr double kLossScale = 4096;

void expect_both_ways(const CceCase& c, double hidden_bound) {
  const bool half = c.hidden.scalar_type() == at::kHalf;
  for (const auto recompute : {Recompute::kNever, Recompute::kAlways}) {
    if (recompute == Recompute::kNever && c.options.return_entropy()) continue;
    SCOPED_TRACE(c10::str(c.hidden.scalar_type(),
                          recompute == Recompute::kNever ? " in forward" : " in backward"));
    cce_test::expect_close(c, hidden_bound, recompute, half ? kLossScale : 1);
  }
}

TEST_P(CceFusedOptions, SmoothingWithASoftcapAndClassWeights) {
  for (const auto type : kTypes) {
    const auto base = [&] { return random_case({3, 67}, 40, 1031, type); };
    std::vector<CceCase> cases(4, base());
    cases[0].options.softcap(2);
    cases[1].class_weight = torch::rand({1031}, device()) * 2;
    cases[2].class_weight = torch::rand({1031}, device());
    cases[2].bias = torch::randn({1031}, device()).to(type);
    cases[2].token_weight = torch::rand({3, 67}, device());
    cases[2].options.softcap(3).z_loss(1e-2).logit_scale(0.7).shift(1);
    for (size_t i = 0; i < cases.size(); ++i) {
      cases[i].options.label_smoothing(i == 3 ? 1 : 0.2);
      for (const auto reduction : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
        for (const int64_t workspace : {int64_t{-1}, int64_t{0}}) {
          SCOPED_TRACE(c10::str("case ", i, " workspace ", workspace));
          cases[i].options.reduction(reduction).workspace_bytes(workspace);
          expect_both_ways(cases[i].as(type), kSpread);
        }
      }
    }
  }
}

TEST_P(CceFusedOptions, EntropyAndItsGradient) {
  for (const auto type : kTypes) {
    const auto base = [&] {
      auto c = random_case({300}, 72, 5003, type);
      c.options.return_entropy(true);
      return c;
    };
    std::vector<CceCase> cases(5, base());
    cases[1].options.softcap(2).reduction(Reduction::kNone);
    cases[2].options.label_smoothing(0.1).z_loss(1e-2);
    cases[3].weight = cases[3].weight.detach() * 4;  // entropies from 0 to 5
    cases[4].options.workspace_bytes(0).reduction(Reduction::kSum);
    for (size_t i = 0; i < cases.size(); ++i) {
      SCOPED_TRACE(c10::str("case ", i));
      expect_both_ways(cases[i].as(type), i == 3 ? kPeaked : kSpread);
    }
  }
}

// Of the entropy alone, and where the classifier is read in slabs.
TEST_P(CceFusedOptions, EntropyAlone) {
  for (const auto type : kTypes) {
    auto c = random_case({300}, 256, 140001, type);
    c.weight = c.weight.detach().to(at::kFloat);
    auto exact = c.as(at::kDouble);
    // The products are those of the weight rounded to 16 bits.
    exact.weight = c.weight.to(type).to(at::kDouble).requires_grad_();
    c.weight.requires_grad_();
    c.options.return_entropy(true);
    const auto ours = c.run().entropy, ref = composed(exact).entropy;
    EXPECT_LE(rms_error(ours, ref), 2e-5);
    (ours.sum() * kLossScale).backward();
    (ref.sum() * kLossScale).backward();
    const auto hidden = exact.hidden.grad(), weight = exact.weight.grad();
    EXPECT_LE(rms_error(c.hidden.grad(), hidden), kSpread * one_rounding(hidden, type) + 1e-6);
    EXPECT_LE(rms_error(c.weight.grad(), weight), 2 * one_rounding(weight, type) + 1e-6);
  }
}

// Of equal logits the first wins: small integers, whose products are exact.
TEST_P(CceFusedOptions, CorrectIsTheFirstLargest) {
  for (const auto type : kTypes) {
    auto c = random_case({700}, 8, 3001, type);
    c.hidden = torch::randint(-2, 3, {700, 8}, device()).to(type);
    c.weight = torch::randint(-2, 3, {3001, 8}, device()).to(type);
    const auto logits = torch::mm(c.hidden.to(at::kFloat), c.weight.to(at::kFloat).t());
    const auto first = logits.argmax(1), top = logits.amax(1);
    // Half of the targets are the first largest, others a later one, the rest anything.
    const auto last = 3000 - logits.flip(1).argmax(1);
    const auto draw = torch::rand({700}, device());
    c.target = torch::where(draw < 0.5, first, torch::where(draw < 0.8, last, c.target));
    c.target[5] = -100;
    c.options.return_correct(true);
    const auto correct = c.run().correct;
    EXPECT_TRUE(at::equal(correct, first.eq(c.target)));
    EXPECT_GT(correct.sum().item<int64_t>(), 300);
    EXPECT_LT(correct.sum().item<int64_t>(), 690);
    c.target[7] = 3001;
    EXPECT_FALSE(c.run().correct[7].item<bool>());
    // Where the classifier is read in slabs of 1920 entries.
    auto slabs = c;
    slabs.weight =
        torch::cat({c.weight, torch::zeros({3001, 16384}, c.weight.options())}, 1).to(at::kFloat);
    slabs.hidden = torch::cat({c.hidden, torch::zeros({700, 16384}, c.hidden.options())}, 1);
    EXPECT_TRUE(at::equal(slabs.run().correct, c.run().correct));
  }
}

// A vocabulary of which a bias leaves out a part.
TEST_P(CceFusedOptions, ABiasOfMinusInfinity) {
  for (const auto type : kTypes) {
    auto c = random_case({300}, 64, 2000, type);
    c.bias = torch::zeros({2000}, c.weight.options().requires_grad(false));
    c.bias.narrow(0, 500, 700).fill_(-std::numeric_limits<double>::infinity());
    c.target = c.target.remainder(500);
    c.options.ignore_index(-100).return_entropy(true);
    auto few = c;  // the same without them
    few.bias = Tensor();
    few.weight =
        torch::cat({c.weight.detach().narrow(0, 0, 500), c.weight.detach().narrow(0, 1200, 800)});
    const auto out = c.run(), expected = few.run();
    EXPECT_LE(rms_error(out.loss, expected.loss), 1e-5);
    EXPECT_LE(rms_error(out.entropy, expected.entropy), 1e-5);
    auto leaf = c.as(type);
    const auto loss = leaf.run();
    (loss.loss + loss.entropy.sum()).backward();
    EXPECT_TRUE(leaf.weight.grad().isfinite().all().item<bool>());
    EXPECT_EQ(leaf.weight.grad().narrow(0, 500, 700).abs().max().item<float>(), 0);
  }
}

TEST_P(CceFusedOptions, Fp16OnRaggedShapes) {
  auto shapes = kRaggedShapes;
  shapes.insert(shapes.end(), {{130, 193, 64}, {1000, 5003, 72}, {300, 20011, 256}});
  for (const auto& s : shapes) {
    SCOPED_TRACE(c10::str(s.tokens, " ", s.vocab, " ", s.dim));
    expect_both_ways(random_case({s.tokens}, s.dim, s.vocab, at::kHalf),
                     s.vocab >= 1000 ? kSpread : kPeaked);
  }
}

// Rows whose upstreams are far apart; a vocabulary whose probabilities fp16 cannot hold; a
// main_grad.
TEST_P(CceFusedOptions, Fp16WhereItsRangeIsShort) {
  auto c = random_case({400}, 128, 200003, at::kHalf);
  c.token_weight = torch::exp(torch::randn({400}, device()) * 2);
  c.options.reduction(Reduction::kSum);
  expect_both_ways(c, kSpread);
  auto exact = c.as(at::kDouble);
  auto main_grad = torch::ones({200003, 128}, torch::device(device()));
  auto adds = c.as(at::kHalf);
  adds.options.main_grad(main_grad);
  adds.run().loss.backward();
  composed(exact).loss.backward();
  EXPECT_LE(rms_error(main_grad - 1, exact.weight.grad()),
            2 * one_rounding(exact.weight.grad(), at::kHalf));
}

}  // namespace

}  // namespace ounce
