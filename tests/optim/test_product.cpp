// SPDX-License-Identifier: MIT
// The batched product of 16 bits against fp64.
#include <gtest/gtest.h>
#include <ounce/optim/dct.h>
#include <ounce/optim/product.h>
#include <torch/torch.h>

#include "support/devices.h"
#include "support/rms_error.h"

namespace ounce::optim {

namespace {

using at::Tensor;
using ounce::test::rms_error;

class FusedProduct : public ounce::test::OnDevice {
 protected:
  Tensor random(at::IntArrayRef sizes) const {
    return torch::randn(sizes, torch::device(device())).to(at::kBFloat16);
  }
};
OUNCE_ON_GPU(FusedProduct);

Tensor exact(const Product& p) {
  auto d = at::bmm(p.a.to(at::kDouble), p.b.to(at::kDouble)) * p.alpha;
  if (p.c.defined()) d += p.c.to(at::kDouble) * p.beta;
  d.diagonal(0, -2, -1).add_(p.diagonal);
  return d;
}

// No worse than one rounding of the result.
void expect_exact(const Product& p) {
  const auto d = fused_product(p), want = exact(p);
  ASSERT_TRUE(d.defined());
  EXPECT_LE(rms_error(d, want), 1.02 * rms_error(want.to(d.scalar_type()), want) + 1e-6);
}

TEST_P(FusedProduct, OfAnySidesAndAddends) {
  const int64_t sizes[][4] = {{1, 8, 8, 8},       {3, 136, 200, 72},  {2, 128, 192, 64},
                              {2, 264, 384, 520}, {5, 1000, 96, 96},  {2, 512, 256, 256},
                              {1, 640, 2048, 8},  {7, 304, 616, 1160}};
  for (const auto& [count, m, n, k] : sizes) {
    SCOPED_TRACE(c10::str(count, " ", m, " ", n, " ", k));
    const auto a = random({count, m, k}), b = random({count, k, n}), c = random({count, m, n});
    const auto b_columns = b.mT().contiguous().mT(), a_columns = a.mT().contiguous().mT();
    const auto half = [](const Tensor& x) { return x.to(at::kHalf); };
    expect_exact({.a = a, .b = b});
    expect_exact({.a = a, .b = b_columns});
    expect_exact({.a = a_columns, .b = b});
    expect_exact({.a = half(a), .b = half(b), .type = at::kBFloat16});
    expect_exact({.a = half(a), .b = half(b).mT().contiguous().mT(), .c = half(c), .beta = 8.3});
    expect_exact({.a = half(a).mT().contiguous().mT(), .b = half(b), .alpha = 0.1});
    expect_exact({.a = a, .b = b, .c = c, .alpha = 0.5, .beta = -3, .type = at::kHalf});
    expect_exact({.a = a, .b = b_columns, .c = c, .alpha = -2, .beta = 8.3, .diagonal = 40});
    expect_exact({.a = a_columns, .b = b, .c = c, .beta = 1, .diagonal = -40});
  }
}

TEST_P(FusedProduct, OfWhatIsSymmetric) {
  const int64_t sizes[][3] = {{1, 8, 16},   {2, 192, 64},  {3, 256, 1000},
                              {2, 704, 96}, {1, 1536, 40}, {4, 2048, 2048}};
  for (const auto& [count, n, k] : sizes) {
    SCOPED_TRACE(c10::str(count, " ", n, " ", k));
    const auto y = random({count, n, k});
    const auto wide = fused_product({.a = y, .b = y.mT(), .symmetric = true});
    expect_exact({.a = y, .b = y.mT(), .symmetric = true});
    const auto t = y.mT().contiguous();
    expect_exact({.a = t.mT(), .b = t, .symmetric = true});
    // Not even a last bit depends on the half it is in.
    EXPECT_TRUE(at::equal(wide, wide.mT()));
    EXPECT_TRUE(at::equal(wide, fused_product({.a = y, .b = y.mT()})));
    const auto m = wide / static_cast<double>(k);
    expect_exact({.a = m, .b = m.mT(), .c = m, .alpha = 17.3, .beta = -23.6, .symmetric = true});
  }
}

TEST_P(FusedProduct, RepeatsBitForBit) {
  const auto a = random({6, 1000, 264}), b = random({6, 264, 520}), c = random({6, 1000, 520});
  const Product p = {.a = a, .b = b, .c = c, .beta = 2};
  const auto first = fused_product(p);
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(at::equal(fused_product(p), first));
  // Of matrices that commute nearly: each half of the result would be another's by a last bit.
  for (const int64_t n : {256, 768, 1536}) {
    const auto y = random({3, n, 2 * n});
    const auto gram = fused_product({.a = y, .b = y.mT(), .symmetric = true}) / (2.0 * n);
    const auto square = fused_product({.a = gram, .b = gram.mT(), .c = gram, .symmetric = true});
    const Product both = {.a = gram, .b = square.mT(), .symmetric = true};
    const auto once = fused_product(both);
    for (int i = 0; i < 20; ++i) EXPECT_TRUE(at::equal(fused_product(both), once)) << n;
    EXPECT_LE(rms_error(once, exact(both)), 5e-3);
  }
}

TEST_P(FusedProduct, LeavesTheRestToOthers) {
  const auto a = random({2, 16, 16});
  EXPECT_FALSE(fused_product({.a = a.to(at::kFloat), .b = a}).defined());
  EXPECT_FALSE(fused_product({.a = a.narrow(1, 0, 12), .b = a}).defined());
  EXPECT_FALSE(fused_product({.a = a.narrow(2, 0, 8), .b = a.narrow(1, 0, 8)}).defined());
  EXPECT_FALSE(fused_product({.a = a.mT(), .b = a.mT()}).defined());
  EXPECT_FALSE(fused_product({.a = random({2, 12, 16}), .b = a}).defined());
  EXPECT_FALSE(fused_product({.a = a.cpu(), .b = a.cpu()}).defined());
}

TEST_P(FusedProduct, OrthonormalisesInHalf) {
  for (const auto& sizes : {std::vector<int64_t>{3, 256, 64},
                            {2, 96, 1000},
                            {4, 512, 512},
                            {1, 2048, 2048},
                            {1, 5632, 2048},
                            {2, 2048, 256}}) {
    const auto spread =
        (2 * torch::sin(torch::arange(sizes[2], torch::device(device())) * 1.3)).exp();
    const auto x = (torch::randn(sizes, torch::device(device())) * spread).to(at::kBFloat16);
    for (const auto kind : {Iteration::kQuintic, Iteration::kPolarExpress, Iteration::kGram}) {
      SCOPED_TRACE(c10::str(at::IntArrayRef(sizes), " ", text(kind)));
      const auto want = newton_schulz(x.to(at::kDouble), 5, kind);
      EXPECT_LE(rms_error(newton_schulz(x, 5, kind), want), sizes[1] == sizes[2] ? 6e-2 : 2e-2);
    }
  }
}

}  // namespace

}  // namespace ounce::optim
