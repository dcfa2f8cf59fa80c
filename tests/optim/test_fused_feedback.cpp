// SPDX-License-Identifier: MIT
// Error feedback in fused steps against the composed ones, and against what it is for.
#include <gtest/gtest.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/layerwise.h>
#include <torch/torch.h>

#include <algorithm>

#include "optim/fused_step_case.h"

namespace ounce::optim {

namespace {

class FusedFeedback : public FusedStepCase {};
OUNCE_ON_GPU(FusedFeedback);

TEST_P(FusedFeedback, ErrorFeedbackOfEveryKind) {
  // Both sides; rows of 1024 have a ranking that adds, an odd number of them.
  const Shapes shapes = {{256, 128},  {256, 128}, {128, 256},   {1000, 96},
                         {512, 2048}, {192, 320}, {1041, 1024}, {40}};
  for (const auto residual : kResidualTypes) {
    std::vector<DctAdamWOptions> all(4, feeding_back(residual));
    all[1].update_interval = 3;
    all[1].state_dtype = at::kBFloat16;
    all[2].norm = 1;
    all[3].basis = Basis::kIdentity;
    all[3].side = Side::kRight;
    for (size_t i = 0; i < all.size(); ++i) {
      for (const auto type : kTypes) {
        SCOPED_TRACE(c10::str("residual ", static_cast<int>(residual), " case ", i, " ", type));
        all[i].statistics = true;
        Pair<DctAdamW, DctAdamWOptions> pair(shapes, type, device(), all[i]);
        pair.gradient = [&](const Tensor& p, int64_t step) {
          const bool right = all[i].side == Side::kRight || p.size(0) >= p.size(-1);
          return clear_gradient_of(p, step, all[i].basis, right);
        };
        const auto before = pair.copies();
        for (int64_t at = 0; at < 6; ++at) {
          pair.step(at, {scalar(1e-2), scalar(0.25), scalar(at == 4)});
        }
        EXPECT_LE(pair.difference(before), type == at::kFloat ? 5e-2 : 0.1);
        const auto ours = residuals_of(*pair.ours), theirs = residuals_of(*pair.reference);
        ASSERT_EQ(ours.size(), shapes.size() - 1);
        for (size_t p = 0; p < ours.size(); ++p) {
          // Small against the columns that were taken out, whose rounding is in it.
          EXPECT_LE(rms_error(ours[p], theirs[p]), 0.1) << shapes[p];
          EXPECT_TRUE(at::equal(pair.ours->indices_of(pair.fused[p]),
                                pair.reference->indices_of(pair.composed[p])));
        }
        const auto measured = pair.ours->statistics(), wanted = pair.reference->statistics();
        for (size_t s = 0; s < wanted.size(); ++s) {
          EXPECT_LE(rms_error(measured[s].second, wanted[s].second), 1e-2) << wanted[s].first;
        }
      }
    }
  }
}

// What was applied and what is still held back are all gradients so far.
TEST_P(FusedFeedback, ErrorFeedbackLosesNothing) {
  const std::pair<ResidualType, double> types[] = {
      {ResidualType::kFp32, 5e-3}, {ResidualType::kBf16, 1e-2}, {ResidualType::kInt8, 3e-2}};
  const std::pair<std::vector<int64_t>, int64_t> shapes[] = {
      {{300, 128}, 32}, {{1026, 1024}, 32}, {{1041, 720}, 128}, {{523, 512}, 256},
      {{128, 304}, 32}, {{720, 1040}, 128}, {{512, 17440}, 256}};  // two tiles a block
  for (const auto& [residual, bound] : types) {
    for (const auto& [shape, rank] : shapes) {
      SCOPED_TRACE(c10::str(static_cast<int>(residual), " ", shape));
      auto o = feeding_back(residual);
      o.rank = rank;
      Pair<DctAdamW, DctAdamWOptions> pair({shape}, at::kBFloat16, device(), o);
      const auto side = shape[0] >= shape[1] ? Side::kRight : Side::kLeft;
      const auto n = std::min(shape[0], shape[1]);
      auto sum = torch::zeros(shape, torch::dtype(at::kDouble).device(device()));
      auto applied = sum.clone();
      for (int64_t step = 0; step < 20; ++step) {
        const auto held = residuals_of(*pair.ours)[0];
        pair.step(step, {});
        const auto g = pair.fused[0].grad().to(at::kDouble);
        const auto indices = pair.ours->indices_of(pair.fused[0]);
        const auto a = dct_project(g + held, indices, side, Basis::kDct2);
        applied += dct_backproject(a, indices, n, side, Basis::kDct2);
        sum += g;
      }
      EXPECT_LE(rms_error(applied + residuals_of(*pair.ours)[0], sum), bound);
    }
  }
}

// Two gradients in one memory, and one in a layout of its own.
TEST_P(FusedFeedback, ConsumesNoGradientThatIsShared) {
  const auto stepped = [&](bool consumes) {
    torch::manual_seed(1);
    std::vector<Tensor> p;
    const auto options = torch::device(device()).dtype(at::kBFloat16);
    for (int i = 0; i < 3; ++i) p.push_back(torch::randn({256, 128}, options).requires_grad_());
    DctAdamW optimizer(p, feeding_back(ResidualType::kInt8));
    const auto shared = torch::randn({256, 128}, options);
    const auto turned = torch::randn({128, 256}, options).t();
    const auto before = turned.clone();
    for (int step = 0; step < 3; ++step) {
      p[0].mutable_grad() = shared;
      p[1].mutable_grad() = shared.view({256, 128});
      p[2].mutable_grad() = turned;
      optimizer.step({.consume_gradients = consumes});
    }
    EXPECT_TRUE(at::equal(turned, before));
    auto all = state_of(optimizer);
    for (const auto& x : p) all.push_back(x.detach());
    return all;
  };
  const auto kept = stepped(false), consumed = stepped(true);
  for (size_t i = 0; i < kept.size(); ++i) EXPECT_TRUE(at::equal(kept[i], consumed[i]));
}

// A gradient that two parameters get, of which a step inside backward could spoil the second's.
TEST_P(FusedFeedback, StepsInsideBackwardAreTheSame) {
  const auto stepped = [&](bool layerwise) {
    torch::manual_seed(1);
    const auto options = torch::device(device()).dtype(at::kBFloat16);
    const auto p = torch::randn({256, 128}, options).requires_grad_();
    const auto q = torch::randn({256, 128}, options).requires_grad_();
    const auto by = torch::randn({1, 256, 128}, options);
    auto o = feeding_back(ResidualType::kInt8);
    o.lr = 0.1;
    DctAdamW optimizer(std::vector<Tensor>{p, q}, o);
    for (int step = 0; step < 3; ++step) {
      const auto loss = [&] { return ((p * 1.0 + q.unsqueeze(0)) * by).sum(); };
      if (layerwise) {
        LayerwiseStepper stepper(optimizer);
        loss().backward();
      } else {
        optimizer.zero_grad();
        loss().backward();
        optimizer.step();
      }
    }
    return std::vector<Tensor>{p.detach(), q.detach()};
  };
  // Sums of columns add up otherwise where both go together.
  const auto after = stepped(false), inside = stepped(true);
  for (size_t i = 0; i < after.size(); ++i) EXPECT_LE(rms_error(inside[i], after[i]), 1e-2);
}

}  // namespace

}  // namespace ounce::optim
