// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/optim/dct.h>
#include <torch/torch.h>

#include <cmath>

#include "support/devices.h"
#include "support/expect_error.h"
#include "support/rms_error.h"

namespace ounce::optim {

namespace {

using at::Tensor;
using ounce::test::rms_error;

constexpr Basis kBases[] = {Basis::kDct2, Basis::kDct3, Basis::kIdentity, Basis::kHadamard,
                            Basis::kRandom};

class Dct : public ounce::test::OnDevice {
 protected:
  at::TensorOptions fp64() const { return torch::device(device()).dtype(at::kDouble); }
  Tensor random(at::IntArrayRef sizes) const { return torch::randn(sizes, fp64()); }
};
OUNCE_ON_EACH_DEVICE(Dct);

double square_sum(const Tensor& t) { return t.to(at::kDouble).square().sum().item<double>(); }

TEST_P(Dct, BasesAreOrthonormal) {
  for (const auto basis : kBases) {
    for (const int64_t n : {1, 2, 7, 64, 96, 1000}) {
      if (basis == Basis::kHadamard && (n & (n - 1)) != 0) continue;
      SCOPED_TRACE(c10::str(static_cast<int>(basis), " ", n));
      const auto b = dct_basis(n, basis, fp64());
      EXPECT_LE(rms_error(b.matmul(b.t()), torch::eye(n, fp64())), 1e-12);
      EXPECT_TRUE(at::equal(dct_basis(n, basis, fp64()), b));  // the same at every call
    }
  }
}

TEST(DctBasis, IsItsDefinition) {
  constexpr int64_t n = 9;
  const auto dct2 = dct_basis(n, Basis::kDct2, at::kDouble);
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = 0; i < n; ++i) {
      const double expected = (k == 0 ? std::sqrt(0.5) : 1) * std::sqrt(2.0 / n) *
                              std::cos(M_PI * k * (2 * i + 1) / (2.0 * n));
      EXPECT_NEAR(dct2[k][i].item<double>(), expected, 1e-14);
    }
  }
  EXPECT_TRUE(at::equal(dct_basis(n, Basis::kDct3, at::kDouble), dct2.t()));
  const auto signs = dct_basis(4, Basis::kHadamard, at::kDouble) * 2;
  EXPECT_TRUE(at::equal(
      signs,
      torch::tensor({{1., 1., 1., 1.}, {1., -1., 1., -1.}, {1., 1., -1., -1.}, {1., -1., -1., 1.}},
                    at::kDouble)));
  // Large products of numbers are reduced before they are rounded.
  const auto indices = torch::tensor({8191}, at::kInt);
  const auto last =
      dct_backproject(torch::ones({1, 1}, at::kDouble), indices, 8192, Side::kRight, Basis::kDct2);
  EXPECT_NEAR(last[0][8191].item<double>(),
              std::sqrt(2.0 / 8192) * std::cos(M_PI * (8191LL * 16383 % 32768) / 16384.0), 1e-15);
}

TEST_P(Dct, SelectsWhatHoldsMostOfTheSquareSum) {
  for (const auto basis : kBases) {
    for (int round = 0; round < 20; ++round) {
      const int64_t rows = 40, n = 32, rank = 1 + round;
      const auto g = random({rows, n}) * random({1, n}).exp();
      const auto [indices, energy] = dct_select(g, rank, Side::kRight, 2, basis);
      EXPECT_TRUE(at::equal(std::get<0>(indices.sort()), indices));
      EXPECT_EQ(std::get<0>(at::unique_consecutive(indices)).size(0), rank);
      const auto a = dct_project(g, indices, Side::kRight, basis);
      const auto back = dct_backproject(a, indices, n, Side::kRight, basis);
      const double rest = square_sum(g - back) / square_sum(g);
      EXPECT_NEAR(energy.item<double>(), 1 - rest, 1e-12);
      EXPECT_LE(rest, 1 - static_cast<double>(rank) / n + 1e-12);
      // No vector that was left out has a larger norm than one that was taken.
      const auto norms = dct_rank(g, Side::kRight, 2, basis);
      EXPECT_LE(rms_error(norms, g.matmul(dct_basis(n, basis, fp64()).t()).norm(2, {0})), 1e-12);
      const auto taken = norms.index_select(0, indices.to(at::kLong));
      EXPECT_EQ((norms > taken.min()).sum().item<int64_t>(), rank - 1);
    }
  }
}

