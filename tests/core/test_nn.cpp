// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/nn/embedding.h>
#include <ounce/core/nn/forward_context.h>
#include <ounce/core/nn/linear.h>
#include <ounce/core/nn/rms_norm.h>
#include <torch/torch.h>

#include <thread>

#include "support/expect_error.h"

namespace ounce::nn {
namespace {

// Adds 1 to every linear layer, 2 to every embedding, 3 to every norm, and counts.
class Shift : public ForwardContext {
 public:
  at::Tensor linear(LinearImpl& module, const at::Tensor& x) override {
    ++calls;
    return module.plain_forward(x) + 1;
  }
  at::Tensor embedding(EmbeddingImpl& module, const at::Tensor& indices) override {
    ++calls;
    return module.plain_forward(indices) + 2;
  }
  at::Tensor rms_norm(RMSNormImpl& module, const at::Tensor& x) override {
    ++calls;
    return module.plain_forward(x) + 3;
  }
  int calls = 0;
};

TEST(Linear, EqualsPyTorchs) {
  torch::manual_seed(1);
  Linear ours(7, 5, /*bias=*/true);
  torch::nn::Linear theirs(7, 5);
  torch::NoGradGuard no_grad;
  ours->bias.normal_();
  for (auto& item : theirs->named_parameters()) {
    item.value().copy_(ours->named_parameters()[item.key()]);
  }
  for (const auto& shape : {std::vector<int64_t>{7}, {3, 7}, {2, 3, 7}, {0, 7}}) {
    const auto x = torch::randn(shape);
    EXPECT_TRUE(ours->forward(x).equal(theirs->forward(x)));
  }
  EXPECT_EQ(ours->flops(10), 2.0 * 10 * 7 * 5);
}

TEST(Linear, InitialValuesAndNames) {
  torch::manual_seed(1);
  Linear plain(400, 300);
  EXPECT_EQ(plain->named_parameters().size(), 1u) << "no bias, no entry";
  EXPECT_TRUE(plain->weight.requires_grad());
  const double std = plain->weight.std().item<double>();
  EXPECT_NEAR(std, 1 / std::sqrt(400.0), 0.05 * 0.05);
  EXPECT_NEAR(Linear(400, 300, false, 0.5)->weight.std().item<double>(), 0.5, 0.01);
  EXPECT_OUNCE_ERROR(Linear(0, 1), kUsage, "positive sizes");
}

TEST(Embedding, EqualsPyTorchs) {
  torch::manual_seed(2);
  Embedding ours(11, 3);
  const auto indices = torch::randint(11, {4, 6});
  EXPECT_TRUE(
      ours->forward(indices).equal(torch::nn::functional::embedding(indices, ours->weight)));
  EXPECT_EQ(ours->forward(torch::zeros({2, 0}, at::kLong)).sizes(), (at::IntArrayRef{2, 0, 3}));
  EXPECT_OUNCE_ERROR(Embedding(3, 0), kUsage, "positive sizes");
}

TEST(RMSNorm, FollowsItsEquation) {
  torch::manual_seed(3);
  RMSNorm norm(33);
  norm->to(at::kDouble);
  torch::NoGradGuard no_grad;
  norm->weight.normal_();
  const auto x = torch::randn({5, 2, 33}, at::kDouble);
  const auto expected = x / (x.square().sum(-1, true) / 33 + norm->eps).sqrt() * norm->weight;
  EXPECT_LT((norm->forward(x) - expected).abs().max().item<double>(), 1e-13);
  EXPECT_OUNCE_ERROR(RMSNorm(0), kUsage, "positive");
  EXPECT_OUNCE_ERROR(RMSNorm(3, 0.0), kUsage, "eps");
}

TEST(RMSNorm, KeepsTheInputsTypeAndComputesWide) {
  torch::manual_seed(4);
  RMSNorm norm(64);
  const auto x = torch::randn({3, 64}) * 200;  // its squares overflow fp16
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    const auto y = norm->forward(x.to(dtype));
    EXPECT_EQ(y.scalar_type(), dtype);
    const auto wide = norm->forward(x.to(dtype).to(at::kFloat));
    EXPECT_LT(((y.to(at::kFloat) - wide).norm() / wide.norm()).item<double>(), 3e-3);
  }
}

TEST(ForwardContext, ReplacesWhatAWeightDoes) {
  Linear linear(3, 3);
  Embedding embedding(4, 3);
  RMSNorm norm(3);
  const auto x = torch::randn({2, 3});
  const auto indices = torch::tensor({0, 3});
  Shift shift;
  {
    const ForwardContextGuard guard(&shift);
    EXPECT_EQ(ForwardContext::current(), &shift);
    EXPECT_TRUE(linear->forward(x).equal(linear->plain_forward(x) + 1));
    EXPECT_TRUE(embedding->forward(indices).equal(embedding->plain_forward(indices) + 2));
    EXPECT_TRUE(norm->forward(x).equal(norm->plain_forward(x) + 3));
    {
      const ForwardContextGuard off(nullptr);
      EXPECT_TRUE(linear->forward(x).equal(linear->plain_forward(x)));
    }
    EXPECT_EQ(ForwardContext::current(), &shift);
  }
  EXPECT_EQ(ForwardContext::current(), nullptr);
  EXPECT_EQ(shift.calls, 3);
}

TEST(ForwardContext, BelongsToAThread) {
  Shift shift;
  const ForwardContextGuard guard(&shift);
  ForwardContext* seen = &shift;
  std::thread([&] { seen = ForwardContext::current(); }).join();
  EXPECT_EQ(seen, nullptr);
}

TEST(ForwardContext, EndsWithAnException) {
  Shift shift;
  try {
    const ForwardContextGuard guard(&shift);
    throw 1;
  } catch (int) {
  }
  EXPECT_EQ(ForwardContext::current(), nullptr);
}

}  // namespace
}  // namespace ounce::nn
