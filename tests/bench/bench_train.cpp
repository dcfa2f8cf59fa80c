// SPDX-License-Identifier: MIT
// A whole training step: forward, backward, clipping and AdamW of the default language model.
#include <ounce/core/model/model.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/learner.h>
#include <torch/torch.h>

#include "bench.h"

namespace ounce::bench {

namespace {

Case train_case(const std::string& mixer, int64_t dim, int64_t layers, int64_t batch,
                int64_t length, int64_t vocab) {
  Case result;
  result.family = "train";
  result.name = "step_" + mixer;
  result.shape = "B" + std::to_string(batch) + " T" + std::to_string(length) + " D" +
                 std::to_string(dim) + " L" + std::to_string(layers) + " V" + std::to_string(vocab);
  result.make = [=](at::Device device) {
    const auto spec =
        Options::parse("model = { name = \"lm\", dim = " + std::to_string(dim) +
                           ", layers = " + std::to_string(layers) + ", mixer = \"" + mixer + "\" }",
                       "bench");
    auto model =
        registry<Model>().make(*spec.find("model"), {.vocab = vocab, .max_length = length});
    model->to(device);
    Learner::Context context;
    context.model = model;
    context.optimizer = "adamw";
    context.device = device;
    context.compute = device.is_cuda() ? at::kBFloat16 : at::kFloat;
    const auto learner = registry<Learner>().make("gradient", context);
    data::Batch rows;
    rows.tokens = torch::randint(vocab, {batch, length}, at::kLong);
    rows.targets = torch::randint(vocab, {batch, length}, at::kLong);
    rows.counted = batch * length;
    StepControl control;
    control.lr = torch::full({}, 1e-4, at::TensorOptions(device).dtype(at::kFloat));
    Job job;
    job.forward = [=] { return learner->step({rows}, control).loss; };
    job.forward_work = {learner->flops(batch, length), 0};
    return job;
  };
  return result;
}

}  // namespace

std::vector<Case> train_cases(at::Device device) {
  std::vector<Case> cases;
  for (const char* mixer : {"gla", "attention"}) {
    // On a GPU the size of examples/configs/*_124m.toml.
    cases.push_back(device.is_cuda() ? train_case(mixer, 768, 12, 8, 1024, 50304)
                                     : train_case(mixer, 128, 4, 8, 256, 256));
    if (device.is_cuda()) cases.back().dtype = at::kBFloat16;
  }
  return cases;
}

}  // namespace ounce::bench
