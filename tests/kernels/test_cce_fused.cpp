// SPDX-License-Identifier: MIT
// The fused path against the composed formula in fp64, on the same bf16 inputs.
#include "kernels/cce_fused_case.h"

namespace ounce {

namespace {

using at::Tensor;
using namespace cce_test;
using test::rms_error;

class CceFused : public OnFused {};
OUNCE_ON_GPU(CceFused);

TEST_P(CceFused, EqualsComposedOnRaggedShapes) {
  auto shapes = cce_test::kRaggedShapes;
  shapes.insert(shapes.end(),
                {{130, 193, 64}, {257, 384, 200}, {1000, 5003, 72}, {300, 20011, 256}});
  for (const auto& s : shapes) {
    SCOPED_TRACE(c10::str(s.tokens, " ", s.vocab, " ", s.dim));
    expect_close(random_case({s.tokens}, s.dim, s.vocab), s.vocab >= 1000 ? kSpread : kPeaked);
  }
}

TEST_P(CceFused, EqualsComposedForEachOptionAndReduction) {
  const auto base = [&] { return random_case({3, 67}, 40, 1031); };
  std::vector<CceCase> cases(9, base());
  cases[0].options.label_smoothing(0.2);
  cases[1].options.z_loss(0.1);
  cases[2].options.softcap(2);
  cases[3].options.logit_scale(-1.5);
  cases[4].options.shift(2);
  cases[5].token_weight = torch::rand({3, 67}, device());
  cases[6].class_weight = torch::rand({1031}, device());
  cases[7].bias = torch::randn({1031}, device());
  cases[8].bias = torch::randn({1031}, device());
  cases[8].class_weight = torch::rand({1031}, device());
  cases[8].token_weight = torch::rand({3, 67}, device());
  cases[8].options.shift(1).softcap(3).z_loss(1e-2).logit_scale(0.7);
  for (size_t i = 0; i < cases.size(); ++i) {
    for (const auto reduction : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
      for (const int64_t workspace : {int64_t{-1}, int64_t{0}, int64_t{1} << 18}) {
        SCOPED_TRACE(c10::str("case ", i, " workspace ", workspace));
        cases[i].options.reduction(reduction).workspace_bytes(workspace);
        // A scale of -1.5 peaks it.
        expect_close(cases[i].as(at::kBFloat16), i == 3 ? kPeaked : kSpread);
      }
    }
  }
}

// Classifier rows that share a mean: what rounding takes from each of them adds up.
TEST_P(CceFused, HiddenGradientIsRightWhereTheClassifiersRowsAreAlike) {
  for (const double mean : {0.5, 2.0, 8.0}) {
    auto c = random_case({512}, 128, 8000);
    c.weight = (c.weight.detach() + torch::randn({128}, device()) * mean / std::sqrt(128.))
                   .to(at::kBFloat16);
    SCOPED_TRACE(mean);
    expect_close(c.as(at::kBFloat16), kSpread);
  }
}

TEST_P(CceFused, LogitsFarApartAndOffsets) {
  auto c = random_case({256}, 256, 3000);
  for (const double spread : {4.0, 16.0}) {  // up to 300 nats between the target and the largest
    auto wide = c;
    wide.weight = c.weight.detach() * spread;
    SCOPED_TRACE(spread);
    expect_close(wide.as(at::kBFloat16), kPeaked);
  }
  // A common offset of 1000.
  auto offset = c;
  offset.hidden = c.hidden.detach().clone();
  offset.weight = c.weight.detach().clone();
  offset.hidden.select(1, 0).fill_(32);
  offset.weight.select(1, 0).fill_(31.25);
  offset.options.reduction(Reduction::kNone);
  const auto ours = offset.run().loss;
  const auto exact = composed(offset.as(at::kDouble)).loss;
  EXPECT_LE((ours - exact).abs().max().item<double>(), 3e-3);
  EXPECT_LE((ours.mean() - exact.mean()).abs().item<double>(),
            1e-4 * exact.mean().item<double>() + 1e-4);
}

// Of the rows that anchors are taken from, none is near the largest logit.
TEST_P(CceFused, ExponentialsThatOverflowTheirAnchorAreMadeAgain) {
  constexpr double kFewPeaked = 2;  // where six rows of 600 are most of the gradient
  auto c = random_case({600}, 256, 3000);
  auto weight = c.weight.detach() * 24;
  weight.slice(0, 0, 3000, 128).zero_();
  c.weight = weight;
  for (const double share : {1.0, 0.01}) {  // of the rows
    auto some = c;
    const auto small = torch::rand({600, 1}, device()) > share;
    some.hidden = torch::where(small, c.hidden.detach() / 64, c.hidden.detach());
    SCOPED_TRACE(share);
    expect_close(some, share < 1 ? kFewPeaked : kPeaked);
    some.options.softcap(150);
    expect_close(some, share < 1 ? kFewPeaked : kPeaked);
  }
}

TEST_P(CceFused, ChunksOfTokensAddUp) {
  auto c = random_case({1500}, 136, 4099);
  for (const int64_t pairs : {1, 3}) {  // six chunks, two chunks
    c.options.workspace_bytes(2 * 4160 * 256 * pairs);
    SCOPED_TRACE(pairs);
    expect_close(c, kSpread, Recompute::kNever);
  }
}

TEST_P(CceFused, TokenWeightsOfAnySign) {
  auto c = random_case({300}, 64, 2000);
  c.token_weight = torch::randn({300}, device());
  c.token_weight.narrow(0, 0, 50).zero_();
  c.options.reduction(Reduction::kSum);
  expect_close(c, kSpread);
}

TEST_P(CceFused, NoTokensAndNoEntries) {
  auto none = random_case({1}, 64, 20);
  none.hidden = torch::empty({0, 64}, none.hidden.options().requires_grad(false)).requires_grad_();
  none.target = none.target.narrow(0, 0, 0);
  none.options.implementation("auto");
  none.run().loss.backward();
  EXPECT_EQ(none.weight.grad().abs().sum().item<float>(), 0);
  auto empty = random_case({3}, 64, 20);
  empty.weight =
      torch::empty({0, 64}, empty.weight.options().requires_grad(false)).requires_grad_();
  EXPECT_OUNCE_ERROR(empty.run(), kUsage, "expected weight [V, D] with V >= 1");
}

// The gradient of a returned lse is made from the logits, and added to what forward has made.
TEST_P(CceFused, LseOfTheOperatorCarriesItsGradientToo) {
  auto c = random_case({300}, 64, 2000);
  auto both = c.as(at::kBFloat16), exact = c.as(at::kDouble);
  both.options.return_lse(true).recompute(Recompute::kNever);
  const auto out = both.run();
  const auto ref = composed(exact);
  backward(out.loss, out.lse);
  backward(ref.loss, ref.lse);
  EXPECT_LE(rms_error(both.weight.grad(), exact.weight.grad()),
            3 * one_rounding(exact.weight.grad()));
  EXPECT_LE(rms_error(both.hidden.grad(), exact.hidden.grad()),
            3 * one_rounding(exact.hidden.grad()));
}

TEST_P(CceFused, ALossNearZeroKeepsItsPrecision) {
  auto c = random_case({64}, 64, 500);
  c.options.ignore_index(-1).reduction(Reduction::kNone);
  c.target = torch::arange(64, torch::device(device()).dtype(at::kLong));
  c.hidden = (c.weight.detach().narrow(0, 0, 64) * 24).to(at::kBFloat16);
  auto ours = c.as(at::kBFloat16), exact = c.as(at::kDouble);
  const auto loss = ours.run().loss, ref = composed(exact).loss;
  EXPECT_LE(((loss - ref) / ref).abs().max().item<double>(), 1e-2);
  loss.sum().backward();
  ref.sum().backward();
  EXPECT_LE(rms_error(ours.weight.grad(), exact.weight.grad()),
            2 * one_rounding(exact.weight.grad()));
}

TEST_P(CceFused, RowsThatDoNotCountMayHoldAnything) {
  auto c = random_case({300}, 64, 700);
  const auto ignored = c.target == -100;
  auto dirty = c;
  dirty.hidden = c.hidden.detach().masked_fill(ignored.unsqueeze(1), NAN).requires_grad_();
  auto clean = c.as(at::kBFloat16);
  dirty.weight = c.weight.detach().clone().requires_grad_();
  const auto a = clean.run().loss, b = dirty.run().loss;
  EXPECT_TRUE(at::equal(a, b));
  a.backward();
  b.backward();
  EXPECT_TRUE(at::equal(clean.weight.grad(), dirty.weight.grad()));
  EXPECT_TRUE(at::equal(clean.hidden.grad(), dirty.hidden.grad()));
  // None counts.
  auto none = c.as(at::kBFloat16);
  none.target = torch::full_like(c.target, -100);
  const auto zero = none.run().loss;
  zero.backward();
  EXPECT_EQ(zero.item<float>(), 0);
  EXPECT_EQ(none.weight.grad().abs().max().item<float>(), 0);
  EXPECT_EQ(none.hidden.grad().abs().max().item<float>(), 0);
  // One is outside the vocabulary.
  auto outside = c.as(at::kBFloat16);
  outside.target = c.target.clone();
  outside.target[3] = 700;
  EXPECT_TRUE(std::isnan(outside.run().loss.item<float>()));
  outside.options.validate_targets(true);
  EXPECT_OUNCE_ERROR(outside.run(), kUsage, "the first 700");
}

TEST_P(CceFused, IsDeterministicAndBackwardCanBeRepeated) {
  auto c = random_case({700}, 136, 3001);
  Tensor loss, hidden, weight;
  for (int i = 0; i < 10; ++i) {
    auto run = c.as(at::kBFloat16);
    const auto out = run.run().loss;
    const auto third = torch::full_like(out, 1. / 3);
    out.backward(third, /*retain_graph=*/true);
    const auto first = run.weight.grad().clone();
    run.weight.mutable_grad().reset();
    run.hidden.mutable_grad().reset();
    out.backward(third);
    EXPECT_TRUE(at::equal(first, run.weight.grad()));
    if (i > 0) {
      EXPECT_TRUE(at::equal(out, loss));
      EXPECT_TRUE(at::equal(run.weight.grad(), weight));
      EXPECT_TRUE(at::equal(run.hidden.grad(), hidden));
    }
    loss = out.detach();
    hidden = run.hidden.grad();
    weight = run.weight.grad();
  }
}

TEST_P(CceFused, FrozenInputsAndStridesAndTargetTypes) {
  auto c = random_case({200}, 64, 900);
  auto whole = c.as(at::kBFloat16);
  whole.run().loss.backward();
  auto frozen_weight = c.as(at::kBFloat16);
  frozen_weight.weight.requires_grad_(false);
  frozen_weight.run().loss.backward();
  EXPECT_TRUE(at::equal(frozen_weight.hidden.grad(), whole.hidden.grad()));
  auto frozen_hidden = c.as(at::kBFloat16);
  frozen_hidden.hidden.requires_grad_(false);
  frozen_hidden.run().loss.backward();
  EXPECT_TRUE(at::equal(frozen_hidden.weight.grad(), whole.weight.grad()));
  // Transposed, and a byte offset that the copy engine does not take.
  auto strided = c;
  strided.hidden = c.hidden.detach().t().contiguous().t().requires_grad_();
  auto memory = torch::zeros({900 * 64 + 1}, c.weight.options().requires_grad(false));
  strided.weight = memory.narrow(0, 1, 900 * 64).view({900, 64}).copy_(c.weight.detach());
  strided.weight.requires_grad_();
  strided.target = c.target.to(at::kInt);
  const auto loss = strided.run().loss;
  EXPECT_TRUE(at::equal(loss, whole.run().loss));
  loss.backward();
  EXPECT_TRUE(at::equal(strided.hidden.grad(), whole.hidden.grad()));
}

TEST_P(CceFused, AWeightOf32BitsIsReadInSlabs) {
  // Of 64 MiB: the first in one, the second in three.
  for (const int64_t vocab : {70001, 400001}) {
    for (const auto recompute : {Recompute::kNever, Recompute::kAlways}) {
      auto c = random_case({300}, 200, vocab);
      c.weight = c.weight.detach().to(at::kFloat).requires_grad_();
      // Two chunks of tokens.
      c.options.recompute(recompute).workspace_bytes(2 * 256 * (vocab + 63));
      auto exact = c.as(at::kDouble);
      const auto loss = c.run().loss, ref = composed(exact).loss;
      // The products are those of the weight rounded to bf16.
      EXPECT_LE(rms_error(loss, ref), 1e-3);
      loss.backward();
      ref.backward();
      EXPECT_EQ(c.weight.grad().scalar_type(), at::kFloat);
      EXPECT_LE(rms_error(c.weight.grad(), exact.weight.grad()), 6e-3);
      EXPECT_LE(rms_error(c.hidden.grad(), exact.hidden.grad()), 6e-3);
    }
  }
}

TEST_P(CceFused, RefusesByNameWhatItDoesNotTake) {
  auto c = random_case({8}, 16, 30);
  auto exact = c.as(at::kFloat);
  EXPECT_OUNCE_ERROR(exact.run(), kUsage, "hidden in Float");
  for (const auto& [why, change] : std::vector<std::pair<const char*, void (*)(CceCase&)>>{
           {"recompute = always", [](CceCase& f) { f.options.recompute(Recompute::kAlways); }},
           {"a bias", [](CceCase& f) { f.bias = torch::randn_like(f.weight.select(1, 0)); }},
           {"reduction = none", [](CceCase& f) { f.options.reduction(Reduction::kNone); }}}) {
    auto filtered = c.as(at::kBFloat16);
    filtered.options.grad_mode(GradMode::kFilter);
    change(filtered);
    EXPECT_OUNCE_ERROR(filtered.run(), kUsage, why);
  }
}

}  // namespace

}  // namespace ounce
