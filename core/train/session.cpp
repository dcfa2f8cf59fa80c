// SPDX-License-Identifier: MIT
#include <ounce/core/autocast.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/nn/construction.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/session.h>
#include <torch/torch.h>

#include <cmath>

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

double Session::evaluate(int64_t batches) {
  const auto available = dataset->valid_batches();
  if (available == 0) return std::nan("");
  const auto count = batches == 0 ? available : std::min(batches, available);
  at::Tensor total;
  int64_t counted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto batch = dataset->valid_batch(i * available / count);
    const auto loss = learner->evaluate(batch).to(at::kDouble);
    total = total.defined() ? total + loss : loss;
    counted += batch.counted;
  }
  return total.item<double>() / static_cast<double>(std::max<int64_t>(counted, 1));
}

std::string Session::sample(const std::string& prompt, const GenerateOptions& options) {
  const AutocastGuard autocast(device.type(), compute);
  const auto tokens = dataset->encode(prompt.empty() ? "\n" : prompt);
  for (const auto token : tokens) {
    OUNCE_CHECK(token >= 0 && token < dataset->vocab_size(), "[sample] token ", token,
                " of the prompt is outside the vocabulary of ", dataset->vocab_size());
  }
  return prompt + dataset->decode(generate(*model, tokens, options));
}

}  // namespace ounce
