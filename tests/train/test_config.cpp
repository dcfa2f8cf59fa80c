// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <ounce/core/nn/construction.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/learner.h>
#include <ounce/core/train/session.h>
#include <ounce/ounce.h>
#include <torch/torch.h>

#include <filesystem>

namespace ounce {
namespace {

std::string message(const std::string& toml) {
  register_builtins();
  try {
    complete_config(Options::parse(toml, "test"), "test");
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what_without_backtrace()).find('\n'), std::string::npos);
    return error.what_without_backtrace();
  }
  return "";
}

void expect_refused(const std::string& toml, const std::string& part) {
  EXPECT_NE(message(toml).find(part), std::string::npos) << toml << "\n" << message(toml);
}

TEST(Config, DefaultIsCompleteAndReadsBack) {
  register_builtins();
  const auto config = read_config("", {});
  const auto again = complete_config(Options::parse(config.to_toml(), "again"), "again");
  EXPECT_EQ(config, again) << config.to_toml();
  EXPECT_EQ(config.text("model.mixer.name"), "gla");
  EXPECT_TRUE(forbidden_changes(config, again).empty());
}

TEST(Config, OverridesReachNestedParts) {
  register_builtins();
  const auto config = read_config("", {"model.mixer.heads=2", "data.batch=16", "optimizer.lr=1e-4",
                                       "optimizer.schedule.warmup=3"});
  EXPECT_EQ(config.integer("model.mixer.heads"), 2);
  EXPECT_EQ(config.integer("data.batch"), 16);
  EXPECT_DOUBLE_EQ(config.number("optimizer.lr"), 1e-4);
  EXPECT_EQ(config.text("optimizer.schedule.name"), "cosine");
}

TEST(Config, RefusesInOneLine) {
  expect_refused("format = 1\n[modle]\ndim = 3\n", "did you mean 'model'");
  expect_refused("format = 1\n[model]\ndimm = 3\n", "did you mean 'dim'");
  expect_refused("format = 1\n[model]\ndim = \"wide\"\n", "expected an integer");
  expect_refused("format = 1\n[model]\nmixer = \"glaa\"\n", "did you mean 'gla'");
  expect_refused("format = 1\n[optimizer]\nname = \"adamww\"\n", "did you mean 'adamw'");
  expect_refused("format = 1\n[optimizer]\nschedule = \"cosin\"\n", "did you mean 'cosine'");
  expect_refused("format = 1\n[data]\nbatch = 3\naccumulate = 2\n", "not a multiple");
  expect_refused("format = 1\n[data]\nbatch = 0\n", "at least 1");
  expect_refused("format = 1\n[run]\nsteps = -1\n", "at least 1");
  expect_refused("format = 1\n[precision]\ncompute = \"fp8\"\n", "not a choice");
  expect_refused("[model]\n", "format = 1");
  expect_refused("format = 2\n", "newer");
  expect_refused("format = 1\nmodel = 3\n", "write [model]");
  expect_refused("format = 1\n[model\n", "test:2");
}

TEST(Config, OnlyHarmlessChangesMayBeResumed) {
  register_builtins();
  const auto config = read_config("", {});
  EXPECT_TRUE(forbidden_changes(config, read_config("", {"run.eval_every=7", "checkpoint.every=3",
                                                         "run.log_every=1"}))
                  .empty());
  const auto changes =
      forbidden_changes(config, read_config("", {"model.dim=96", "optimizer.lr=1e-5"}));
  ASSERT_EQ(changes.size(), 2u);
  EXPECT_EQ(changes[0], "model.dim: " + std::to_string(config.integer("model.dim")) + " -> 96");
}

TEST(Config, EveryExampleParsesAndBuildsOnMeta) {
  register_builtins();
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(OUNCE_SOURCE "/examples/configs")) {
    if (entry.path().extension() != ".toml") continue;
    const auto config = read_config(entry.path().string(), {});
    const auto model = build_model(config, 50257, at::TensorOptions(at::kFloat).device(at::kMeta));
    for (const auto& item : model->named_parameters()) {
      EXPECT_TRUE(item.value().is_meta()) << entry.path() << " " << item.key();
    }
    ++count;
  }
  EXPECT_GE(count, 7);
}

TEST(Batches, SlicedRowsKeepTheirDocuments) {
  data::Batch batch;
  batch.tokens = at::arange(20).view({4, 5});
  batch.targets = batch.tokens + 1;
  batch.targets.index_put_({2, 4}, data::kIgnoredTarget);
  batch.cu_seqlens = torch::tensor({0, 3, 5, 10, 12, 15, 20}, at::kInt);
  batch.positions = at::zeros({4, 5}, at::kLong);
  batch.counted = 19;
  const auto part = slice_rows(batch, 2, 4);
  EXPECT_TRUE(at::equal(part.cu_seqlens, torch::tensor({0, 2, 5, 10}, at::kInt)));
  EXPECT_TRUE(at::equal(part.tokens, batch.tokens.slice(0, 2, 4)));
  EXPECT_EQ(part.counted, 9);
}

}  // namespace
}  // namespace ounce
