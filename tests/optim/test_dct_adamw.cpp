// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/registry.h>
#include <ounce/optim/dct_adamw.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/registered_optimizers.h"
#include "support/residuals.h"
#include "support/rms_error.h"
#include "support/said.h"
#include "support/state_tensors.h"

namespace ounce::optim {

namespace {

using at::Tensor;
using ounce::test::rms_error;
using ounce::test::state_tensor;

class DctAdamWOnDevice : public ounce::test::OnDevice {
 protected:
  Tensor parameter(at::IntArrayRef sizes, at::ScalarType type = at::kDouble) const {
    return torch::randn(sizes, torch::device(device()).dtype(type)).requires_grad_();
  }
};
OUNCE_ON_EACH_DEVICE(DctAdamWOnDevice);

Tensor copy_of(const Tensor& p) { return p.detach().clone().requires_grad_(); }

// The gradient of a step, the same whatever asks for it; its columns differ and drift.
Tensor gradient_of(const Tensor& p, int64_t step) {
  torch::manual_seed(static_cast<uint64_t>(100 + step));
  auto g = torch::randn(p.sizes(), at::kDouble);
  if (p.dim() == 2) {
    g *= (2 * torch::sin(torch::arange(p.size(1), at::kDouble) + 0.3 * static_cast<double>(step)))
             .exp();
  }
  return g.to(p.options().requires_grad(false));
}

DctAdamWOptions small(int64_t rank) {
  DctAdamWOptions o;
  o.lr = 1e-2;
  o.rank = rank;
  o.min_dim = 1;
  o.groups = {{"*", Options::parse("weight_decay = 0.05", "test")}};
  return o;
}

// With all columns of the plain basis there is nothing that AdamW does not do.
TEST_P(DctAdamWOnDevice, FullRankOfThePlainBasisIsAdamW) {
  const std::vector<Tensor> ours = {parameter({12, 8}), parameter({8, 12}), parameter({5})};
  std::vector<Tensor> theirs;
  for (const auto& p : ours) theirs.push_back(copy_of(p));
  auto o = small(8);
  o.basis = Basis::kIdentity;
  DctAdamW optimizer(ours, o);
  torch::optim::AdamW reference(
      theirs, torch::optim::AdamWOptions(1e-2).betas({0.9, 0.999}).weight_decay(0.05));
  for (int64_t step = 0; step < 100; ++step) {
    for (size_t i = 0; i < ours.size(); ++i) {
      ours[i].mutable_grad() = gradient_of(ours[i], step);
      theirs[i].mutable_grad() = gradient_of(ours[i], step);
    }
    optimizer.step();
    reference.step();
  }
  for (size_t i = 0; i < ours.size(); ++i) EXPECT_LE(rms_error(ours[i], theirs[i]), 1e-12);
  EXPECT_TRUE(optimizer.indices_of(ours[0]).defined());
  EXPECT_FALSE(optimizer.indices_of(ours[2]).defined());
}

// The definition with dense matrices: Q from the basis, rotation by Q_old^T Q_new.
struct Dense {
  DctAdamWOptions o;
  Tensor p, m, v, q, e;
  int64_t t = 0;
  double norm = 0;

