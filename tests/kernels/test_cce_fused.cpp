// SPDX-License-Identifier: MIT
// The fused path against the composed formula in fp64, on the same bf16 inputs.
#include <gtest/gtest.h>
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

class CceFused : public test::OnDevice {
 protected:
  CceCase random_case(const std::vector<int64_t>& shape, int64_t dim, int64_t vocab) const {
    auto c = cce_test::random_case(shape, dim, vocab, false).on(device()).as(at::kBFloat16);
    c.options.implementation("fused");
    return c;
  }
};
INSTANTIATE_TEST_SUITE_P(, CceFused, testing::Values(at::kCUDA),
                         [](const auto&) { return "cuda"; });

double one_rounding(const Tensor& exact) { return rms_error(exact.to(at::kBFloat16), exact); }

// A gradient whose true value is 0 (V = 1) has no relative error.
double relative_to(const Tensor& ours, const Tensor& exact) {
  return exact.abs().max().item<double>() < 1e-12 ? ours.abs().max().item<double>()
                                                  : rms_error(ours, exact);
}

// The gradient of the hidden state errs by one rounding where a row's mass is spread; where a few
// entries carry it, by what rounding their dloss/dlogits adds, as every bf16 GEMM does.
constexpr double kSpread = 1.2, kPeaked = 1.8;

void expect_close(const CceCase& c, double hidden_bound, Recompute recompute) {
  auto ours = c.as(at::kBFloat16), exact = c.as(at::kDouble);
  const bool again = recompute == Recompute::kAlways;
  ours.options.recompute(recompute).return_lse(again).return_z_loss(true);
  const auto out = ours.run();
  const auto ref = composed(exact);
  EXPECT_EQ(out.loss.sizes(), ref.loss.sizes());
  EXPECT_LE(rms_error(out.loss, ref.loss), 1e-5);
  if (again) {
    EXPECT_LE(rms_error(out.lse, ref.lse), 1e-5);
  }
  EXPECT_LE(rms_error(out.z_loss, ref.z_loss), 1e-5);
  backward(out.loss, again ? out.lse : Tensor());
  backward(ref.loss, again ? ref.lse : Tensor());
  const auto hidden = exact.hidden.grad(), weight = exact.weight.grad();
  EXPECT_LE(relative_to(ours.hidden.grad(), hidden), hidden_bound * one_rounding(hidden) + 1e-6);
  // Forward's is scaled by the upstream after it was rounded.
  EXPECT_LE(relative_to(ours.weight.grad(), weight),
            (again ? 2 : 2.4) * one_rounding(weight) + 1e-6);
  if (!c.bias.defined()) return;
  const auto bias = exact.bias.grad();
  EXPECT_LE(relative_to(ours.bias.grad(), bias), 2 * one_rounding(bias) + 1e-6);
}
void expect_close(const CceCase& c, double hidden_bound) {
  for (const auto recompute : {Recompute::kNever, Recompute::kAlways}) {
    SCOPED_TRACE(recompute == Recompute::kNever ? "gradients in forward" : "in backward");
    expect_close(c, hidden_bound, recompute);
  }
}

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

// In fp32, over slabs, of a D that is aligned and one that is not.
TEST_P(CceFused, MainGradIsNotRounded) {
  for (const int64_t dim : {136, 130}) {
    auto c = random_case({500}, dim, 5003);
    auto exact = c.as(at::kDouble);
    auto main_grad = torch::zeros({5003, dim}, torch::device(device()));
    c.options.workspace_bytes(1 << 20).main_grad(main_grad);
    c.run().loss.backward();
    composed(exact).loss.backward();
    EXPECT_FALSE(c.weight.grad().defined());
    // What is left are the rounded entries of dloss/dlogits.
    EXPECT_LE(rms_error(main_grad, exact.weight.grad()), 2 * one_rounding(exact.weight.grad()));
    EXPECT_GT(rms_error(main_grad.to(at::kBFloat16), main_grad), 1e-3);
    EXPECT_LE(rms_error(c.hidden.grad(), exact.hidden.grad()),
              kSpread * one_rounding(exact.hidden.grad()));
  }
}

