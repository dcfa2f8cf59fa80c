// SPDX-License-Identifier: MIT
// A mixer of one's own in a language model, trained by the Trainer: register it under a name, and
// every config can use it. Trains a few steps on text that it makes itself.
#include <ounce/core/nn/linear.h>
#include <ounce/core/nn/parts.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/trainer.h>
#include <ounce/ounce.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <iostream>

namespace {

// y_t = W (mean of x_0 .. x_t): about the least a causal mixer can do.
class CausalMean : public ounce::Mixer {
 public:
  explicit CausalMean(int64_t dim) {
    o_proj_ = register_module("o_proj", ounce::nn::Linear(dim, dim));
  }

  at::Tensor forward(const at::Tensor& x_btd, ounce::SequenceContext& context) override {
    auto sum = x_btd.cumsum(1);
    int64_t before = 0;
    if (auto* state = context.state) {
      before = state->length;
      sum = sum + state->tensors.at("sum");
      state->tensors.at("sum") = sum.slice(1, -1);
      state->length += x_btd.size(1);
    }
    const auto count = at::arange(before + 1, before + x_btd.size(1) + 1, x_btd.options());
    return o_proj_->forward(sum / count.unsqueeze(1));
  }
  ounce::MixerState make_state(int64_t batch, int64_t) const override {
    const auto& weight = o_proj_->weight;
    return {0, {{"sum", at::zeros({batch, 1, weight.size(1)}, weight.options())}}};
  }
  double flops(int64_t batch, int64_t length) const override {
    return o_proj_->flops(batch * length);
  }

 private:
  ounce::nn::Linear o_proj_{nullptr};
};

}  // namespace

int main() {
  ounce::register_builtins();
  ounce::registry<ounce::Mixer>().add(
      {.name = "causal_mean", .doc = "mean of everything before", .defaults = ""},
      [](const ounce::Options&, const ounce::PartContext& context) {
        return std::make_shared<CausalMean>(context.dim);
      });

  const auto folder = std::filesystem::temp_directory_path() / "ounce_custom_model";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  std::ofstream text(folder / "text.txt");
  for (int i = 0; i < 2000; ++i) text << "line " << i << " of " << 2000 << "\n";
  text.close();

  ounce::TrainerOptions options;
  options.config = ounce::read_config(
      "", {"model.mixer=causal_mean", "model.dim=32", "model.layers=2", "data.name=text",
           "data.files=" + (folder / "text.txt").string(), "data.sequence=64", "data.batch=4",
           "optimizer.schedule.warmup=5", "run.steps=40", "run.sample_tokens=60"});
  options.out = (folder / "run").string();
  options.device = "cpu";
  const auto result = ounce::Trainer(options, std::cout).run();
  return result.valid_loss < 3.5 ? 0 : 1;
}
