// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <ounce/core/model/generate.h>
#include <ounce/core/model/language_model.h>
#include <ounce/core/registry.h>
#include <ounce/ounce.h>
#include <torch/torch.h>

#include "support/rms_error.h"

namespace ounce {
namespace {

using test::rms_error;

constexpr int64_t kVocab = 61;

std::shared_ptr<Model> make_model(const std::string& options, int64_t max_length = 64) {
  register_builtins();
  torch::manual_seed(7);
  auto spec = Options::parse("name = \"lm\"\ndim = 32\nlayers = 2\n" + options, "test");
  auto model = registry<Model>().make(spec, {.vocab = kVocab, .max_length = max_length});
  // Unit-scale embeddings, so that tokens differ enough to be told apart.
  const torch::NoGradGuard no_grad;
  model->named_parameters()["embed.weight"].normal_();
  return model;
}

at::Tensor tokens(int64_t batch, int64_t length) {
  return torch::randint(kVocab, {batch, length}, at::kLong);
}

class Mixers : public testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(
    All, Mixers,
    testing::Values(
        "mixer = { name = \"attention\", heads = 4 }",
        "mixer = { name = \"attention\", heads = 4, kv_heads = 2 }",
        "mixer = { name = \"attention\", heads = 4, rope_base = 0 }",
        "mixer = { name = \"gla\", heads = 2 }",
        "mixer = [{ name = \"gla\", heads = 2 }, { name = \"attention\", heads = 4 }]"));

TEST_P(Mixers, StatesInPiecesEqualTheFullForward) {
  auto model = make_model(GetParam());
  model->eval();
  model->to(at::kDouble);
  const torch::NoGradGuard no_grad;
  const auto input = tokens(2, 23);
  SequenceContext context;
  const auto full = model->hidden(input, context);
  auto states = model->make_states(2, 23);
  std::vector<at::Tensor> pieces;
  int64_t begin = 0;
  for (const int64_t length : {9, 1, 1, 7, 1, 4}) {
    SequenceContext piece;
    pieces.push_back(model->hidden(input.slice(1, begin, begin + length), piece, &states));
    begin += length;
  }
  EXPECT_LT(rms_error(at::cat(pieces, 1), full), 1e-6);
}

TEST_P(Mixers, GreedyGenerationEqualsTheFullForward) {
  auto model = make_model(GetParam());
  model->eval();
  const std::vector<int64_t> prompt = {3, 14, 15, 9, 26};
  const auto produced = generate(*model, prompt, {.tokens = 12, .temperature = 0});
  const torch::NoGradGuard no_grad;
  auto sequence = prompt;
  for (const auto token : produced) {
    SequenceContext context;
    const auto hidden = model->hidden(torch::tensor(sequence, at::kLong).unsqueeze(0), context);
    const auto logits = at::linear(hidden.select(1, -1), model->head_weight());
    EXPECT_EQ(logits.argmax().item<int64_t>(), token);
    sequence.push_back(token);
  }
}

TEST_P(Mixers, PackedDocumentsEqualSeparateOnes) {
  auto model = make_model(GetParam());
  model->eval();
  model->to(at::kDouble);
  const torch::NoGradGuard no_grad;
  const auto input = tokens(2, 20);
  SequenceContext packed;
  packed.cu_seqlens = torch::tensor({0, 7, 8, 20, 33, 40}, at::kInt);
  packed.positions = at::stack({at::cat({at::arange(7), at::arange(1), at::arange(12)}),
                                at::cat({at::arange(13), at::arange(7)})});
  const auto together = model->hidden(input, packed).flatten(0, 1);
  const auto flat = input.flatten();
  std::vector<at::Tensor> apart;
  const std::vector<int64_t> bounds = {0, 7, 8, 20, 33, 40};
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    SequenceContext context;
    apart.push_back(
        model->hidden(flat.slice(0, bounds[i], bounds[i + 1]).unsqueeze(0), context).squeeze(0));
  }
  EXPECT_LT(rms_error(together, at::cat(apart)), 1e-6);
}

TEST_P(Mixers, IsCausal) {
  auto model = make_model(GetParam());
  model->eval();
  const torch::NoGradGuard no_grad;
  const auto input = tokens(1, 16);
  auto changed = input.clone();
  changed.index_put_({0, 10}, (input.index({0, 10}) + 1).remainder(kVocab));
  SequenceContext a, b;
  const auto before = model->hidden(input, a), after = model->hidden(changed, b);
  EXPECT_TRUE(at::equal(before.slice(1, 0, 10), after.slice(1, 0, 10)));
  EXPECT_GT(rms_error(after.slice(1, 10), before.slice(1, 10)), 1e-3);
}

std::vector<at::Tensor> gradients(Model& model, const at::Tensor& input,
                                  const at::Tensor& targets) {
  model.train();
  model.zero_grad();
  torch::manual_seed(11);
  SequenceContext context;
  model.loss_sum(model.hidden(input, context), targets).backward();
  std::vector<at::Tensor> result;
  for (const auto& parameter : model.parameters()) {
    EXPECT_TRUE(parameter.grad().defined());
    result.push_back(parameter.grad().clone());
  }
  return result;
}

TEST_P(Mixers, RecomputeGivesTheSameGradients) {
  const auto input = tokens(2, 16), targets = tokens(2, 16);
  const auto common = std::string(GetParam()) + "\ndropout = 0.2\n";
  auto plain = make_model(common), recomputed = make_model(common + "recompute = \"block\"\n");
  const auto a = gradients(*plain, input, targets), b = gradients(*recomputed, input, targets);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i], b[i])) << i;
}

