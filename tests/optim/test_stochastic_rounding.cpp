// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/galore.h>
#include <ounce/optim/stochastic_rounding.h>
#include <ounce/optim/trion.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <memory>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/state_tensors.h"

namespace ounce::optim {

namespace {

using at::Tensor;

class StochasticRounding : public ounce::test::OnDevice {
 protected:
  Tensor count(int64_t step) const {
    return torch::full({}, static_cast<double>(step), torch::device(device()));
  }
  Tensor all(double value, int64_t size) const {
    return torch::full({size}, value, torch::device(device()));
  }
};
OUNCE_ON_EACH_DEVICE(StochasticRounding);

double mean_of(const Tensor& x) { return x.to(at::kDouble).mean().item<double>(); }

TEST_P(StochasticRounding, IsRightOnAverage) {
  constexpr double kSpacing = 1. / 128;  // of bf16 from 1 to 2
  for (const double share : {0.01, 0.25, 0.5, 0.9}) {
    for (const double sign : {1., -1.}) {
      const auto x = all(sign * (1 + share * kSpacing), 200'000);
      const auto rounded = round_stochastically(x, count(3), 5);
      EXPECT_EQ(rounded.scalar_type(), at::kBFloat16);
      // Four standard deviations of the mean.
      EXPECT_NEAR(mean_of(rounded), mean_of(x),
                  4 * kSpacing * std::sqrt(share * (1 - share) / 200'000));
      EXPECT_EQ(std::get<0>(at::_unique(rounded.to(at::kFloat))).numel(), 2);
    }
  }
}

TEST_P(StochasticRounding, LeavesWhatNeedsNone) {
  const auto inf = std::numeric_limits<float>::infinity();
  const auto exact =
      torch::tensor({0.f, -0.f, 1.f, -3.f, 1e-38f, inf, -inf}, torch::device(device()))
          .to(at::kBFloat16);
  for (int64_t step = 0; step < 50; ++step) {
    EXPECT_TRUE(at::equal(round_stochastically(exact.to(at::kFloat), count(step), 0), exact));
  }
  EXPECT_TRUE(round_stochastically(all(std::nan(""), 9), count(0), 0).isnan().all().item<bool>());
  EXPECT_EQ(round_stochastically(all(1, 0), count(0), 0).numel(), 0);
}

TEST_P(StochasticRounding, IsTheSameEverywhereAndDiffersByStepAndSeed) {
  torch::manual_seed(1);
  const auto x = torch::randn({300, 70});
  const auto base = round_stochastically(x, torch::tensor(7.), 1);
  EXPECT_TRUE(at::equal(round_stochastically(x.to(device()), count(7), 1).cpu(), base));
  const auto differs = [&](const Tensor& other) { return mean_of(other.ne(base)); };
  // Two roundings of a value differ with odds 2 s (1 - s), a third on average.
  EXPECT_NEAR(differs(round_stochastically(x, torch::tensor(8.), 1)), 1. / 3, 0.02);
  EXPECT_NEAR(differs(round_stochastically(x, torch::tensor(7.), 2)), 1. / 3, 0.02);
  EXPECT_NEAR(differs(round_stochastically(x, torch::tensor(7.), 1 | uint64_t{1} << 40)), 1. / 3,
              0.02);
}

// 1000 updates of a thousandth of the spacing.
TEST_P(StochasticRounding, SmallUpdatesArrive) {
  const double update = 1e-3 / 128;
  auto nearest = all(1, 20'000).to(at::kBFloat16), ours = nearest.clone();
  for (int64_t step = 0; step < 1000; ++step) {
    ours = round_stochastically(ours.to(at::kFloat) + update, count(step), 0);
    nearest = (nearest.to(at::kFloat) + update).to(at::kBFloat16);
  }
  EXPECT_NEAR((mean_of(ours) - 1) / (1000 * update), 1, 0.03);
  EXPECT_EQ(mean_of(nearest), 1);
}

template <class O>
std::unique_ptr<NamedOptimizer> make(const Tensor& p, bool stochastic) {
  using Settings = std::conditional_t<
      std::is_same_v<O, DctAdamW>, DctAdamWOptions,
      std::conditional_t<std::is_same_v<O, GaLore>, GaLoreOptions,
                         std::conditional_t<std::is_same_v<O, Muon>, MuonOptions, TrionOptions>>>;
  Settings o;
  o.lr = 1e-3;
  o.weight_decay = 0;
  o.stochastic_rounding = stochastic;
  if constexpr (!std::is_same_v<O, Muon>) o.rank = 16;
  return std::make_unique<O>(NamedParameters{{"w", p}}, o);
}

// A bf16 weight moves as an fp32 one does, on average; rounded to nearest it stays.
template <class O>
void expect_bf16_follows(at::Device device) {
  const auto after = [&](at::ScalarType type, bool stochastic) {
    const auto ones = torch::ones({64, 64}, torch::device(device).dtype(type));
    const auto p = ones.clone().requires_grad_();
    const auto optimizer = make<O>(p, stochastic);
    for (int step = 0; step < 100; ++step) {
      p.mutable_grad() = ones;
      optimizer->step();
    }
    EXPECT_EQ(p.scalar_type(), type);
    return mean_of(p) - 1;
  };
  const double exact = after(at::kFloat, true);
  EXPECT_LT(exact, -1e-4);
  EXPECT_NEAR(after(at::kBFloat16, true) / exact, 1, 0.15);
  EXPECT_EQ(after(at::kBFloat16, false), 0);
}

TEST_P(StochasticRounding, OptimizersMoveBf16Weights) {
  expect_bf16_follows<DctAdamW>(device());
  expect_bf16_follows<GaLore>(device());
  expect_bf16_follows<Trion>(device());
  expect_bf16_follows<Muon>(device());
}

// bf16 moments, whose changes of a thousandth would all be lost, become what fp32 ones do.
TEST_P(StochasticRounding, MomentsOf16BitsFollow) {
  const auto second_moment = [&](at::ScalarType state) {
    const auto p = torch::zeros({40, 500}, torch::device(device())).requires_grad_();
    AdamWOptions o;
    o.lr = 1e-4;
    o.beta2 = 0.999;
    o.state_dtype = state;
    FusedAdamW optimizer(NamedParameters{{"w", p}}, o);
    for (int step = 0; step < 1000; ++step) {
      p.mutable_grad() = torch::ones_like(p);
      optimizer.step();
    }
    EXPECT_EQ(optimizer.state_bytes(), 2 * p.numel() * (state == at::kFloat ? 4 : 2) + 4);
    const auto found = ounce::test::state_tensor(optimizer, "exp_avg_sq");
    EXPECT_EQ(found.scalar_type(), state);
    return mean_of(found);
  };
  const double exact = second_moment(at::kFloat);
  EXPECT_NEAR(exact, 1 - std::pow(0.999, 1000), 1e-3);
  EXPECT_NEAR(second_moment(at::kBFloat16), exact, 0.01);
}

TEST(StochasticRoundingRefuses, Fp16) {
  const auto p = torch::zeros({64, 64}, at::kHalf).requires_grad_();
  for (const auto& call : {+[](const Tensor& w) { make<DctAdamW>(w, true); },
                           +[](const Tensor& w) { make<GaLore>(w, true); },
                           +[](const Tensor& w) { make<Trion>(w, true); }}) {
    EXPECT_OUNCE_ERROR(call(p), kUsage, "'w' is Half: expected fp32, fp64 or bf16 parameters");
  }
}

}  // namespace

}  // namespace ounce::optim