TEST_P(CceFused, RefusesByNameWhatItDoesNotTake) {
  auto c = random_case({8}, 16, 30);
  auto half = c.as(at::kHalf);
  EXPECT_OUNCE_ERROR(half.run(), kUsage, "hidden in Half");
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

// --- filtering

// Each group of 128 tokens finds some tiles of the vocabulary likely, and the others e^-6 as much.
// One target in fifty is anywhere.
CceCase patterned_case(const CceCase& random) {
  constexpr int64_t kTile = 128, kGroups = 8;
  auto c = random;
  const auto rows = c.hidden.size(0), vocab = c.weight.size(0);
  const auto options = torch::device(c.hidden.device()).dtype(at::kLong);
  const auto group = torch::arange(rows, options).div(kTile, "floor").remainder(kGroups);
  const auto tile = torch::arange(vocab, options).div(kTile, "floor");
  auto likely = torch::rand({kGroups, tile.max().item<int64_t>() + 1}, c.hidden.device()) < 0.3;
  likely.select(1, 0).fill_(true);
  const auto offset = likely.logical_not().to(at::kBFloat16) * -6;
  c.hidden = c.hidden.detach().clone();
  c.weight = c.weight.detach().clone();
  c.hidden.narrow(1, 0, kGroups) = torch::one_hot(group, kGroups).to(at::kBFloat16);
  c.weight.narrow(1, 0, kGroups) = offset.index_select(1, tile).t();
  const auto probable = likely.index_select(0, group).index_select(1, tile).to(at::kFloat);
  const auto near = torch::multinomial(probable, 1).squeeze(1);
  const auto far = torch::rand({rows}, c.hidden.device()) < 0.02;
  c.target = torch::where(c.target == -100, c.target, torch::where(far, c.target, near));
  return c.as(c.hidden.scalar_type());
}

TEST_P(CceFused, FilterDropsTheTilesOfItsDefinition) {
  struct Setting {
    int64_t tokens, dim, vocab;
    GradMode mode = GradMode::kFilter;
    double softcap = 0;
    int64_t workspace = -1;
  };
  const auto rows_256 = [](int64_t vocab) { return 256 * 2 * (vocab + 63); };
  for (const auto& s :
       {Setting{1, 16, 5}, Setting{130, 64, 1000}, Setting{300, 72, 5003},
        Setting{1000, 200, 20011}, Setting{1000, 200, 20011, GradMode::kFilter, 0, rows_256(20011)},
        Setting{700, 400, 5003, GradMode::kFilterHidden, 0, rows_256(5003)},
        Setting{300, 264, 5003, GradMode::kFilter, 12}}) {
    SCOPED_TRACE(c10::str(s.tokens, " ", s.dim, " ", s.vocab, " ", s.softcap));
    auto c = patterned_case(random_case({s.tokens}, s.dim, s.vocab));
    c.options.grad_mode(s.mode).filter_eps(1e-3).softcap(s.softcap).workspace_bytes(s.workspace);
    auto exact = c.as(at::kDouble);
    exact.options.implementation("reference");
    const auto out = c.run(), ref = exact.run();
    EXPECT_LE(rms_error(out.loss, ref.loss), 1e-5);
    EXPECT_LE(relative_to(out.dropped_mass, ref.dropped_mass), 4e-3);
    if (s.vocab > 1000) {
      EXPECT_GT(ref.dropped_mass.max().item<double>(), 1e-3);
    }
    out.loss.backward();
    ref.loss.backward();
    const auto hidden = exact.hidden.grad(), weight = exact.weight.grad();
    EXPECT_LE(relative_to(c.hidden.grad(), hidden), kPeaked * one_rounding(hidden) + 1e-6);
    EXPECT_LE(relative_to(c.weight.grad(), weight), 2.4 * one_rounding(weight) + 1e-6);
    const auto starved = [](const Tensor& gradient) { return gradient.eq(0).all(1); };
    EXPECT_TRUE(at::equal(starved(c.weight.grad()), starved(weight)));
    auto again = c.as(at::kBFloat16);
    again.run().loss.backward();
    EXPECT_TRUE(at::equal(again.hidden.grad(), c.hidden.grad()));
    EXPECT_TRUE(at::equal(again.weight.grad(), c.weight.grad()));
  }
}

// Of 64 MiB each; and without gradients.
TEST_P(CceFused, FilterReadsAWeightOf32BitsInSlabs) {
  auto c = patterned_case(random_case({400}, 512, 150001));
  c.weight = c.weight.detach().to(at::kFloat).requires_grad_();
  c.options.grad_mode(GradMode::kFilter).filter_eps(1e-4);
  auto exact = c.as(at::kDouble);
  exact.options.implementation("reference");
  const auto out = c.run(), ref = exact.run();
  EXPECT_LE(rms_error(out.loss, ref.loss), 1e-3);
  out.loss.backward();
  ref.loss.backward();
  EXPECT_LE(rms_error(c.weight.grad(), exact.weight.grad()), 6e-3);
  EXPECT_LE(rms_error(c.hidden.grad(), exact.hidden.grad()), 6e-3);
  const at::NoGradGuard guard;
  const auto alone = c.run();
  EXPECT_TRUE(at::equal(alone.loss, out.loss));
  EXPECT_TRUE(at::equal(alone.dropped_mass, out.dropped_mass));
}

// Of a step of full size: beside the gradients, what forward and backward take.
TEST_P(CceFused, MemoryOfAFullSizedStepIsBounded) {
  constexpr int64_t kTokens = 8192, kDim = 2304, kVocab = 256000, kMiB = 1 << 20;
  CceCase c;
  c.hidden = torch::randn({kTokens, kDim}, torch::device(device()).dtype(at::kBFloat16));
  c.weight = torch::randn({kVocab, kDim}, c.hidden.options()) / 48;
  c.hidden.requires_grad_();
  c.weight.requires_grad_();
  c.target = torch::randint(kVocab, {kTokens}, torch::device(device()).dtype(at::kLong));
  c.options.implementation("fused");
  const auto gradients = 2 * kDim * (kTokens + kVocab);
  const auto step = [&](Recompute recompute) {
    c.hidden.mutable_grad().reset();
    c.weight.mutable_grad().reset();
    c.options.recompute(recompute);
    const auto before = memory_use(device()).current;
    reset_peak_memory(device());
    const auto loss = c.run().loss;
    const auto forward = memory_use(device()).peak - before;
    loss.backward();
    return std::pair(forward, memory_use(device()).peak - before - gradients);
  };
  step(Recompute::kAlways);  // what libraries keep is theirs
  const auto [forward, again] = step(Recompute::kAlways);
  EXPECT_LE(forward, 4 * kMiB);
  EXPECT_GT(again, 100 * kMiB);  // the count itself works
  EXPECT_LE(again, 220 * kMiB);
  const auto [early, at_once] = step(Recompute::kNever);
  EXPECT_GT(early, gradients);
  EXPECT_LE(at_once, 2252 * kMiB);
}

}  // namespace

}  // namespace ounce