TEST_P(Dct, TheFirstOfEqualNormsIsTaken) {
  const auto g = torch::ones({6, 10}, device());
  const auto [indices, energy] = dct_select(g, 4, Side::kRight, 1, Basis::kIdentity);
  EXPECT_TRUE(at::equal(indices.cpu(), torch::arange(4, at::kInt)));
  EXPECT_NEAR(energy.item<double>(), 0.4, 1e-6);
  const auto zero = dct_select(torch::zeros({6, 10}, device()), 2, Side::kRight, 2, Basis::kDct2);
  EXPECT_EQ(std::get<1>(zero).item<double>(), 0);
}

TEST_P(Dct, LeftIsRightOfTheTranspose) {
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{12, 30}, {30, 12}, {16, 16}}) {
    const auto g = random({rows, columns});
    const auto [left, energy_left] = dct_select(g, 5, Side::kLeft, 2, Basis::kDct2);
    const auto [right, energy_right] = dct_select(g.t(), 5, Side::kRight, 2, Basis::kDct2);
    EXPECT_TRUE(at::equal(left, right));
    const auto a = dct_project(g, left, Side::kLeft, Basis::kDct2);
    EXPECT_LE(rms_error(a, dct_project(g.t(), right, Side::kRight, Basis::kDct2).t()), 1e-14);
    EXPECT_LE(rms_error(dct_backproject(a, left, rows, Side::kLeft, Basis::kDct2),
                        dct_backproject(a.t(), right, rows, Side::kRight, Basis::kDct2).t()),
              1e-14);
    const bool is_right = rows >= columns;
    EXPECT_EQ(dct_rank(g, Side::kAuto, 1, Basis::kDct2).size(0), is_right ? columns : rows);
  }
}

// <project(g), a> = <g, backproject(a)>, and projecting back what lies in the subspace changes
// nothing.
TEST_P(Dct, BackprojectionIsTheTransposeOfProjection) {
  for (const auto basis : kBases) {
    const auto indices = torch::tensor({0, 3, 4, 15}, torch::device(device()).dtype(at::kInt));
    const auto g = random({20, 16}), a = random({20, 4});
    const auto back = dct_backproject(a, indices, 16, Side::kRight, basis);
    const auto there = dct_project(g, indices, Side::kRight, basis);
    EXPECT_NEAR((there * a).sum().item<double>(), (g * back).sum().item<double>(), 1e-10);
    EXPECT_LE(rms_error(dct_project(back, indices, Side::kRight, basis), a), 1e-13);
  }
}

TEST_P(Dct, SixteenBitsAreRoundedOnce) {
  const auto g = random({200, 96}).to(at::kBFloat16);
  const auto indices = std::get<0>(dct_select(g, 24, Side::kAuto, 2, Basis::kDct2));
  EXPECT_TRUE(at::equal(
      indices, std::get<0>(dct_select(g.to(at::kDouble), 24, Side::kAuto, 2, Basis::kDct2))));
  const auto exact = dct_project(g.to(at::kDouble), indices, Side::kAuto, Basis::kDct2);
  const auto a = dct_project(g, indices, Side::kAuto, Basis::kDct2);
  EXPECT_EQ(a.scalar_type(), at::kBFloat16);
  EXPECT_LE(rms_error(a, exact), 1.01 * rms_error(exact.to(at::kBFloat16), exact));
}

