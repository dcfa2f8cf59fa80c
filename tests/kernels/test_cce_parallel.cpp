// SPDX-License-Identifier: MIT
// The classifier's rows on several ranks, against the composed formula on all of them.
#include <c10/core/AutogradState.h>
#include <gtest/gtest.h>
#include <ounce/kernels/cce/cce_parallel.h>
#include <torch/torch.h>

#include <cmath>
#include <mutex>

#include "kernels/cce_composed.h"
#include "support/devices.h"
#include "support/expect_error.h"
#include "support/local_process_group.h"
#include "support/rms_error.h"

namespace ounce {

namespace {

using at::Tensor;
using cce_test::CceCase;
using cce_test::composed;
using cce_test::random_case;
using test::rms_error;
using testing::run_ranks;

class CceParallel : public test::OnDevice {};
OUNCE_ON_EACH_DEVICE(CceParallel);

struct OfRank {
  LinearCrossEntropyOutput out;
  Tensor hidden, weight, bias;  // gradients
};

// backward: of the output.
std::vector<OfRank> on_ranks(const CceCase& c, const std::vector<int64_t>& rows,
                             const std::function<void(const LinearCrossEntropyOutput&)>& backward) {
  std::vector<OfRank> all(rows.size());
  run_ranks(static_cast<int>(rows.size()), [&](const auto& group) {
    // One thread of the engine serves all of a GPU's backward nodes: a rank would wait for itself.
    c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
    const auto rank = static_cast<size_t>(group->getRank());
    int64_t first = 0;
    for (size_t i = 0; i < rank; ++i) first += rows[i];
    auto own = c.as(c.hidden.scalar_type());
    own.weight = c.weight.detach().narrow(0, first, rows[rank]).clone().requires_grad_();
    std::optional<Tensor> bias;
    if (c.bias.defined()) {
      bias = c.bias.detach().narrow(0, first, rows[rank]).clone().requires_grad_();
    }
    const auto token_weight =
        c.token_weight.defined() ? std::optional<Tensor>(c.token_weight) : std::nullopt;
    const auto out = vocab_parallel_linear_cross_entropy(
        own.hidden, own.weight, own.target, {group, first}, bias, token_weight, own.options);
    backward(out);
    all[rank] = {out, own.hidden.grad(), own.weight.grad(), bias ? bias->grad() : Tensor()};
  });
  return all;
}

Tensor joined(const std::vector<OfRank>& all, Tensor OfRank::*part) {
  std::vector<Tensor> parts;
  for (const auto& of_rank : all) parts.push_back(of_rank.*part);
  return at::cat(parts);
}

const std::vector<std::vector<int64_t>> kShards = {
    {300}, {150, 150}, {1, 200, 99}, {75, 75, 75, 75}};

TEST_P(CceParallel, EqualsTheWholeClassifier) {
  auto base = random_case({3, 17}, 16, 300, false).on(device());
  std::vector<CceCase> cases(6, base);
  cases[1].options.z_loss(0.05).softcap(3).logit_scale(0.8);
  cases[2].options.shift(2).reduction(Reduction::kSum);
  cases[3].bias = torch::randn({300}, torch::device(device()).dtype(at::kDouble));
  cases[4].token_weight = torch::rand({3, 17}, torch::device(device()).dtype(at::kDouble));
  cases[4].options.reduction(Reduction::kNone).z_loss(0.1);
  cases[5].options.ignore_index(0).workspace_bytes(0);
  cases[5].target = cases[5].target.masked_fill(cases[5].target == -100, 0);
  for (size_t i = 0; i < cases.size(); ++i) {
    for (const auto& rows : kShards) {
      SCOPED_TRACE(c10::str("case ", i, ", ", rows.size(), " ranks"));
      auto c = cases[i].as(at::kDouble), exact = c.as(at::kDouble);
      c.options.return_lse(true).return_z_loss(true);
      const auto ref = composed(exact);
      const auto upstream = torch::rand_like(ref.loss), of_lse = torch::rand_like(ref.lse);
      const auto backward = [&](const auto& out) {
        ((out.loss * upstream).sum() + (out.lse * of_lse).sum()).backward();
      };
      backward(ref);
      const auto all = on_ranks(c, rows, backward);
      for (const auto& own : all) {
        EXPECT_LE(rms_error(own.out.loss, ref.loss), 1e-13);
        EXPECT_LE(rms_error(own.out.lse, ref.lse), 1e-13);
        EXPECT_LE(rms_error(own.out.z_loss, ref.z_loss), 1e-13);
        EXPECT_LE(rms_error(own.hidden, exact.hidden.grad()), 1e-12);
        EXPECT_TRUE(at::equal(own.hidden, all[0].hidden));
        EXPECT_TRUE(at::equal(own.out.loss, all[0].out.loss));
      }
      EXPECT_LE(rms_error(joined(all, &OfRank::weight), exact.weight.grad()), 1e-12);
      if (c.bias.defined()) {
        EXPECT_LE(rms_error(joined(all, &OfRank::bias), exact.bias.grad()), 1e-12);
      }
    }
  }
}

// bf16 takes the fused path where there is one. One rounding of the sum, not one of each rank's.
TEST_P(CceParallel, RoundsTheHiddenGradientOnce) {
  auto c = random_case({256}, 64, 4000, false).on(device()).as(at::kBFloat16);
  auto exact = c.as(at::kDouble);
  const auto ref = composed(exact);
  ref.loss.backward();
  const auto all = on_ranks(c, {1000, 1000, 2000}, [](const auto& out) { out.loss.backward(); });
  const auto hidden = exact.hidden.grad(), weight = exact.weight.grad();
  const auto one = [](const Tensor& t) { return rms_error(t.to(at::kBFloat16), t); };
  EXPECT_LE(rms_error(all[0].out.loss, ref.loss), 1e-5);
  EXPECT_LE(rms_error(all[0].hidden, hidden), 1.2 * one(hidden));
  EXPECT_LE(rms_error(joined(all, &OfRank::weight), weight), 2 * one(weight));
}

// A target's logit far over all others, on its rank and elsewhere.
TEST_P(CceParallel, ALossNearZeroAndOneFarAwayKeepTheirPrecision) {
  for (const double spread : {15.0, -30.0}) {
    auto c = random_case({64}, 64, 300, false).on(device()).as(at::kDouble);
    c.target.masked_fill_(c.target == -100, 7);
    c.hidden = (c.hidden.detach() * 0.1 + c.weight.detach().index_select(0, c.target) * spread);
    c.options.reduction(Reduction::kNone);
    c = c.as(at::kFloat);
    auto exact = c.as(at::kDouble);
    const auto ref = composed(exact);
    ref.loss.sum().backward();
    const auto all =
        on_ranks(c, {100, 150, 50}, [](const auto& out) { out.loss.sum().backward(); });
    EXPECT_LE(((all[1].out.loss - ref.loss) / ref.loss).abs().max().item<double>(), 1e-4);
    EXPECT_LE(rms_error(all[1].hidden, exact.hidden.grad()), 1e-4);
  }
}

TEST(CceParallelRefuses, ByName) {
  const auto run = [](const std::function<void(CceCase&)>& change, bool with_group = true) {
    auto c = random_case({4}, 8, 20, false).as(at::kFloat);
    change(c);
    run_ranks(2, [&](const auto& group) {
      const auto rows = c.weight.narrow(0, 10 * group->getRank(), 10);
      vocab_parallel_linear_cross_entropy(c.hidden, rows, c.target,
                                          {with_group ? group : nullptr, 10 * group->getRank()}, {},
                                          {}, c.options);
    });
  };
  EXPECT_OUNCE_ERROR(run([](CceCase&) {}, false), kUsage, "a process group");
  EXPECT_OUNCE_ERROR(run([](CceCase& c) { c.options.label_smoothing(0.1); }), kUsage,
                     "label_smoothing = 0, got 0.1");
  EXPECT_OUNCE_ERROR(run([](CceCase& c) { c.options.grad_mode(GradMode::kFilter); }), kUsage,
                     "no filter");
  EXPECT_OUNCE_ERROR(run([](CceCase& c) { c.options.recompute(Recompute::kNever); }), kUsage,
                     "got never");
  EXPECT_OUNCE_ERROR(run([](CceCase& c) {
                       c.options.validate_targets(true);
                       c.target[1] = 20;
                     }),
                     kUsage, "got 1 others");
}

TEST(CceParallelTargets, OneThatNoRankHasMakesItsLossNaN) {
  auto c = random_case({4}, 8, 20, false).as(at::kFloat);
  c.target.fill_(3);
  c.target[1] = 20;
  c.options.reduction(Reduction::kNone);
  const auto all = on_ranks(c, {10, 10}, [](const auto& out) { out.loss.sum().backward(); });
  const auto bad = torch::arange(4) == 1;
  for (const auto& own : all) {
    EXPECT_TRUE(at::equal(own.out.loss.isnan(), bad));
    EXPECT_TRUE(at::equal(own.hidden.isnan().all(1), bad));
    EXPECT_TRUE(own.weight.isnan().all().item<bool>());
  }
}

}  // namespace

}  // namespace ounce
