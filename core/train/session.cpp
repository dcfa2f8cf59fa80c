// SPDX-License-Identifier: MIT
#include <ounce/core/autocast.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/nn/construction.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/memory_plan.h>
#include <ounce/core/train/session.h>
#include <torch/torch.h>

#include <algorithm>

namespace ounce {

std::shared_ptr<Model> build_model(const Options& config, int64_t vocab,
                                   at::TensorOptions options) {
  const nn::ConstructionGuard guard(options);
  return registry<Model>().make(part_spec(config, "model"),
                                {.vocab = vocab, .max_length = config.positive("data.sequence")});
}

Session::Session(const Options& config_, at::Device device_)
    : config(config_),
      device(device_),
      compute(config_.text("precision.compute") == "bf16" ? at::kBFloat16 : at::kFloat) {
  use_deterministic_algorithms(config.flag("run.deterministic"));
  const auto seed = static_cast<uint64_t>(config.integer("run.seed"));
  dataset = registry<data::Dataset>().make(part_spec(config, "data"),
                                           {.sequence = config.positive("data.sequence"),
                                            .batch = config.positive("data.batch"),
                                            .seed = seed,
                                            .packed = config.text("data.documents") == "packed"});
  int64_t bytes = 0;
  const auto shape =
      build_model(config, dataset->vocab_size(), at::TensorOptions(at::kFloat).device(at::kMeta));
  for (const auto& parameter : shape->parameters())
    bytes += static_cast<int64_t>(parameter.nbytes());
  check_fits(bytes, "the weights", device);
  seed_everything(seed);
  const auto params = config.text("precision.params") == "bf16" ? at::kBFloat16 : at::kFloat;
  model =
      build_model(config, dataset->vocab_size(), at::TensorOptions(at::kFloat).device(at::kCPU));
  model->to(device, params);
  learner = registry<Learner>().make(part_spec(config, "learner"),
                                     {.model = model,
                                      .optimizer = part_spec(config, "optimizer"),
                                      .device = device,
                                      .compute = compute});
}

std::optional<double> Session::evaluate(int64_t batches, const std::function<bool()>& stop) {
  const auto available = dataset->valid_batches();
  if (available == 0) return std::nullopt;
  const auto count = batches == 0 ? available : std::min(batches, available);
  // No more rows at a time than a step of training holds.
  const auto rows = config.positive("data.batch") / config.positive("data.accumulate");
  at::Tensor total;
  int64_t counted = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (stop && stop()) return std::nullopt;
    const auto batch = dataset->valid_batch(i * available / count);
    const auto all = batch.tokens.size(0);
    for (int64_t row = 0; row < all; row += rows) {
      const auto loss = learner->evaluate(slice_rows(batch, row, std::min(row + rows, all)));
      total = total.defined() ? total + loss.to(at::kDouble) : loss.to(at::kDouble);
    }
    counted += batch.counted;
  }
  return total.item<double>() / static_cast<double>(std::max<int64_t>(counted, 1));
}

std::vector<int64_t> Session::prompt_tokens(const std::string& prompt) const {
  auto tokens = dataset->encode(prompt.empty() ? "\n" : prompt);
  if (tokens.empty()) tokens.push_back(std::max<int64_t>(dataset->document_end(), 0));
  for (const auto token : tokens) {
    OUNCE_CHECK(token >= 0 && token < dataset->vocab_size(), "[sample] token ", token,
                " of the prompt is outside the vocabulary of ", dataset->vocab_size());
  }
  return tokens;
}

std::string Session::sample(const std::string& prompt, const GenerateOptions& options) {
  const AutocastGuard autocast(device.type(), compute);
  auto tokens = prompt_tokens(prompt);
  const auto produced = generate(*model, tokens, options);
  if (prompt.empty()) tokens.clear();
  tokens.insert(tokens.end(), produced.begin(), produced.end());
  return dataset->decode(tokens);
}

const std::vector<std::pair<std::string, double>>& Session::count_models() {
  if (!count_models_) count_models_ = dataset->count_model_losses();
  return *count_models_;
}

}  // namespace ounce
