// SPDX-License-Identifier: MIT
// The fused steps against the composed ones, which define them.
#include <gtest/gtest.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/layerwise.h>
#include <ounce/optim/trion.h>
#include <torch/torch.h>

#include <functional>
#include <memory>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/residuals.h"
#include "support/rms_error.h"
#include "support/state_tensors.h"

namespace ounce::optim {

namespace {

using at::Tensor;
using ounce::test::residuals_of;
using ounce::test::rms_error;
using Shapes = std::vector<std::vector<int64_t>>;

class FusedStep : public ounce::test::OnDevice {
 protected:
  Tensor scalar(double x) const { return torch::full({}, x, torch::device(device())); }
};
OUNCE_ON_GPU(FusedStep);

// Gradients whose columns, in the basis, differ by much and drift: no choice of them is close.
Tensor gradient_of(const Tensor& p, int64_t step) {
  torch::manual_seed(static_cast<uint64_t>(100 + step));
  auto g = torch::randn(p.sizes(), torch::device(p.device()));
  if (p.dim() == 2) {
    const auto n = std::min(p.size(0), p.size(1));
    const auto scale =
        (3 * torch::sin(torch::arange(n, g.options()) * 1.3 + 0.2 * static_cast<double>(step)))
            .exp();
    const auto basis = dct_basis(n, Basis::kDct2, g.options());
    g = p.size(0) >= p.size(1) ? torch::mm(g * scale, basis)
                               : torch::mm(basis.t(), scale.unsqueeze(1) * g);
  }
  return g.to(p.scalar_type());
}

// Gradients of 32 large columns in the basis, others at each step, so that what was held back does
// not decide the choice.
Tensor clear_gradient_of(const Tensor& p, int64_t step, Basis basis, bool right) {
  torch::manual_seed(static_cast<uint64_t>(200 + step));
  const auto g = torch::randn(p.sizes(), torch::device(p.device()));
  if (p.dim() != 2) return g.to(p.scalar_type());
  const auto n = p.size(right ? 1 : 0);
  auto scale = torch::full({n}, 0.3, g.options());
  scale.index_fill_(0, (torch::arange(32, scale.options().dtype(at::kLong)) * 17 + 5 * step) % n,
                    8);
  const auto b = dct_basis(n, basis, g.options());
  return (right ? torch::mm(g * scale, b) : torch::mm(b.t(), scale.unsqueeze(1) * g))
      .to(p.scalar_type());
}

// The same parameters under a fused and a composed optimizer.
template <class O, class Options>
struct Pair {
  std::vector<Tensor> fused, composed;
  std::unique_ptr<O> ours, reference;
  std::function<Tensor(const Tensor&, int64_t)> gradient = gradient_of;

