// SPDX-License-Identifier: MIT
// The fused steps against the composed ones, which define them.
#include <gtest/gtest.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/trion.h>
#include <torch/torch.h>

#include "optim/fused_step_case.h"
#include "support/expect_error.h"
#include "support/said.h"

namespace ounce::optim {

namespace {

class FusedStep : public FusedStepCase {};
OUNCE_ON_GPU(FusedStep);

TEST_P(FusedStep, AdamWOfAnyShapeAndType) {
  for (const auto type : kTypes) {
    for (const auto state : kTypes) {
      SCOPED_TRACE(c10::str(type, " ", state));
      DctAdamWOptions o;
      o.project = false;
      o.lr = 1e-2;
      o.state_dtype = state;
      Pair<DctAdamW, DctAdamWOptions> pair({{3}, {8192 * 2 + 5}, {70, 33}, {1, 1}}, type, device(),
                                           o);
      const auto before = pair.copies();
      for (int64_t i = 0; i < 6; ++i) pair.step(i, {scalar(1e-2), scalar(0.5), scalar(i == 3)});
      // The same bits round, so bf16 parts only where fp32 was on the edge.
      EXPECT_LE(pair.difference(before), type == at::kFloat && state == at::kFloat ? 1e-5 : 2e-2);
      const auto ours = state_of(*pair.ours), theirs = state_of(*pair.reference);
      ASSERT_EQ(ours.size(), theirs.size());
      for (size_t i = 0; i < ours.size(); ++i) {
        EXPECT_LE(rms_error(ours[i], theirs[i]), state == at::kFloat ? 1e-6 : 1e-3);
      }
    }
  }
}

TEST_P(FusedStep, AdamWOf16BitsIsTheOneOfFusedAdamW) {
  AdamWOptions o;
  o.state_dtype = at::kBFloat16;
  Pair<FusedAdamW, AdamWOptions> pair({{300, 70}, {33}}, at::kBFloat16, device(), o);
  const auto before = pair.copies();
  for (int64_t i = 0; i < 4; ++i) pair.step(i, {});
  EXPECT_LE(pair.difference(before), 2e-2);
}

TEST_P(FusedStep, LowRankAdamWOfEveryOption) {
  const Shapes shapes = {{256, 128}, {256, 128}, {128, 256}, {320, 192}, {1000, 96}, {40}};
  const auto base = [] {
    DctAdamWOptions o;
    o.rank = 32;
    o.weight_decay = 0.1;
    o.groups = {{"*", Options::parse("weight_decay = 0.1", "test")}};
    return o;
  };
  std::vector<DctAdamWOptions> all(7, base());
  all[1].update_interval = 3;
  all[2].rotate = false;
  all[3].estimate_fresh_columns = false;
  all[4].norm = 1;
  all[5].rank = 48;
  all[5].state_dtype = at::kBFloat16;
  all[6].basis = Basis::kIdentity;
  all[6].side = Side::kRight;
  for (size_t i = 0; i < all.size(); ++i) {
    for (const auto type : kTypes) {
      SCOPED_TRACE(c10::str("case ", i, " ", type));
      Pair<DctAdamW, DctAdamWOptions> pair(shapes, type, device(), all[i]);
      const auto before = pair.copies();
      for (int64_t at = 0; at < 8; ++at) {
        pair.step(at, {scalar(1e-2), scalar(0.25), scalar(at == 5)});
      }
      // Products of 16-bit operands; of bf16 parameters, a rounding where they differ.
      EXPECT_LE(pair.difference(before), type == at::kFloat ? 3e-2 : 8e-2);
      for (size_t p = 0; p < pair.fused.size(); ++p) {
        const auto ours = pair.ours->indices_of(pair.fused[p]);
        if (!ours.defined()) continue;
        EXPECT_TRUE(at::equal(ours, pair.reference->indices_of(pair.composed[p])));
      }
    }
  }
}

template <class O, class Options>
void expect_skip_to_keep(Pair<O, Options> pair, const StepControl& skipped) {
  for (int64_t at = 0; at < 3; ++at) pair.step(at, {});
  std::vector<Tensor> before;
  for (const auto& t : state_of(*pair.ours)) before.push_back(t.clone());
  for (const auto& t : pair.fused) before.push_back(t.detach().clone());
  for (const auto& p : pair.fused) p.mutable_grad() = torch::full_like(p, NAN);
  pair.ours->step(skipped);
  auto after = state_of(*pair.ours);
  for (const auto& t : pair.fused) after.push_back(t.detach());
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(at::equal(before[i], after[i]));
}

TEST_P(FusedStep, SkippedStepsChangeNothing) {
  const Shapes shapes = {{256, 128}, {128, 384}, {1041, 1024}, {77}};
  const StepControl skipped = {scalar(1e-2), {}, scalar(1), /*consume_gradients=*/true};
  DctAdamWOptions plain;
  plain.rank = 32;
  const auto check = [&](const DctAdamWOptions& o) {
    expect_skip_to_keep(Pair<DctAdamW, DctAdamWOptions>(shapes, at::kBFloat16, device(), o),
                        skipped);
  };
  check(plain);
  for (const auto residual : kResidualTypes) check(feeding_back(residual));
  for (const auto state : kTypes) {
    TrionOptions o;
    o.rank = 32;
    o.state_dtype = state;
    expect_skip_to_keep(Pair<Trion, TrionOptions>(shapes, at::kBFloat16, device(), o), skipped);
  }
}

// Without a skip, what is not a number stays that, in weights, moments and residuals.
TEST_P(FusedStep, NanIsNotRoundedAway) {
  for (const auto residual : kResidualTypes) {
    for (const auto state : kTypes) {
      auto o = feeding_back(residual);
      o.state_dtype = state;
      Pair<DctAdamW, DctAdamWOptions> pair({{256, 128}, {1024, 1024}, {77}}, at::kBFloat16,
                                           device(), o);
      pair.step(0, {});
      for (const auto& p : pair.fused) p.mutable_grad() = torch::full_like(p, NAN);
      pair.ours->step();
      for (const auto& p : pair.fused) EXPECT_TRUE(p.isnan().all().item<bool>());
      for (const auto& e : residuals_of(*pair.ours)) EXPECT_TRUE(e.isnan().all().item<bool>());
    }
  }
}

// With gradients that may be consumed, too.
TEST_P(FusedStep, RepeatsBitForBit) {
  std::vector<DctAdamWOptions> all(1);
  for (const auto residual : kResidualTypes) all.push_back(feeding_back(residual));
  all.push_back(feeding_back(ResidualType::kInt8));
  all.back().update_interval = 2;
  for (auto& o : all) {
    o.rank = 64;
    o.state_dtype = at::kBFloat16;
    std::vector<std::vector<Tensor>> results;
    for (int run = 0; run < 3; ++run) {
      Pair<DctAdamW, DctAdamWOptions> pair({{512, 256}, {256, 704}, {1041, 1024}}, at::kBFloat16,
                                           device(), o);
      for (int64_t at = 0; at < 4; ++at) pair.step(at, {.consume_gradients = run == 2});
      auto state = state_of(*pair.ours);
      for (const auto& p : pair.fused) state.push_back(p.detach());
      results.push_back(state);
    }
    for (size_t i = 0; i < results[0].size(); ++i) {
      EXPECT_TRUE(at::equal(results[0][i], results[1][i]));
      EXPECT_TRUE(at::equal(results[0][i], results[2][i]));
    }
  }
}

TEST_P(FusedStep, TrionAndMuon) {
  const Shapes shapes = {{256, 128}, {256, 128}, {128, 256}, {1000, 96}, {1041, 1024}, {40}};
  TrionOptions o;
  o.rank = 32;
  o.seed = 3;
  for (const auto type : kTypes) {
    for (const auto state : kTypes) {
      for (const bool full : {false, true}) {
        SCOPED_TRACE(c10::str(type, " ", state, full ? " full" : " low"));
        o.rank = full ? 0 : 32;
        o.nesterov = full;
        o.state_dtype = state;
        o.iteration = Iteration::kPolarExpress;
        o.statistics = true;
        Pair<Trion, TrionOptions> pair(shapes, type, device(), o);
        const auto before = pair.copies();
        for (int64_t at = 0; at < 6; ++at) {
          pair.step(at, {scalar(0.3), scalar(0.25), scalar(at == 4)});
        }
        const auto ours = state_of(*pair.ours), theirs = state_of(*pair.reference);
        for (size_t i = 0; i < ours.size(); ++i) EXPECT_LE(rms_error(ours[i], theirs[i]), 2e-2);
        const auto measured = pair.ours->statistics(), wanted = pair.reference->statistics();
        ASSERT_EQ(measured.size(), wanted.size());
        for (size_t i = 0; i < wanted.size(); ++i) {
          EXPECT_LE(rms_error(measured[i].second, wanted[i].second), 1e-2) << wanted[i].first;
        }
        // What is orthonormalised in fp16, of matrices that are far from it.
        EXPECT_LE(pair.difference(before), type == at::kFloat ? 8e-2 : 0.15);
      }
    }
  }
}

// Each head on its own; the first has no gradient of its own size, and all one count.
TEST_P(FusedStep, TrionOfAFusedProjection) {
  TrionOptions o;
  o.rank = 16;
  o.split = {64, 32, 32};
  Pair<Trion, TrionOptions> pair({{128, 64}}, at::kFloat, device(), o);
  const auto before = pair.copies();
  for (int64_t at = 0; at < 4; ++at) pair.step(at, {});
  EXPECT_LE(pair.difference(before), 8e-2);
}

// At construction: what it would have to wait for a gradient to see is that gradient's dtype.
TEST_P(FusedStep, RefusesByNameWhatItDoesNotTake) {
  const auto refuses = [&](DctAdamWOptions o, const Tensor& p, const char* why) {
    o.implementation = "fused";
    EXPECT_OUNCE_ERROR(DctAdamW(NamedParameters{{"w", p}}, o), kUsage,
                       c10::str("[dct_adamw] 'w' ", p.scalar_type(), p.sizes(),
                                ": expected what the fused path takes, got ", why));
  };
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return torch::randn({rows, columns}, torch::device(device())).requires_grad_();
  };
  DctAdamWOptions o;
  o.rank = 16;
  refuses(o, matrix(100, 52), "sides 100 and 52, which are not 8 n");
  refuses(o, matrix(13 * 64, 13 * 16), "a projected side of 208");
  refuses(o, torch::randn({64, 64}).requires_grad_(), "tensors on cpu");
  o.basis = Basis::kHadamard;
  refuses(o, matrix(64, 64), "basis hadamard");
  o.basis = Basis::kDct2;
  o.rank = 20;
  refuses(o, matrix(64, 64), "rank 20");
  o.rank = 16;
  o.residual = Residual::kSign;
  refuses(o, matrix(64, 64), "residual = sign");
  o.residual = Residual::kFira;
  refuses(o, matrix(64, 64), "residual = fira");
  o.residual = Residual::kErrorFeedback;
  o.residual_type = ResidualType::kInt8;
  refuses(o, matrix(80, 72), "int8 residuals of rows of 72");
}

// Whoever has the GPU and does not ask for the composed step is told that it is what runs.
TEST_P(FusedStep, SaysWhatAutoComposes) {
  const auto p = torch::randn({64, 64}, torch::device(device())).requires_grad_();
  DctAdamWOptions o;
  o.rank = 24;
  ounce::test::Said said;
  {
    const c10::WarningUtils::WarningHandlerGuard guard(&said);
    for (int i = 0; i < 2; ++i) DctAdamW(std::vector<Tensor>{p}, o);
  }
  ASSERT_EQ(said.all.size(), 1);
  EXPECT_NE(said.all[0].find("got rank 24"), std::string::npos) << said.all[0];
  setenv("OUNCE_STRICT", "1", 1);
  EXPECT_OUNCE_ERROR(DctAdamW(std::vector<Tensor>{p}, o), kUsage, "got rank 24");
  o.implementation = "reference";
  const DctAdamW asked_for(std::vector<Tensor>{p}, o);
  unsetenv("OUNCE_STRICT");
}

}  // namespace

}  // namespace ounce::optim
