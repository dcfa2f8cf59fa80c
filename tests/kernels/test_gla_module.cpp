// SPDX-License-Identifier: MIT
// The mixer "gla": names, state, packed documents, autocast.
#include <gtest/gtest.h>
#include <ounce/core/autocast.h>
#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/kernels/gla/gla.h>
#include <torch/torch.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "support/expect_error.h"

namespace {

using at::Tensor;
using ounce::GatedLinearAttention;
using ounce::GlaLayerOptions;
using ounce::SequenceContext;

constexpr int64_t kDim = 32;

std::vector<GlaLayerOptions> variants() {
  std::vector<GlaLayerOptions> all(4);
  all[1].conv_size = 4;
  all[1].conv_bias = true;
  all[2].kv_heads = 2;
  all[2].feature_map = "elu";
  all[2].clamp_min = -0.05;
  all[2].conv_size = 2;
  all[3].kv_heads = 1;
  all[3].output_gate = false;
  all[3].expand_k = 1;
  all[3].expand_v = 2;
  return all;
}

std::shared_ptr<GatedLinearAttention> make(const GlaLayerOptions& options) {
  auto mixer = std::make_shared<GatedLinearAttention>(kDim, options);
  mixer->to(at::kDouble);
  const torch::NoGradGuard no_grad;
  for (auto& p : mixer->parameters()) p.add_(at::randn_like(p), 0.1);
  return mixer;
}

double worst(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

struct GlaMixer : testing::Test {
  void SetUp() override { at::manual_seed(11); }
};

TEST_F(GlaMixer, ParameterNamesAndShapes) {
  GlaLayerOptions options;
  options.kv_heads = 2;
  options.conv_size = 4;
  const GatedLinearAttention mixer(kDim, options);
  const std::vector<std::pair<std::string, std::vector<int64_t>>> expected = {
      {"q_proj.weight", {16, 32}},    {"k_proj.weight", {8, 32}},
      {"v_proj.weight", {16, 32}},    {"g_proj.weight", {32, 32}},
      {"gk_proj.0.weight", {16, 32}}, {"gk_proj.1.weight", {8, 16}},
      {"gk_proj.1.bias", {8}},        {"g_norm.weight", {8}},
      {"o_proj.weight", {32, 32}},    {"q_conv1d.weight", {16, 1, 4}},
      {"k_conv1d.weight", {8, 1, 4}}, {"v_conv1d.weight", {16, 1, 4}}};
  const auto named = mixer.named_parameters();
  EXPECT_EQ(named.size(), expected.size());
  for (const auto& [name, shape] : expected) {
    const auto* p = named.find(name);
    ASSERT_NE(p, nullptr) << name;
    EXPECT_EQ(p->sizes().vec(), shape) << name;
  }
}

TEST_F(GlaMixer, QueriesKeysAndValuesStartSmall) {
  torch::manual_seed(1);
  const GatedLinearAttention mixer(256, GlaLayerOptions());
  for (const auto& entry : mixer.named_parameters()) {
    const auto& name = entry.key();
    if (name != "q_proj.weight" && name != "k_proj.weight" && name != "v_proj.weight") continue;
    EXPECT_NEAR(entry.value().std().item<double>() * 16, std::exp2(-2.5), 5e-3) << name;
  }
}

// The layer as its definition reads, from the recurrence and ATen, without a convolution.
TEST_F(GlaMixer, EqualsItsDefinition) {
  auto mixer = make({});
  const auto x = at::randn({2, 20, kDim}, at::kDouble);
  const auto named = mixer->named_parameters();
  auto project = [&](const char* name) { return at::matmul(x, named[name].t()); };
  auto heads = [](const Tensor& y) { return y.unflatten(-1, {4, -1}); };
  const auto gate = at::matmul(project("gk_proj.0.weight"), named["gk_proj.1.weight"].t()) +
                    named["gk_proj.1.bias"];
  const auto o = std::get<0>(ounce::naive_recurrent_gla(
      heads(project("q_proj.weight")), heads(project("k_proj.weight")),
      heads(project("v_proj.weight")), heads(at::log_sigmoid(gate) / 16)));
  const auto normed = o / (o.square().mean(-1, true) + 1e-5).sqrt() * named["g_norm.weight"];
  const auto expected = at::matmul(normed.flatten(2) * at::silu(project("g_proj.weight")),
                                   named["o_proj.weight"].t());
  SequenceContext context;
  EXPECT_LE(worst(mixer->forward(x, context), expected), 1e-12);
}

TEST_F(GlaMixer, DecodingEqualsTheFullForward) {
  for (const auto& options : variants()) {
    auto mixer = make(options);
    const auto x = at::randn({2, 90, kDim}, at::kDouble);
    SequenceContext plain;
    const auto full = mixer->forward(x, plain);
    for (const bool gradients : {false, true}) {
      const at::AutoGradMode mode(gradients);
      auto state = mixer->make_state(2, 90);
      SequenceContext context;
      context.state = &state;
      std::vector<Tensor> pieces;
      int64_t t = 0;
      for (const int64_t n : {1, 40, 2, 33, 1, 1, 1, 8, 3}) {
        pieces.push_back(mixer->forward(x.slice(1, t, t + n), context));
        t += n;
      }
      EXPECT_EQ(state.length, 90);
      EXPECT_LE(worst(at::cat(pieces, 1), full), 1e-12) << options.conv_size;
      // A copy taken now is not touched by what follows.
      auto copy = state.clone();
      const auto next = mixer->forward(x.slice(1, 0, 1), context);
      context.state = &copy;
      EXPECT_LE(worst(mixer->forward(x.slice(1, 0, 1), context), next), 1e-14);
    }
  }
}

TEST_F(GlaMixer, PackedDocumentsEqualSeparateOnes) {
  for (const auto& options : variants()) {
    auto mixer = make(options);
    const auto x = at::randn({2, 50, kDim}, at::kDouble);
    const std::vector<int64_t> ends = {0, 1, 3, 50, 50, 90, 100};
    SequenceContext context, plain;
    context.cu_seqlens = at::tensor(ends, at::kInt);
    const auto packed = mixer->forward(x, context).flatten(0, 1);
    const auto rows = x.flatten(0, 1).unsqueeze(0);
    for (size_t i = 0; i + 1 < ends.size(); ++i) {
      if (ends[i] == ends[i + 1]) continue;
      const auto alone = mixer->forward(rows.slice(1, ends[i], ends[i + 1]), plain)[0];
      EXPECT_LE(worst(packed.slice(0, ends[i], ends[i + 1]), alone), 1e-12) << i;
    }
    // Causal: a later token does not change an earlier output.
    auto changed = x.clone();
    changed.select(1, 30).normal_();
    const auto y = mixer->forward(x, plain), z = mixer->forward(changed, plain);
    EXPECT_LE(worst(y.slice(1, 0, 30), z.slice(1, 0, 30)), 1e-13);
    EXPECT_GT(worst(y.slice(1, 30), z.slice(1, 30)), 1e-3);
  }
}

TEST_F(GlaMixer, EveryParameterHasAGradientUnderAutocast) {
  for (const auto& options : variants()) {
    auto mixer = std::make_shared<GatedLinearAttention>(kDim, options);
    const auto x = at::randn({2, 40, kDim});
    SequenceContext context;
    const auto exact = mixer->forward(x, context);
    const ounce::AutocastGuard autocast(at::kCPU, at::kBFloat16);
    const auto y = mixer->forward(x, context);
    EXPECT_EQ(y.scalar_type(), at::kBFloat16);
    const double error = ((y.to(at::kFloat) - exact).norm() / exact.norm()).item<double>();
    std::printf("  bf16 autocast of the layer: error %.2e, bound 3e-02\n", error);
    EXPECT_LE(error, 3e-2);
    (y.to(at::kFloat) * at::randn_like(exact)).sum().backward();
    for (const auto& p : mixer->named_parameters()) {
      ASSERT_TRUE(p.value().grad().defined()) << p.key();
      EXPECT_EQ(p.value().grad().scalar_type(), at::kFloat);
      EXPECT_GT(p.value().grad().abs().max().item<double>(), 0) << p.key();
    }
  }
}

TEST_F(GlaMixer, Registered) {
  if (!ounce::registry<ounce::Mixer>().store().contains("gla")) ounce::register_gla();
  ounce::PartContext context;
  context.dim = 64;
  auto spec = ounce::Options::parse("name = \"gla\"\nheads = 2\nclamp_min = -5", "test");
  const auto mixer = ounce::registry<ounce::Mixer>().make(spec, context);
  auto* gla = dynamic_cast<GatedLinearAttention*>(mixer.get());
  ASSERT_NE(gla, nullptr);
  EXPECT_EQ(gla->g_norm->weight.size(0), 32);
  // 5 projections, the two of the gate, and 4 K V + 64 (K + V) for each of 2 heads.
  const double tokens = 3 * 10;
  EXPECT_EQ(mixer->flops(3, 10), tokens * (2 * (64 * 32 * 2 + 64 * 64 * 3 + 64 * 16 + 16 * 32) +
                                           2 * (4 * 16 * 32 + 64 * (16 + 32))));
  spec.set("heads", 3);
  EXPECT_OUNCE_ERROR(ounce::registry<ounce::Mixer>().make(spec, context), kUsage,
                     "multiple of heads");
}

TEST_F(GlaMixer, BadInput) {
  GatedLinearAttention mixer(kDim, {});
  auto state = mixer.make_state(1, 8);
  SequenceContext context;
  context.state = &state;
  context.cu_seqlens = at::tensor({0, 8}, at::kInt);
  EXPECT_THROW(mixer.forward(at::randn({1, 8, kDim}), context), ounce::Error);
  context.cu_seqlens = Tensor();
  EXPECT_THROW(mixer.forward(at::randn({1, 8, kDim + 1}), context), ounce::Error);
  GlaLayerOptions options;
  options.kv_heads = 3;
  EXPECT_THROW(GatedLinearAttention(kDim, options), ounce::Error);
}

}  // namespace