TEST(LanguageModel, LossesAgree) {
  const auto input = tokens(3, 17);
  auto targets = tokens(3, 17);
  targets.index_put_({1}, -100);
  auto chunked = make_model("loss = \"cce\"\n"),
       materialised = make_model("loss = \"cross_entropy\"\n");
  SequenceContext a, b;
  const auto x = chunked->loss_sum(chunked->hidden(input, a), targets);
  const auto y = materialised->loss_sum(materialised->hidden(input, b), targets);
  EXPECT_NEAR(x.item<double>(), y.item<double>(), 1e-4 * y.item<double>());
}

TEST(LanguageModel, TiedAndUntiedHeads) {
  auto tied = make_model(""), untied = make_model("tie_embeddings = false\n");
  EXPECT_EQ(&tied->head_weight(), &tied->head_weight());
  EXPECT_FALSE(tied->named_parameters().contains("head.weight"));
  EXPECT_TRUE(untied->named_parameters().contains("head.weight"));
}

TEST(LanguageModel, ScalesEmbeddings) {
  auto plain = make_model(""), scaled = make_model("embed_scale = 4.0\n");
  const torch::NoGradGuard no_grad;
  plain->named_parameters()["embed.weight"].mul_(4);
  const auto input = tokens(2, 9);
  SequenceContext a, b;
  EXPECT_TRUE(at::equal(plain->hidden(input, a), scaled->hidden(input, b)));
}

TEST(LanguageModel, RefusesBadOptions) {
  EXPECT_THROW(make_model("mixer = [\"gla\"]\n"), Error);
  EXPECT_THROW(make_model("mixer = { name = \"attention\", heads = 5 }\n"), Error);
  EXPECT_THROW(make_model("mixer = \"attentoin\"\n"), Error);
  EXPECT_THROW(make_model("recompute = \"all\"\n"), Error);
  EXPECT_THROW(make_model("embed_scale = 0.0\n"), Error);
}

TEST(Generate, TopKAndSeeds) {
  auto model = make_model("");
  const GenerateOptions options{.tokens = 20, .temperature = 30, .top_k = 0, .seed = 5};
  EXPECT_EQ(generate(*model, {1}, options), generate(*model, {1}, options));
  auto other = options;
  other.seed = 6;
  EXPECT_NE(generate(*model, {1}, options), generate(*model, {1}, other));
  auto top1 = options;
  top1.top_k = 1;
  auto greedy = options;
  greedy.temperature = 0;
  EXPECT_EQ(generate(*model, {1}, top1), generate(*model, {1}, greedy));
  EXPECT_TRUE(model->is_training());
  EXPECT_THROW(generate(*model, {}, options), Error);
}

}  // namespace
}  // namespace ounce
