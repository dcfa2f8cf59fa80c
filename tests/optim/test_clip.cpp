// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/optim/clip.h>
#include <torch/torch.h>

#include <limits>

#include "support/devices.h"

namespace {

using ounce::optim::clip_by_norm;

class Clip : public ounce::test::OnDevice {
 protected:
  std::vector<at::Tensor> random_gradients() const {
    return {torch::randn({37, 5}, device()),
            at::Tensor(),
            torch::randn({0, 4}, device()),
            torch::randn({}, device()),
            torch::randn({64}, device()).to(at::kBFloat16),
            torch::randn({9}, device()).to(at::kDouble)};
  }
};
OUNCE_ON_EACH_DEVICE(Clip);

double reference_norm(const std::vector<at::Tensor>& gradients) {
  double sum = 0;
  for (const auto& gradient : gradients) {
    if (gradient.defined()) sum += gradient.to(at::kDouble).square().sum().item<double>();
  }
  return std::sqrt(sum);
}

TEST_P(Clip, NormAndScale) {
  const auto gradients = random_gradients();
  const auto copy = gradients[0].clone();
  const double norm = reference_norm(gradients);
  for (const double max_norm : {0.5, 1.0, 1e3}) {
    const auto result = clip_by_norm(gradients, max_norm);
    EXPECT_EQ(result.norm.scalar_type(), at::kFloat);
    EXPECT_EQ(result.norm.dim(), 0);
    EXPECT_NEAR(result.norm.item<double>(), norm, 1e-6 * norm);
    EXPECT_NEAR(result.scale.item<double>(), std::min(1.0, max_norm / (norm + 1e-6)), 1e-6);
    EXPECT_EQ(result.found_inf.item<float>(), 0);
  }
  EXPECT_TRUE(torch::equal(gradients[0], copy));
  EXPECT_EQ(clip_by_norm(gradients, 0).scale.item<float>(), 1);
}

TEST_P(Clip, EqualsTorch) {
  const auto p = torch::randn({50, 3}, device()).requires_grad_(true);
  p.mutable_grad() = torch::randn({50, 3}, device());
  const auto result = clip_by_norm({p.grad()}, 2.0);
  const auto ours = p.grad() * result.scale;
  torch::nn::utils::clip_grad_norm_(p, 2.0);
  EXPECT_TRUE(torch::allclose(ours, p.grad(), 1e-6, 0));
}

TEST_P(Clip, NotFiniteIsFlagged) {
  for (const double bad : {std::numeric_limits<double>::infinity(), std::nan("")}) {
    for (const size_t at : {0, 4, 5}) {
      auto gradients = random_gradients();
      gradients[at].view(-1)[3] = bad;
      const auto result = clip_by_norm(gradients, 1.0);
      EXPECT_EQ(result.found_inf.item<float>(), 1);
      EXPECT_EQ(result.scale.item<float>(), 1);
      EXPECT_FALSE(std::isfinite(result.norm.item<float>()));
    }
  }
}

TEST_P(Clip, NothingToClip) {
  const auto result = clip_by_norm({at::Tensor(), torch::empty({0})}, 1.0);
  EXPECT_EQ(result.norm.item<float>(), 0);
  EXPECT_EQ(result.scale.item<float>(), 1);
  EXPECT_EQ(result.found_inf.item<float>(), 0);
}

}  // namespace