  void step(const Tensor& gradient) {
    const auto basis = dct_basis(p.size(1), o.basis, p.options().requires_grad(false));
    const auto g = e.defined() && o.residual == Residual::kErrorFeedback ? gradient + e : gradient;
    if (t % o.update_interval == 0) {
      const auto norms = g.matmul(basis.t()).norm(2, {0});
      const auto chosen = std::get<0>(std::get<1>(norms.topk(o.rank)).sort());
      const auto q_new = basis.index_select(0, chosen).t();
      const auto a = g.matmul(q_new);
      if (t == 0) {
        m = torch::zeros_like(a);
        v = torch::zeros_like(a);
      } else {
        const auto rotation = q.t().matmul(q_new).round();
        const auto kept = rotation.sum(0);
        m = m.matmul(rotation);
        v = v.matmul(rotation);
        if (o.estimate_fresh_columns) {
          v = v + (1 - kept) * a.square().mean(0) * (1 - std::pow(o.beta2, t));
        }
      }
      q = q_new;
    }
    ++t;
    const auto a = g.matmul(q);
    e = g - a.matmul(q.t());
    m = o.beta1 * m + (1 - o.beta1) * a;
    v = o.beta2 * v + (1 - o.beta2) * a.square();
    const auto u =
        (m / (1 - std::pow(o.beta1, t))) / ((v / (1 - std::pow(o.beta2, t))).sqrt() + o.eps);
    auto direction = u.matmul(q.t());
    if (o.residual == Residual::kSign) direction += o.residual_scale * e.sign();
    if (o.residual == Residual::kFira) {
      auto scaled = e * (u.norm(2, {1}, true) / a.norm(2, {1}, true));
      const double now = scaled.norm().item<double>();
      if (norm > 0 && now > 1.01 * norm) scaled *= 1.01 * norm / now;
      norm = scaled.norm().item<double>();
      direction += scaled;
    }
    p = p * (1 - o.lr * 0.05) - o.lr * direction;
  }
};

TEST_P(DctAdamWOnDevice, EqualsItsDefinition) {
  for (const auto residual :
       {Residual::kNone, Residual::kErrorFeedback, Residual::kSign, Residual::kFira}) {
    for (const int64_t interval : {1, 3}) {
      for (const bool estimate : {true, false}) {
        SCOPED_TRACE(c10::str(static_cast<int>(residual), " ", interval, " ", estimate));
        auto o = small(5);
        o.residual = residual;
        o.residual_scale = 0.3;
        o.update_interval = interval;
        o.estimate_fresh_columns = estimate;
        const auto p = parameter({20, 16}), flipped = p.detach().t().clone().requires_grad_();
        Dense dense{.o = o, .p = p.detach().clone()};
        DctAdamW optimizer({p}, o), transposed({flipped}, o);
        for (int64_t step = 0; step < 20; ++step) {
          const auto g = gradient_of(p, step);
          p.mutable_grad() = g;
          flipped.mutable_grad() = g.t().clone();
          optimizer.step();
          transposed.step();
          dense.step(g);
        }
        EXPECT_LE(rms_error(p, dense.p), 1e-11);
        // A step on W with G is one on W^T with G^T.
        EXPECT_LE(rms_error(flipped.t(), p), 1e-12);
      }
    }
  }
}

Tensor residual_of(NamedOptimizer& optimizer) { return ounce::test::residuals_of(optimizer).at(0); }

// What was applied and what is still held back are all gradients so far, but for what rounding
// changed.
TEST_P(DctAdamWOnDevice, ErrorFeedbackLosesNothing) {
  const std::pair<ResidualType, double> types[] = {
      {ResidualType::kFp32, 1e-12}, {ResidualType::kBf16, 0.02}, {ResidualType::kInt8, 0.05}};
  for (const auto& [type, bound] : types) {
    auto o = small(3);
    o.residual = Residual::kErrorFeedback;
    o.residual_type = type;
    const auto p = parameter({24, 12});
    DctAdamW optimizer({p}, o);
    auto sum = torch::zeros_like(p.detach()), applied = sum.clone();
    for (int64_t step = 0; step < 50; ++step) {
      const auto g = gradient_of(p, step), with = g + residual_of(optimizer);
      p.mutable_grad() = g.clone();
      optimizer.step();
      const auto indices = optimizer.indices_of(p);
      const auto a = dct_project(with, indices, Side::kRight, Basis::kDct2);
      applied += dct_backproject(a, indices, 12, Side::kRight, Basis::kDct2);
      sum += g;
      EXPECT_LE(rms_error(applied + residual_of(optimizer), sum), bound);
    }
  }
}

// Of rows that are no whole number of blocks; one block is 0.
TEST_P(DctAdamWOnDevice, ErrorFeedbackInFewerBits) {
  std::vector<Tensor> residuals;
  std::vector<int64_t> bytes;
  Tensor scales;
  for (const auto type : {ResidualType::kFp32, ResidualType::kBf16, ResidualType::kInt8}) {
    auto o = small(3);
    o.basis = Basis::kIdentity;
    o.residual = Residual::kErrorFeedback;
    o.residual_type = type;
    const auto p = parameter({24, 300}, at::kFloat);
    DctAdamW optimizer({p}, o);
    torch::manual_seed(5);
    p.mutable_grad() = torch::randn({24, 300}).to(device());
    p.mutable_grad().select(0, 7).narrow(0, 0, 128).zero_();
    optimizer.step();
    residuals.push_back(residual_of(optimizer));
    bytes.push_back(optimizer.state_bytes());
    scales = state_tensor(optimizer, "residual_scales");
  }
  EXPECT_EQ(bytes[0] - bytes[1], 24 * 300 * 2);
  EXPECT_EQ(bytes[0] - bytes[2], 24 * 300 * 3 - 24 * 3 * 4);
  EXPECT_LE(rms_error(residuals[1], residuals[0]), 4e-3);
  const auto off = (residuals[2] - residuals[0]).abs();
  const auto half = scales.to(at::kDouble).repeat_interleave(128, 1).narrow(1, 0, 300) / 2;
  EXPECT_TRUE((off <= half * (1 + 1e-6)).all().item<bool>());
  EXPECT_EQ(residuals[2].select(0, 7).narrow(0, 0, 128).abs().max().item<double>(), 0);
}

TEST_P(DctAdamWOnDevice, FreshColumnsDoNotLeap) {
  // Noise without a subspace: nearly all columns are new at each step.
  const auto rms_update = [&](bool estimate) {
    auto o = small(8);
    o.groups = {{"*", Options::parse("weight_decay = 0.0", "test")}};
    o.estimate_fresh_columns = estimate;
    const auto p = parameter({256, 256});
    DctAdamW optimizer({p}, o);
    Tensor before;
    for (int64_t step = 0; step < 60; ++step) {
      before = p.detach().clone();
      torch::manual_seed(static_cast<uint64_t>(step));
      p.mutable_grad() = torch::randn({256, 256}, at::kDouble).to(p.device());
      optimizer.step();
    }
    // Of the projected entries, in units of the learning rate.
    return ((p.detach() - before).square().sum() / (256 * 8)).sqrt().item<double>() / o.lr;
  };
  EXPECT_LT(rms_update(true), 0.25);
  EXPECT_GT(rms_update(false), 0.7);
}

TEST_P(DctAdamWOnDevice, SavedStateGoesOnBitForBit) {
  for (const auto type : {at::kFloat, at::kDouble}) {
    auto o = small(4);
    o.residual = Residual::kErrorFeedback;
    o.update_interval = 3;
    const std::vector<Tensor> straight = {parameter({16, 9}, type), parameter({7}, type)};
    std::vector<Tensor> resumed;
    DctAdamW first(straight, o);
    const auto step = [&](DctAdamW& optimizer, const std::vector<Tensor>& parameters, int64_t i) {
      for (const auto& p : parameters) p.mutable_grad() = gradient_of(p, i);
      optimizer.step();
    };
    for (int64_t i = 0; i < 10; ++i) step(first, straight, i);
    std::stringstream stream;
    torch::save(first, stream);
    for (const auto& p : straight) resumed.push_back(copy_of(p));
    DctAdamW second(resumed, o);
    torch::load(second, stream);
    for (int64_t i = 10; i < 30; ++i) {
      step(first, straight, i);
      step(second, resumed, i);
    }
    for (size_t i = 0; i < straight.size(); ++i) {
      EXPECT_TRUE(at::equal(straight[i], resumed[i]));
    }
    std::stringstream again;
    torch::save(first, again);
    o.rank = 5;
    DctAdamW other({copy_of(straight[0]), copy_of(straight[1])}, o);
    EXPECT_OUNCE_ERROR(torch::load(other, again), kUsage, "0/exp_avg");
  }
}

TEST(DctAdamW, ParametersThatComeLaterAreNamed) {
  DctAdamW optimizer({{"table", torch::ones({4, 2}).requires_grad_()}}, small(1));
  optimizer.add_param_group({{torch::ones({1}).requires_grad_()}});
  EXPECT_OUNCE_ERROR(optimizer.step(), kUsage, "is not a parameter of this optimizer");
}

TEST_P(DctAdamWOnDevice, SkipsLeaveEveryBitAndScalesMultiply) {
  auto o = small(4);
  o.residual = Residual::kErrorFeedback;
  const auto p = parameter({16, 9}), scaled = copy_of(p);
  DctAdamW optimizer({p}, o), other({scaled}, o);
  const auto scalar = [&](double x) { return torch::full({}, x, torch::device(device())); };
  for (int64_t step = 0; step < 4; ++step) {
    const auto before = p.detach().clone();
    p.mutable_grad() = torch::full_like(p.detach(), std::numeric_limits<double>::quiet_NaN());
    optimizer.step({.lr = {}, .grad_scale = {}, .skip = scalar(1)});
    EXPECT_TRUE(at::equal(p, before));
    p.mutable_grad() = gradient_of(p, step);
    scaled.mutable_grad() = gradient_of(p, step) * 4;
    optimizer.step({.lr = scalar(1e-2), .grad_scale = {}, .skip = scalar(0)});
    other.step({.lr = {}, .grad_scale = scalar(0.25), .skip = {}});
  }
  EXPECT_LE(rms_error(p, scaled), 1e-6);  // the rate came in fp32
}

TEST_P(DctAdamWOnDevice, OddGradients) {
  auto o = small(2);
  const auto p = parameter({6, 4});
  const auto untouched = parameter({6, 4});
  DctAdamW optimizer({p, untouched}, o);
  const auto start = p.detach().clone(), other = untouched.detach().clone();
  p.mutable_grad() = torch::zeros_like(p.detach());
  optimizer.step();
  EXPECT_LE(rms_error(p, start * (1 - 1e-2 * 0.05)), 1e-14);
  EXPECT_TRUE(at::equal(untouched, other));
  // A constant is in the first vector, one column of the plain basis in itself.
  p.mutable_grad() = torch::ones_like(p.detach());
  optimizer.step();
  EXPECT_EQ(optimizer.indices_of(p)[0].item<int64_t>(), 0);
  EXPECT_TRUE(p.isfinite().all().item<bool>());
}

TEST_P(DctAdamWOnDevice, ProjectsWhatItsRuleSays) {
  DctAdamWOptions o;
  o.rank = 4;
  o.max_dim = 100;
  const std::vector<Tensor> parameters = {parameter({16, 8}), parameter({16, 7}),
                                          parameter({101, 8}), parameter({8}),
                                          parameter({8, 2, 2, 4})};
  const DctAdamW optimizer(parameters, o);
  const bool projected[] = {true, false, false, false, true};
  for (size_t i = 0; i < parameters.size(); ++i) {
    EXPECT_EQ(optimizer.indices_of(parameters[i]).defined(), projected[i]) << i;
  }
  // Moments of [16, 4] twice and [16, 4] twice, full ones of the rest, indices and steps.
  EXPECT_EQ(optimizer.state_bytes(),
            8 * 2 * (16 * 4 + 16 * 7 + 101 * 8 + 8 + 16 * 4) + 4 * (4 + 4) + 4 * 5);
  o.rank_fraction = 0.25;
  const DctAdamW shares(parameters, o);
  EXPECT_EQ(shares.indices_of(parameters[0]).size(0), 2);
  EXPECT_EQ(shares.indices_of(parameters[1]).size(0), 2);
}

TEST(DctAdamWRefuses, ByName) {
  const auto make = [](const std::function<void(DctAdamWOptions&)>& change,
                       at::ScalarType type = at::kFloat) {
    auto o = small(4);
    change(o);
    DctAdamW({torch::zeros({6, 10}, type).requires_grad_()}, o);
  };
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.rank = 7; }), kUsage,
                     "'0' [6, 10]: expected a rank of at most 6, got 7");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.rank = 0; }), kUsage, "rank");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.beta2 = 1; }), kUsage, "below 1");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.lr = -1; }), kUsage, "expected lr >= 0, got -1");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.norm = 3; }), kUsage, "norm = 1 or 2, got 3");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.basis = Basis::kHadamard; }), kUsage,
                     "'0' [6, 10]: expected a power of two for a hadamard basis, got 6");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.residual_scale = -1; }), kUsage, "residual_scale");
  EXPECT_OUNCE_ERROR(make([](auto&) {}, at::kHalf), kUsage, "dct_adamw");
}

