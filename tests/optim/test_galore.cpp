// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/registry.h>
#include <ounce/optim/galore.h>
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

class GaLoreOnDevice : public ounce::test::OnDevice {
 protected:
  Tensor parameter(at::IntArrayRef sizes, at::ScalarType type = at::kDouble) const {
    return torch::randn(sizes, torch::device(device()).dtype(type)).requires_grad_();
  }
};
OUNCE_ON_EACH_DEVICE(GaLoreOnDevice);

Tensor gradient_of(const Tensor& p, int64_t step) {
  torch::manual_seed(static_cast<uint64_t>(100 + step));
  return torch::randn(p.sizes(), at::kDouble).to(p.options().requires_grad(false));
}

GaLoreOptions small(int64_t rank, Subspace subspace = Subspace::kSvd) {
  GaLoreOptions o;
  o.rank = rank;
  o.min_dim = 1;
  o.update_interval = 4;
  o.subspace = subspace;
  o.groups = {{"*", Options::parse("weight_decay = 0.05", "test")}};
  return o;
}

TEST_P(GaLoreOnDevice, EqualsItsDefinition) {
  for (const auto& sizes : {std::vector<int64_t>{12, 8}, {8, 12}}) {
    for (const auto side : {Side::kAuto, Side::kLeft, Side::kRight}) {
      const auto ours = parameter(sizes);
      auto p = ours.detach().clone();
      auto o = small(3);
      o.side = side;
      GaLore optimizer(std::vector<Tensor>{ours}, o);
      const bool right = side == Side::kAuto ? sizes[0] >= sizes[1] : side == Side::kRight;
      Tensor m, v, q;
      for (int64_t step = 0; step < 10; ++step) {
        ours.mutable_grad() = gradient_of(ours, step);
        optimizer.step();
        const auto g = right ? ours.grad() : ours.grad().t();
        if (step % 4 == 0) q = std::get<2>(at::linalg_svd(g, false)).slice(0, 0, 3).t();
        const auto a = at::matmul(g, q);
        if (!m.defined()) m = at::zeros_like(a), v = at::zeros_like(a);
        m = 0.9 * m + 0.1 * a;
        v = 0.999 * v + 0.001 * a * a;
        const auto t = static_cast<double>(step + 1);
        const auto u = m / (1 - std::pow(0.9, t)) / ((v / (1 - std::pow(0.999, t))).sqrt() + 1e-8);
        const auto full = at::matmul(u, q.t()) * 0.25;
        p = p * (1 - 0.01 * 0.05) - 0.01 * (right ? full : full.t());
        EXPECT_LE(rms_error(optimizer.basis_of(ours), q), 1e-12);
      }
      EXPECT_LE(rms_error(ours, p), 1e-12);
    }
  }
}

// No subspace holds more than the singular vectors' (Eckart and Young 1936); a random draw finds
// nearly as much where singular values fall.
TEST_P(GaLoreOnDevice, FindsTheLeadingSubspace) {
  for (const auto& sizes : {std::vector<int64_t>{60, 40}, {40, 60}}) {
    auto [u, s, vh] =
        at::linalg_svd(torch::randn(sizes, torch::device(device()).dtype(at::kDouble)), false);
    s = (torch::arange(40, s.options()) * -0.2).exp();
    const auto g = at::matmul(u * s, vh);
    const double least = s.slice(0, 6).norm().item<double>();
    for (const auto subspace : {Subspace::kSvd, Subspace::kRandomized}) {
      const auto p = parameter(sizes);
      p.mutable_grad() = g;
      GaLore optimizer(std::vector<Tensor>{p}, small(6, subspace));
      optimizer.step();
      const auto q = optimizer.basis_of(p);
      EXPECT_LE(rms_error(at::matmul(q.t(), q), at::eye(6, q.options())), 1e-12);
      const auto x = sizes[0] > sizes[1] ? g : g.t();
      const double rest = (x - at::matmul(at::matmul(x, q), q.t())).norm().item<double>();
      EXPECT_LE(rest, least * (subspace == Subspace::kSvd ? 1 + 1e-9 : 1.01));
    }
  }
}

TEST_P(GaLoreOnDevice, TheRestTakesAdamW) {
  const NamedParameters named = {{"b", parameter({5})}, {"w", parameter({8, 6})}};
  std::vector<Tensor> copies;
  for (const auto& [name, p] : named) copies.push_back(p.detach().clone().requires_grad_());
  auto o = small(3);
  o.project = false;
  GaLore optimizer(named, o);
  torch::optim::AdamW reference(
      copies, torch::optim::AdamWOptions(0.01).betas({0.9, 0.999}).weight_decay(0.05));
  for (int64_t step = 0; step < 20; ++step) {
    for (size_t i = 0; i < 2; ++i) {
      named[i].second.mutable_grad() = gradient_of(copies[i], step);
      copies[i].mutable_grad() = gradient_of(copies[i], step);
    }
    optimizer.step();
    reference.step();
  }
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_LE(rms_error(named[i].second, copies[i]), 1e-12);
    EXPECT_FALSE(optimizer.basis_of(named[i].second).defined());
  }
}

