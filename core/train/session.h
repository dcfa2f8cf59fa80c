// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/data/dataset.h>
#include <ounce/core/model/generate.h>
#include <ounce/core/model/model.h>
#include <ounce/core/options.h>
#include <ounce/core/train/learner.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ounce {

// What a config describes, built: data, model and learner on a device.
struct Session {
  // Builds everything from a complete config (read_config). Weights are drawn on the CPU from
  // run.seed, so that they do not depend on the device.
  Session(const Options& config, at::Device device);

  // Mean loss in nats a token over the validation split: all of it, or `batches` evenly spread ones
  // (0 = all). None where there is no validation split, or where `stop` said so between batches.
  std::optional<double> evaluate(int64_t batches, const std::function<bool()>& stop = {});
  // Tokens of a prompt; an empty one is a line break, or the end of a document where the data has
  // no text. Throws Fault::kUsage.
  std::vector<int64_t> prompt_tokens(const std::string& prompt) const;
  // The prompt and text that continues it.
  std::string sample(const std::string& prompt, const GenerateOptions& options);
  // The data's count models (Dataset::count_model_losses), counted once.
  const std::vector<std::pair<std::string, double>>& count_models();

  Options config;
  at::Device device;
  at::ScalarType compute;
  std::shared_ptr<data::Dataset> dataset;
  std::shared_ptr<Model> model;
  std::shared_ptr<Learner> learner;

 private:
  std::optional<std::vector<std::pair<std::string, double>>> count_models_;
};

// The model alone, its parameters allocated by `options` (the meta device allocates nothing).
std::shared_ptr<Model> build_model(const Options& config, int64_t vocab, at::TensorOptions options);

}  // namespace ounce