// Who asks for a rank that no matrix has room for hears of it; who asks for AdamW does not.
TEST(DctAdamWWarns, WhereNothingIsProjected) {
  const auto said_by = [](const DctAdamWOptions& o, std::vector<int64_t> sizes) {
    ounce::test::Said said;
    const c10::WarningUtils::WarningHandlerGuard guard(&said);
    DctAdamW(std::vector<Tensor>{torch::randn(sizes).requires_grad_()}, o);
    return said.all;
  };
  DctAdamWOptions o;
  ASSERT_EQ(said_by(o, {64, 511}).size(), 1);
  EXPECT_NE(said_by(o, {64, 511})[0].find("a smaller side of at least 512"), std::string::npos);
  EXPECT_TRUE(said_by(o, {512, 512}).empty());
  EXPECT_TRUE(said_by(o, {64}).empty());
  o.project = false;
  EXPECT_TRUE(said_by(o, {64, 511}).empty());
}

TEST(DctAdamWRegistry, MakesItFromItsKeys) {
  ounce::test::register_optimizers_once();
  const auto p = torch::randn({16, 8}).requires_grad_();
  const auto options = Options::parse(
      "name = \"dct_adamw\"\nrank = 3\nlr = 0.01\nbasis = \"hadamard\"\nside = \"right\"", "test");
  const auto optimizer = registry<NamedOptimizer>().make(options, {.parameters = {{"w", p}}});
  p.mutable_grad() = torch::ones({16, 8});
  optimizer->step();
  EXPECT_EQ(optimizer->state_bytes(), 4 * 2 * 16 * 3 + 4 * 3 + 4);
}