TEST_P(GaLoreOnDevice, SkipsLeaveEveryBit) {
  const auto p = parameter({12, 8}), q = p.detach().clone().requires_grad_();
  GaLore one(std::vector<Tensor>{p}, small(3)), other(std::vector<Tensor>{q}, small(3));
  const auto scalar = [&](double x) { return torch::tensor(x, torch::device(device())); };
  for (int64_t step = 0; step < 3; ++step) {
    p.mutable_grad() = gradient_of(p, step) * 4;
    q.mutable_grad() = gradient_of(q, step);
    one.step({.lr = scalar(0.01), .grad_scale = scalar(0.25)});
    other.step({.lr = scalar(0.01)});
  }
  // The fifth gradient chooses: among infinities, which is skipped.
  p.mutable_grad() = gradient_of(p, 3) * 4;
  q.mutable_grad() = gradient_of(q, 3);
  one.step({.grad_scale = scalar(0.25)});
  other.step();
  const auto basis = one.basis_of(p).clone();
  p.mutable_grad() = at::full_like(p, std::nan(""));
  one.step({.skip = scalar(1)});
  EXPECT_TRUE(at::equal(p.detach(), q.detach()));
  EXPECT_TRUE(at::equal(one.basis_of(p), basis));
}

TEST_P(GaLoreOnDevice, SavedStateGoesOnBitForBit) {
  for (const auto subspace : {Subspace::kSvd, Subspace::kRandomized}) {
    std::vector<Tensor> whole = {parameter({12, 8}, at::kFloat), parameter({5}, at::kFloat)};
    std::vector<Tensor> parts;
    for (const auto& p : whole) parts.push_back(p.detach().clone().requires_grad_());
    const auto train = [&](GaLore& optimizer, std::vector<Tensor>& p, int64_t from, int64_t to) {
      for (int64_t step = from; step < to; ++step) {
        for (auto& t : p) t.mutable_grad() = gradient_of(t, step);
        optimizer.step();
      }
    };
    GaLore uninterrupted(whole, small(3, subspace));
    train(uninterrupted, whole, 0, 30);
    std::stringstream file;
    GaLore before(parts, small(3, subspace));
    train(before, parts, 0, 10);
    torch::save(before, file);
    GaLore after(parts, small(3, subspace));
    torch::load(after, file);
    train(after, parts, 10, 30);
    for (size_t i = 0; i < whole.size(); ++i) {
      EXPECT_TRUE(at::equal(whole[i].detach(), parts[i].detach())) << i;
    }
    EXPECT_EQ(after.state_bytes(), (2 * 12 * 3 + 8 * 3 + 1 + 2 * 5 + 1) * 4);
  }
}

// A decomposition of what has no rank.
TEST_P(GaLoreOnDevice, OddGradients) {
  for (const auto subspace : {Subspace::kSvd, Subspace::kRandomized}) {
    const auto p = parameter({12, 8}, at::kFloat), unused = parameter({12, 8}, at::kFloat);
    const auto before = p.detach().clone(), same = unused.detach().clone();
    auto o = small(3, subspace);
    o.update_interval = 1;
    GaLore optimizer(std::vector<Tensor>{p, unused}, o);
    p.mutable_grad() = at::zeros_like(p);
    optimizer.step();
    EXPECT_LE(rms_error(p, before * (1 - 0.01 * 0.05)), 1e-7);
    EXPECT_TRUE(at::equal(unused.detach(), same));
    auto column = at::zeros_like(p);
    column.select(1, 2).fill_(1);
    for (const auto& g : {at::ones_like(p), column}) {
      p.mutable_grad() = g.detach();
      optimizer.step();
    }
    EXPECT_TRUE(at::isfinite(p).all().item<bool>());
  }
}

TEST(GaLoreRefuses, ByName) {
  const auto make = [](const std::function<void(GaLoreOptions&)>& change,
                       at::ScalarType type = at::kFloat) {
    auto o = small(4);
    change(o);
    GaLore({torch::zeros({6, 10}, type).requires_grad_()}, o);
  };
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.rank = 7; }), kUsage,
                     "'0' [6, 10]: expected a rank of at most 6, got 7");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.update_interval = 0; }), kUsage, "update_interval");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.scale = -1; }), kUsage, "scale");
  EXPECT_OUNCE_ERROR(make([](auto& o) { o.lr = -1; }), kUsage, "expected lr >= 0, got -1");
  EXPECT_OUNCE_ERROR(make([](auto&) {}, at::kHalf), kUsage, "galore");
}

TEST(GaLoreRegistry, MakesItFromItsKeys) {
  ounce::test::register_optimizers_once();
  const auto p = torch::randn({16, 8}).requires_grad_();
  const auto options =
      Options::parse("name = \"galore\"\nrank = 3\nsubspace = \"randomized\"", "test");
  const auto optimizer = registry<NamedOptimizer>().make(options, {.parameters = {{"w", p}}});
  p.mutable_grad() = torch::ones({16, 8});
  optimizer->step();
  EXPECT_EQ(optimizer->state_bytes(), 4 * (2 * 16 * 3 + 8 * 3 + 1));
}

}  // namespace

}  // namespace ounce::optim