  Pair(const Shapes& shapes, at::ScalarType type, at::Device device, Options options) {
    torch::manual_seed(1);
    for (const auto& shape : shapes) {
      const auto p = torch::randn(shape, torch::device(device)).to(type);
      fused.push_back(p.clone().requires_grad_());
      composed.push_back(p.clone().requires_grad_());
    }
    options.implementation = "fused";
    ours = std::make_unique<O>(fused, options);
    options.implementation = "reference";
    reference = std::make_unique<O>(composed, options);
  }
  void step(int64_t at, const StepControl& control) {
    for (size_t i = 0; i < fused.size(); ++i) {
      fused[i].mutable_grad() = gradient(fused[i], at);
      composed[i].mutable_grad() = fused[i].grad().clone();
    }
    ours->step(control);
    reference->step(control);
  }
  // Of what both have changed, the part that differs.
  double difference(const std::vector<Tensor>& before) const {
    double worst = 0;
    for (size_t i = 0; i < fused.size(); ++i) {
      const auto change = composed[i].detach().to(at::kDouble) - before[i].to(at::kDouble);
      worst = std::max(worst, rms_error(fused[i].detach().to(at::kDouble) - before[i], change));
    }
    return worst;
  }
  std::vector<Tensor> copies() const {
    std::vector<Tensor> all;
    for (const auto& p : composed) all.push_back(p.detach().clone());
    return all;
  }
};

std::vector<Tensor> state_of(NamedOptimizer& optimizer) {
  std::vector<Tensor> all;
  for (const auto& [name, tensor] : ounce::test::state_tensors(optimizer)) all.push_back(tensor);
  return all;
}

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16};

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

constexpr ResidualType kResidualTypes[] = {ResidualType::kFp32, ResidualType::kBf16,
                                           ResidualType::kInt8};
DctAdamWOptions feeding_back(ResidualType type) {
  DctAdamWOptions o;
  o.rank = 32;
  o.residual = Residual::kErrorFeedback;
  o.residual_type = type;
  return o;
}

TEST_P(FusedStep, ErrorFeedbackOfEveryKind) {
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
TEST_P(FusedStep, ErrorFeedbackLosesNothing) {
  const std::pair<ResidualType, double> types[] = {
      {ResidualType::kFp32, 5e-3}, {ResidualType::kBf16, 1e-2}, {ResidualType::kInt8, 3e-2}};
  const std::pair<std::vector<int64_t>, int64_t> shapes[] = {
      {{300, 128}, 32}, {{1026, 1024}, 32}, {{1041, 720}, 128}, {{300, 400}, 256}};
  for (const auto& [residual, bound] : types) {
    for (const auto& [shape, rank] : shapes) {
      SCOPED_TRACE(c10::str(static_cast<int>(residual), " ", shape));
      auto o = feeding_back(residual);
      o.rank = rank;
      Pair<DctAdamW, DctAdamWOptions> pair({shape}, at::kBFloat16, device(), o);
      const auto n = shape[1];
      auto sum = torch::zeros(shape, torch::dtype(at::kDouble).device(device()));
      auto applied = sum.clone();
      for (int64_t step = 0; step < 20; ++step) {
        const auto held = residuals_of(*pair.ours)[0];
        pair.step(step, {});
        const auto g = pair.fused[0].grad().to(at::kDouble);
        const auto indices = pair.ours->indices_of(pair.fused[0]);
        const auto a = dct_project(g + held, indices, Side::kRight, Basis::kDct2);
        applied += dct_backproject(a, indices, n, Side::kRight, Basis::kDct2);
        sum += g;
      }
      EXPECT_LE(rms_error(applied + residuals_of(*pair.ours)[0], sum), bound);
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

// Two gradients in one memory, and one in a layout of its own.
TEST_P(FusedStep, ConsumesNoGradientThatIsShared) {
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
TEST_P(FusedStep, StepsInsideBackwardAreTheSame) {
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

TEST_P(FusedStep, RefusesByNameWhatItDoesNotTake) {
  const auto refuses = [&](DctAdamWOptions o, const Tensor& p) {
    o.implementation = "fused";
    DctAdamW optimizer(std::vector<Tensor>{p}, o);
    p.mutable_grad() = torch::ones_like(p);
    EXPECT_OUNCE_ERROR(optimizer.step(), kUsage, "expected what the fused step takes");
  };
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return torch::randn({rows, columns}, torch::device(device())).requires_grad_();
  };
  DctAdamWOptions o;
  o.rank = 16;
  refuses(o, matrix(100, 52));           // rows of 8 n
  refuses(o, matrix(13 * 64, 13 * 16));  // a transform of 2, 3, 5, 7 and 11
  refuses(o, torch::randn({64, 64}).requires_grad_());
  o.rank = 20;
  refuses(o, matrix(64, 64));
  o.rank = 16;
  o.residual = Residual::kSign;
  refuses(o, matrix(64, 64));
  o.residual = Residual::kFira;
  refuses(o, matrix(64, 64));
  o.residual = Residual::kErrorFeedback;
  o.residual_type = ResidualType::kInt8;
  refuses(o, matrix(80, 72));  // rows of 16 n
}

}  // namespace

}  // namespace ounce::optim
