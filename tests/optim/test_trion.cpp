// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/registry.h>
#include <ounce/optim/layerwise.h>
#include <ounce/optim/trion.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <sstream>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/registered_optimizers.h"
#include "support/rms_error.h"

namespace ounce::optim {

namespace {

using at::Tensor;
using ounce::test::rms_error;

class TrionOnDevice : public ounce::test::OnDevice {
 protected:
  Tensor parameter(at::IntArrayRef sizes, at::ScalarType type = at::kDouble) const {
    return torch::randn(sizes, torch::device(device()).dtype(type)).requires_grad_();
  }
};
OUNCE_ON_EACH_DEVICE(TrionOnDevice);

Tensor copy_of(const Tensor& p) { return p.detach().clone().requires_grad_(); }

Tensor gradient_of(const Tensor& p, int64_t step) {
  torch::manual_seed(static_cast<uint64_t>(100 + step));
  return torch::randn(p.sizes(), at::kDouble).to(p.options().requires_grad(false));
}

template <class O>
O decaying(O o = {}) {
  o.groups = {{"*", Options::parse("weight_decay = 0.05", "test")}};
  return o;
}

// a x + b x^3 + c x^5 of the singular values, five times: what Muon's iteration is, from the SVD.
Tensor orthonormal(const Tensor& x) {
  auto [u, s, vh] = at::linalg_svd(x, false);
  s = s / x.norm();
  for (int i = 0; i < 5; ++i) s = 3.4445 * s - 4.7750 * s.pow(3) + 2.0315 * s.pow(5);
  return at::matmul(u * s.unsqueeze(0), vh);
}

// Keller Jordan's step, by dense matrices.
struct DenseMuon {
  MuonOptions o;
  Tensor p, buffer;