TEST_P(Dct, NewtonSchulzBringsSingularValuesToOne) {
  const auto values = [](const Tensor& x) { return at::linalg_svdvals(x); };
  for (const auto& sizes : {std::vector<int64_t>{40, 24}, {24, 40}, {3, 16, 20}}) {
    const auto x = random(sizes);
    const auto quintic = values(newton_schulz(x, 8, Iteration::kQuintic));
    EXPECT_GE(quintic.min().item<double>(), 0.65);
    EXPECT_LE(quintic.max().item<double>(), 1.25);
    const auto polar = values(newton_schulz(x, 8, Iteration::kPolarExpress));
    EXPECT_LE((polar - 1).abs().max().item<double>(), 1e-3);
    for (const int64_t steps : {0, 1, 5}) {
      EXPECT_LE(rms_error(newton_schulz(x, steps, Iteration::kGram),
                          newton_schulz(x, steps, Iteration::kQuintic)),
                1e-9);
    }
    EXPECT_LE(rms_error(newton_schulz(x.transpose(-2, -1), 5, Iteration::kQuintic),
                        newton_schulz(x, 5, Iteration::kQuintic).transpose(-2, -1)),
              1e-12);
  }
  // U V^T itself.
  const auto x = random({30, 20});
  const auto [u, s, v] = at::linalg_svd(x, /*full_matrices=*/false);
  EXPECT_LE(rms_error(newton_schulz(x, 10, Iteration::kPolarExpress), u.matmul(v)), 1e-6);
  // A batch is its matrices one by one, whatever the others hold.
  const auto batch = at::stack({random({8, 12}) * 1e3, torch::zeros({8, 12}, fp64())});
  const auto all = newton_schulz(batch, 5, Iteration::kQuintic);
  EXPECT_LE(rms_error(all[0], newton_schulz(batch[0], 5, Iteration::kQuintic)), 1e-13);
  EXPECT_EQ(all[1].abs().max().item<double>(), 0);
}

TEST(NewtonSchulz, IsNotDifferentiated) {
  const auto x = torch::randn({2, 8, 12}).requires_grad_();
  EXPECT_FALSE(newton_schulz(x, 5, Iteration::kQuintic).requires_grad());
}

TEST(DctRefuses, ByName) {
  const auto g = torch::randn({6, 10});
  const auto indices = torch::arange(3, at::kInt);
  EXPECT_OUNCE_ERROR(parse_basis("dct4"), kUsage,
                     "expected basis = dct2, dct3, identity, hadamard, random, got 'dct4'");
  EXPECT_OUNCE_ERROR(parse_side("top"), kUsage, "expected side = auto, left, right, got 'top'");
  EXPECT_OUNCE_ERROR(dct_basis(0, Basis::kDct2, at::kFloat), kUsage, "expected n >= 1, got 0");
  EXPECT_OUNCE_ERROR(dct_rank(g, Side::kAuto, 2, Basis::kHadamard), kUsage,
                     "expected a power of two for a hadamard basis, got n = 6");
  EXPECT_OUNCE_ERROR(dct_rank(g, Side::kAuto, 3, Basis::kDct2), kUsage, "norm = 1 or 2, got 3");
  EXPECT_OUNCE_ERROR(dct_rank(g.unsqueeze(0), Side::kAuto, 2, Basis::kDct2), kUsage,
                     "expected a floating matrix [R, C] with entries, got Float [1, 6, 10]");
  EXPECT_OUNCE_ERROR(dct_select(g, 7, Side::kAuto, 2, Basis::kDct2), kUsage,
                     "expected 1 <= rank <= 6 for g [6, 10], got 7");
  EXPECT_OUNCE_ERROR(dct_project(g, indices.to(at::kLong), Side::kAuto, Basis::kDct2), kUsage,
                     "expected indices [rank] int32");
  EXPECT_OUNCE_ERROR(dct_backproject(g, indices, 12, Side::kRight, Basis::kDct2), kUsage,
                     "expected a with 3 columns, as many as indices, got [6, 10]");
  EXPECT_OUNCE_ERROR(dct_backproject(g, indices, 12, Side::kAuto, Basis::kDct2), kUsage,
                     "expected side = left or right");
  EXPECT_OUNCE_ERROR(newton_schulz(g, -1, Iteration::kQuintic), kUsage, "steps >= 0, got -1");
}

// Squares that underflow must not make what is left of the norm too small.
TEST_P(Dct, OrthonormalisationOfNextToNothingStaysSmall) {
  torch::manual_seed(3);
  for (const double size : {1e-20, 5e-24, 1e-30, 1e-44}) {
    const auto x = (torch::randn({48, 48}, torch::device(device())) * size).to(at::kFloat);
    const auto y = newton_schulz(x, 5, Iteration::kQuintic);
    EXPECT_LE(y.abs().max().item<float>(), 1) << size;
  }
}

}  // namespace

}  // namespace ounce::optim
