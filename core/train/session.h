// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/data/dataset.h>
#include <ounce/core/model/generate.h>
#include <ounce/core/model/model.h>
#include <ounce/core/options.h>
#include <ounce/core/train/learner.h>

#include <memory>
#include <string>

namespace ounce {

// What a config describes, built: data, model and learner on a device.
struct Session {
  // Builds everything from a complete config (read_config). Weights are drawn on the CPU from
  // run.seed, so that they do not depend on the device.
  Session(const Options& config, at::Device device);

  // Mean loss in nats a token over the validation split: all of it, or `batches` evenly spread ones
  // (0 = all). No validation split: NaN.
  double evaluate(int64_t batches);
  // Text that continues `prompt` (empty: a line break).
  std::string sample(const std::string& prompt, const GenerateOptions& options);

  Options config;
  at::Device device;
  at::ScalarType compute;
  std::shared_ptr<data::Dataset> dataset;
  std::shared_ptr<Model> model;
  std::shared_ptr<Learner> learner;
};

// The model alone, its parameters allocated by `options` (the meta device allocates nothing).
std::shared_ptr<Model> build_model(const Options& config, int64_t vocab, at::TensorOptions options);

}  // namespace ounce