  void step(const Tensor& g) {
    buffer = buffer.defined() ? o.momentum * buffer + g : g;
    const auto u = orthonormal(o.nesterov ? g + o.momentum * buffer : buffer);
    const auto r = static_cast<double>(p.size(0)), c = static_cast<double>(p.size(1));
    const double scale = o.scale == StepScale::kOriginal        ? std::sqrt(std::max(1., r / c))
                         : o.scale == StepScale::kMatchRmsAdamW ? 0.2 * std::sqrt(std::max(r, c))
                         : o.scale == StepScale::kSpectral      ? std::sqrt(r / c)
                                                                : 1;
    p = p * (1 - o.lr * 0.05) - o.lr * scale * u;
  }
};

TEST_P(TrionOnDevice, MuonEqualsItsDefinition) {
  for (const bool nesterov : {true, false}) {
    for (const auto scale : {StepScale::kOriginal, StepScale::kMatchRmsAdamW, StepScale::kSpectral,
                             StepScale::kNone}) {
      auto o = decaying<MuonOptions>();
      o.nesterov = nesterov;
      o.scale = scale;
      // Two of a shape, which go together, and each way round.
      const std::vector<Tensor> ours = {parameter({12, 8}), parameter({8, 12}), parameter({12, 8})};
      std::vector<DenseMuon> dense;
      for (const auto& p : ours) dense.push_back({o, p.detach().clone(), {}});
      Muon optimizer(ours, o);
      for (int64_t step = 0; step < 10; ++step) {
        for (size_t i = 0; i < ours.size(); ++i) {
          ours[i].mutable_grad() = gradient_of(ours[i], 10 * step + static_cast<int64_t>(i));
          dense[i].step(ours[i].grad());
        }
        optimizer.step();
      }
      for (size_t i = 0; i < ours.size(); ++i) EXPECT_LE(rms_error(ours[i], dense[i].p), 1e-10);
    }
  }
}

// With Q from the basis: b' = b Q, m = b - (1 - mu) b' Q^T, o = NS(b') Q^T. At full rank ours does
// not project, and the definition still does.
TEST_P(TrionOnDevice, EqualsItsDefinition) {
  for (const auto basis : {Basis::kDct2, Basis::kDct3, Basis::kIdentity, Basis::kRandom}) {
    for (const auto side : {Side::kAuto, Side::kLeft, Side::kRight}) {
      for (const int64_t rank : {1, 5, 8}) {
        for (const auto& sizes : {std::vector<int64_t>{12, 8}, {8, 12}, {9, 9}}) {
          const auto ours = parameter(sizes);
          auto p = ours.detach().clone(), m = at::zeros_like(p);
          auto o = decaying<TrionOptions>();
          o.basis = basis;
          o.side = side;
          o.rank = rank;
          o.scale = StepScale::kNone;
          Trion optimizer(std::vector<Tensor>{ours}, o);
          const bool right = side == Side::kAuto ? sizes[0] >= sizes[1] : side == Side::kRight;
          const auto n = sizes[right ? 1 : 0];
          for (int64_t step = 0; step < 5; ++step) {
            ours.mutable_grad() = gradient_of(ours, step);
            optimizer.step();
            const auto b = m + ours.grad(), by_columns = right ? b : b.t();
            const auto vectors = dct_basis(n, basis, b.options());  // a row each
            const auto size = at::matmul(by_columns, vectors.t()).norm(2, {0});
            // All of them span the space, whatever the side's length.
            const auto kept = rank == 8 && n != 8 && sizes[0] != sizes[1] ? n : rank;
            const auto q = vectors.index_select(0, std::get<1>(size.topk(kept))).t();
            const auto low = at::matmul(by_columns, q);
            const auto back = [&](const Tensor& x) {
              const auto full = at::matmul(x, q.t());
              return right ? full : full.t();
            };
            m = b - (1 - o.momentum) * back(low);
            p = p * (1 - o.lr * 0.05) - o.lr * back(orthonormal(low));
          }
          EXPECT_LE(rms_error(ours, p), 1e-9)
              << text(basis) << " " << text(side) << " rank " << rank << " " << ours.sizes();
        }
      }
    }
  }
}

TEST_P(TrionOnDevice, ATransposedMatrixStepsTransposed) {
  for (const auto& sizes : {std::vector<int64_t>{12, 8}, {8, 12}}) {
    const auto p = parameter(sizes);
    const auto q = p.detach().t().clone().requires_grad_();
    TrionOptions o;
    o.rank = 3;
    o.scale = StepScale::kNone;
    Trion one(std::vector<Tensor>{p}, o), other(std::vector<Tensor>{q}, o);
    for (int64_t step = 0; step < 20; ++step) {
      p.mutable_grad() = gradient_of(p, step);
      q.mutable_grad() = p.grad().t().contiguous();
      one.step();
      other.step();
    }
    EXPECT_LE(rms_error(q.t(), p), 1e-12);
  }
}

// Queries, keys and values fused in one matrix step as three matrices.
TEST_P(TrionOnDevice, PiecesOfASplitStepAlone) {
  for (const auto& split : {std::vector<int64_t>{8, 4, 4}, {4}}) {
    const auto fused = parameter({16, 6});
    std::vector<Tensor> pieces;
    const auto sizes = split.size() > 1 ? split : std::vector<int64_t>(4, 4);
    for (const auto& piece : fused.detach().split_with_sizes(sizes)) {
      pieces.push_back(piece.clone().requires_grad_());
    }
    auto o = decaying<MuonOptions>();
    Muon alone(pieces, o);
    o.split = split;
    Muon together(std::vector<Tensor>{fused}, o);
    for (int64_t step = 0; step < 5; ++step) {
      fused.mutable_grad() = gradient_of(fused, step);
      const auto gradients = fused.grad().split_with_sizes(sizes);
      for (size_t i = 0; i < pieces.size(); ++i) pieces[i].mutable_grad() = gradients[i].clone();
      together.step();
      alone.step();
    }
    std::vector<Tensor> values(pieces.begin(), pieces.end());
    EXPECT_LE(rms_error(fused, at::cat(values)), 1e-12);
  }
}

// Filters of a convolution are rows.
TEST_P(TrionOnDevice, MoreDimensionsAreAMatrix) {
  const auto filters = parameter({6, 2, 3, 3});
  const auto matrix = filters.detach().flatten(1).clone().requires_grad_();
  Trion one(std::vector<Tensor>{filters}, {.rank = 4}),
      other(std::vector<Tensor>{matrix}, {.rank = 4});
  for (int64_t step = 0; step < 3; ++step) {
    filters.mutable_grad() = gradient_of(filters, step);
    matrix.mutable_grad() = filters.grad().flatten(1);
    one.step();
    other.step();
  }
  EXPECT_TRUE(at::equal(filters.detach().flatten(1), matrix.detach()));
}

TEST_P(TrionOnDevice, TheRestTakesAdamW) {
  const NamedParameters named = {
      {"embed.weight", parameter({20, 8})},     {"blocks.0.q_proj.weight", parameter({8, 8})},
      {"blocks.0.q_proj.bias", parameter({8})}, {"norm.weight", parameter({8})},
      {"head.weight", parameter({20, 8})},      {"wide.weight", parameter({8, 40})}};
  auto o = decaying<MuonOptions>();
  o.max_dim = 32;
  Muon optimizer(named, o);
  std::vector<Tensor> ours, theirs;
  for (const auto& [name, p] : named) {
    EXPECT_EQ(optimizer.orthonormalizes(p), name == "blocks.0.q_proj.weight") << name;
    if (optimizer.orthonormalizes(p)) continue;
    ours.push_back(p);
    theirs.push_back(copy_of(p));
  }
  torch::optim::AdamW reference(
      theirs, torch::optim::AdamWOptions(3e-4).betas({0.9, 0.95}).weight_decay(0.05));
  for (int64_t step = 0; step < 20; ++step) {
    for (size_t i = 0; i < ours.size(); ++i) {
      ours[i].mutable_grad() = gradient_of(ours[i], step);
      theirs[i].mutable_grad() = gradient_of(ours[i], step);
    }
    // A schedule moves both rates.
    const double factor = step < 10 ? 1 : 0.5;
    for (auto& group : optimizer.param_groups()) group.options().set_lr(0.02 * factor);
    for (auto& group : reference.param_groups()) group.options().set_lr(3e-4 * factor);
    optimizer.step();
    reference.step();
  }
  for (size_t i = 0; i < ours.size(); ++i) EXPECT_LE(rms_error(ours[i], theirs[i]), 1e-12);
  // By hand.
  o.groups = {{"head.*", Options::parse("adamw_names = []", "test")},
              {"*q_proj*", Options::parse("orthonormalize = false", "test")}};
  const Muon other(named, o);
  EXPECT_TRUE(other.orthonormalizes(named[4].second));
  EXPECT_FALSE(other.orthonormalizes(named[1].second));
}

TEST_P(TrionOnDevice, SkipsLeaveEveryBitAndScalesMultiply) {
  const NamedParameters named = {{"w", parameter({12, 8})}, {"b", parameter({8})}};
  NamedParameters copies;
  for (const auto& [name, p] : named) copies.emplace_back(name, copy_of(p));
  Trion one(named, {.rank = 3}), other(copies, {.rank = 3});
  const auto scalar = [&](double x) { return torch::tensor(x, torch::device(device())); };
  for (int64_t step = 0; step < 4; ++step) {
    for (size_t i = 0; i < 2; ++i) {
      named[i].second.mutable_grad() = gradient_of(named[i].second, step) * 4;
      copies[i].second.mutable_grad() = gradient_of(named[i].second, step);
    }
    one.step({.lr = scalar(0.01), .grad_scale = scalar(0.25)});
    other.step({.lr = scalar(0.01)});
    named[0].second.mutable_grad() = at::full_like(named[0].second, std::nan(""));
    one.step({.lr = scalar(0.01), .skip = scalar(1)});
  }
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(at::equal(named[i].second.detach(), copies[i].second.detach())) << i;
  }
}

TEST_P(TrionOnDevice, StatisticsSayWhatTheColumnsHold) {
  TrionOptions o;
  o.rank = 2;
  o.basis = Basis::kIdentity;
  o.side = Side::kRight;
  o.momentum = 0.5;
  o.statistics = true;
  const auto p = parameter({3, 4}), q = parameter({5});
  Trion optimizer({p, q}, o);
  EXPECT_TRUE(optimizer.statistics().empty());
  const auto step = [&](const std::vector<double>& columns, double skip) {
    p.mutable_grad() = torch::tensor(columns, p.options().requires_grad(false)).expand({3, 4});
    q.mutable_grad() = torch::ones_like(q);
    const auto scalar = [&](double x) { return torch::full({}, x, torch::device(device())); };
    optimizer.step({scalar(1e-3), scalar(2), scalar(skip)});
    std::vector<double> values;
    for (const auto& [name, value] : optimizer.statistics()) values.push_back(value.item<double>());
    return values;
  };
  EXPECT_EQ(step({1, 5, 2, 7}, 1), std::vector<double>({0, 0}));
  // Scaled by 2, what is left out is 2 sqrt(3 (1 + 4)).
  const auto first = step({1, 5, 2, 7}, 0);
  EXPECT_NEAR(first[0], 74. / 79, 1e-6);
  EXPECT_NEAR(first[1], 2 * std::sqrt(15.), 1e-5);
  EXPECT_EQ(step({9, 0, 9, 0}, 1), first);
  // The momentum is all of the first and third, half of the others: 2 {1, 2.5, 2, 3.5}.
  EXPECT_NEAR(step({0, 0, 0, 0}, 0)[0], (2.5 * 2.5 + 3.5 * 3.5) / (1 + 6.25 + 4 + 12.25), 1e-6);
}

// Of all matrices, also where each steps alone.
TEST_P(TrionOnDevice, StatisticsAreOfAllMatrices) {
  TrionOptions o;
  o.rank = 2;
  o.statistics = true;
  const auto measured = [&](bool layerwise) {
    torch::manual_seed(1);
    const auto p = parameter({6, 4}), q = parameter({3, 5});
    Trion optimizer({p, q}, o);
    const auto loss = [&] { return p.square().sum() * 0.3 + q.square().sum(); };
    if (layerwise) {
      LayerwiseStepper stepper(optimizer);
      loss().backward();
    } else {
      loss().backward();
      optimizer.step();
    }
    std::vector<double> values;
    for (const auto& [name, value] : optimizer.statistics()) values.push_back(value.item<double>());
    return values;
  };
  const auto all = measured(false);
  EXPECT_GT(all[0], 0.3);
  EXPECT_EQ(measured(true), all);
}

TEST_P(TrionOnDevice, SavedStateGoesOnBitForBit) {
  const auto make = [&](std::vector<Tensor>& p) { return Trion(p, {.rank = 3}); };
  std::vector<Tensor> whole = {parameter({12, 8}, at::kFloat), parameter({8, 12}, at::kFloat),
                               parameter({5}, at::kFloat)};
  std::vector<Tensor> parts;
  for (const auto& p : whole) parts.push_back(copy_of(p));
  const auto train = [&](Trion& optimizer, std::vector<Tensor>& p, int64_t from, int64_t to) {
    for (int64_t step = from; step < to; ++step) {
      for (auto& t : p) t.mutable_grad() = gradient_of(t, step);
      optimizer.step();
    }
  };
  auto uninterrupted = make(whole);
  train(uninterrupted, whole, 0, 30);
  std::stringstream file;
  {
    auto before = make(parts);
    train(before, parts, 0, 10);
    torch::save(before, file);
  }
  auto after = make(parts);
  torch::load(after, file);
  train(after, parts, 10, 30);
  for (size_t i = 0; i < whole.size(); ++i) {
    EXPECT_TRUE(at::equal(whole[i].detach(), parts[i].detach())) << i;
  }
  EXPECT_EQ(after.state_bytes(), (96 + 96 + 2 * 5 + 3) * 4);
}

TEST_P(TrionOnDevice, OddGradients) {
  const auto p = parameter({12, 8}), unused = parameter({12, 8});
  const auto before = p.detach().clone(), same = unused.detach().clone();
  Trion optimizer(std::vector<Tensor>{p, unused}, decaying(TrionOptions{.rank = 3}));
  p.mutable_grad() = at::zeros_like(p);
  optimizer.step();
  EXPECT_LE(rms_error(p, before * (1 - 0.01 * 0.05)), 1e-14);
  EXPECT_TRUE(at::equal(unused.detach(), same));
  p.mutable_grad() = at::ones_like(p);  // one column of the basis
  optimizer.step();
  auto column = at::zeros_like(p);
  column.select(1, 2).fill_(1);
  p.mutable_grad() = column;
  optimizer.step();
  EXPECT_TRUE(at::isfinite(p).all().item<bool>());
  p.mutable_grad() = at::ones({12, 8}, p.options().requires_grad(false)).to_sparse();
  EXPECT_OUNCE_ERROR(optimizer.step(), kUsage, "dense gradient");
}

TEST(TrionRefuses, ByName) {
  const NamedParameters named = {{"qkv", torch::randn({24, 12}).requires_grad_()}};
  const auto muon = [&](const std::function<void(MuonOptions&)>& change) {
    MuonOptions o;
    change(o);
    Muon(named, o);
  };
  const auto trion = [&](const std::function<void(TrionOptions&)>& change) {
    TrionOptions o;
    change(o);
    Trion(named, o);
  };
  EXPECT_OUNCE_ERROR(muon([](auto& o) {
                       o.split = {16, 4};
                     }),
                     kUsage, "'qkv' [24, 12]: expected a split into 24 rows, got [16, 4]");
  EXPECT_OUNCE_ERROR(muon([](auto& o) { o.split = {7}; }), kUsage, "got [7]");
  EXPECT_OUNCE_ERROR(muon([](auto& o) { o.split = {0}; }), kUsage, "positive");
  EXPECT_OUNCE_ERROR(muon([](auto& o) { o.lr = -1; }), kUsage, "expected lr >= 0, got -1");
  EXPECT_OUNCE_ERROR(muon([](auto& o) { o.momentum = 1; }), kUsage, "momentum below 1");
  EXPECT_OUNCE_ERROR(muon([](auto& o) { o.ns_steps = 0; }), kUsage, "ns_steps");
  EXPECT_OUNCE_ERROR(muon([](auto& o) { o.beta2 = 1; }), kUsage, "below 1");
  EXPECT_OUNCE_ERROR(muon([](auto& o) {
                       o.groups = {{"*", Options::parse("rank = 4", "test")}};
                     }),
                     kUsage, "rank");
  EXPECT_OUNCE_ERROR(trion([](auto& o) { o.nesterov = true; }), kUsage, "full rank");
  EXPECT_OUNCE_ERROR(trion([](auto& o) { o.norm = 3; }), kUsage, "norm = 1 or 2, got 3");
  EXPECT_OUNCE_ERROR(trion([](auto& o) { o.rank_fraction = 2; }), kUsage, "rank_fraction");
  EXPECT_OUNCE_ERROR(trion([](auto& o) { o.rank = 4, o.basis = Basis::kHadamard; }), kUsage,
                     "'qkv' [24, 12]: expected a power of two for a hadamard basis, got 12");
}

// Both learn. A step's length is its learning rate, which has to fall.
TEST(TrionRegistry, MakesThemFromTheirKeys) {
  ounce::test::register_optimizers_once();
  for (const std::string name : {"trion", "muon"}) {
    torch::manual_seed(1);
    auto w = torch::randn({16, 12}).requires_grad_();
    const auto target = torch::randn({16, 12});
    const auto factor = torch::logspace(0, -1, 12);
    auto keys = Options::parse("name = \"" + name + "\"\nlr = 0.1\nweight_decay = 0\n", "test");
    if (name == "trion") keys.set("rank", 6);
    const auto optimizer =
        registry<NamedOptimizer>().make(keys, NamedOptimizer::Context{{{"w", w}}});
    const auto loss = [&] { return ((w - target) * factor).square().sum(); };
    const double first = loss().item<double>();
    for (int step = 0; step < 200; ++step) {
      optimizer->zero_grad();
      loss().backward();
      optimizer->step({.lr = torch::tensor(0.1 * (1 - step / 200.))});
    }
    EXPECT_LT(loss().item<double>(), 0.05 * first) << name;
  }
}

}  // namespace

}  // namespace ounce::optim