TEST_P(DctAdamWOnDevice, StatisticsSayWhatTheColumnsHold) {
  auto o = small(2);
  o.basis = Basis::kIdentity;
  o.side = Side::kRight;
  o.statistics = true;
  const auto p = parameter({3, 4}, at::kFloat), q = parameter({5}, at::kFloat);
  DctAdamW optimizer({p, q}, o);
  EXPECT_TRUE(optimizer.statistics().empty());
  const auto step = [&](const std::vector<float>& columns) {
    p.mutable_grad() = torch::tensor(columns, p.options().requires_grad(false)).expand({3, 4});
    q.mutable_grad() = torch::ones_like(q);
    optimizer.step({torch::full({}, 1e-3, torch::device(device())),
                    torch::full({}, 2.0, torch::device(device())),
                    {}});
    std::vector<double> values;
    for (const auto& [name, value] : optimizer.statistics()) values.push_back(value.item<double>());
    return values;
  };
  // It starts from columns 0 and 1; scaled by 2, what is left out is 2 sqrt(3 (1 + 4)).
  const auto first = step({1, 5, 2, 7});
  EXPECT_NEAR(first[0], 74. / 79, 1e-6);
  EXPECT_NEAR(first[1], 0.5, 1e-6);
  EXPECT_NEAR(first[2], 2 * std::sqrt(15.), 1e-5);
  const auto second = step({1, 5, 2, 7});
  EXPECT_EQ(second[1], 0);
  EXPECT_EQ(step({0, 0, 0, 0})[0], 0);
  EXPECT_EQ(optimizer.statistics()[2].first, "residual_norm");
}

}  // namespace

}  // namespace ounce::optim
