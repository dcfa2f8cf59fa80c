// SPDX-License-Identifier: MIT
// What the fused path adds to, and what it takes of the GPU's memory.
#include "kernels/cce_fused_case.h"

namespace ounce {

namespace {

using at::Tensor;
using namespace cce_test;
using test::rms_error;

class CceFusedMemory : public OnFused {};
OUNCE_ON_GPU(CceFusedMemory);

// In fp32, over slabs, of a D that is aligned and one that is not.
TEST_P(CceFusedMemory, MainGradIsNotRounded) {
  for (const int64_t dim : {136, 130}) {
    auto c = random_case({500}, dim, 5003);
    auto exact = c.as(at::kDouble);
    auto main_grad = torch::zeros({5003, dim}, torch::device(device()));
    c.options.workspace_bytes(1 << 20).main_grad(main_grad);
    c.run().loss.backward();
    composed(exact).loss.backward();
    EXPECT_FALSE(c.weight.grad().defined());
    // What is left are the rounded entries of dloss/dlogits.
    EXPECT_LE(rms_error(main_grad, exact.weight.grad()), 2 * one_rounding(exact.weight.grad()));
    EXPECT_GT(rms_error(main_grad.to(at::kBFloat16), main_grad), 1e-3);
    EXPECT_LE(rms_error(c.hidden.grad(), exact.hidden.grad()),
              kSpread * one_rounding(exact.hidden.grad()));
  }
}

// Of a step of full size: beside the gradients, what forward and backward take.
TEST_P(CceFusedMemory, OfAFullSizedStepIsBounded) {
  constexpr int64_t kTokens = 8192, kDim = 2304, kVocab = 256000, kMiB = 1 << 20;
  CceCase c;
  c.hidden = torch::randn({kTokens, kDim}, torch::device(device()).dtype(at::kBFloat16));
  c.weight = torch::randn({kVocab, kDim}, c.hidden.options()) / 48;
  c.hidden.requires_grad_();
  c.weight.requires_grad_();
  c.target = torch::randint(kVocab, {kTokens}, torch::device(device()).dtype(at::kLong));
  c.options.implementation("fused");
  const auto gradients = 2 * kDim * (kTokens + kVocab);
  const auto step = [&](Recompute recompute) {
    c.hidden.mutable_grad().reset();
    c.weight.mutable_grad().reset();
    c.options.recompute(recompute);
    const auto before = memory_use(device()).current;
    reset_peak_memory(device());
    const auto loss = c.run().loss;
    const auto forward = memory_use(device()).peak - before;
    loss.backward();
    return std::pair(forward, memory_use(device()).peak - before - gradients);
  };
  step(Recompute::kAlways);  // what libraries keep is theirs
  const auto [forward, again] = step(Recompute::kAlways);
  EXPECT_LE(forward, 4 * kMiB);
  EXPECT_GT(again, 100 * kMiB);  // the count itself works
  EXPECT_LE(again, 220 * kMiB);
  const auto [early, at_once] = step(Recompute::kNever);
  EXPECT_GT(early, gradients);
  EXPECT_LE(at_once, 2252 * kMiB);
}

}  // namespace

}  // namespace ounce
