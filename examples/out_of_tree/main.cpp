// SPDX-License-Identifier: MIT
// Trains a language model with a mixer of its own in a plain LibTorch loop, with an optimizer of
// the library: first the mixer registered here, then the same one from the plug-in named on the
// command line.
#include <ounce/core/model/model.h>
#include <ounce/core/registry.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/ounce.h>
#include <torch/torch.h>

#include <cmath>
#include <iostream>

#include "token_shift.h"

namespace {

constexpr int64_t kVocab = 16, kBatch = 8, kLength = 32;

// Rows in which every token follows from the two before it.
at::Tensor sequences() {
  auto tokens = torch::randint(kVocab, {kBatch, kLength + 1});
  for (int64_t t = 2; t <= kLength; ++t) {
    const auto next = (tokens.select(1, t - 1) * 3 + tokens.select(1, t - 2)) % kVocab;
    tokens.select(1, t).copy_(next);
  }
  return tokens;
}

// Mean loss over the last ten of 300 steps.
double train(const std::string& mixer) {
  torch::manual_seed(1);
  const auto spec =
      ounce::Options::parse("model = { name = \"lm\", dim = 64, layers = 1, mixer = { name = \"" +
                                mixer + "\", taps = 2 } }",
                            "consumer");
  auto model = ounce::registry<ounce::Model>().make(*spec.find("model"),
                                                    {.vocab = kVocab, .max_length = kLength});
  ounce::optim::FusedAdamW optimizer(*model, {.lr = 3e-3});
  double last = 0;
  for (int step = 0; step < 300; ++step) {
    const auto tokens = sequences();
    ounce::SequenceContext context;
    const auto hidden = model->hidden(tokens.slice(1, 0, kLength), context);
    auto targets = tokens.slice(1, 1).clone();
    targets.slice(1, 0, 1).fill_(-100);  // the second token follows from nothing
    const auto loss = model->loss_sum(hidden, targets) / (kBatch * (kLength - 1));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step >= 290) last += loss.item<double>() / 10;
  }
  return last;
}

}  // namespace

int main(int argc, char** argv) {
  ounce::register_builtins();
  ounce::registry<ounce::Mixer>().add({.name = "token_shift",
                                       .doc = "a linear map of the last few tokens",
                                       .defaults = "taps = 3  # tokens seen"},
                                      TokenShift::make);
  std::vector<std::string> mixers{"token_shift"};
  if (argc > 1) {
    ounce::load_plugin(argv[1]);
    mixers.push_back("token_shift_plugin");
  }
  for (const auto& mixer : mixers) {
    const double loss = train(mixer);
    std::cout << mixer << ": loss " << loss << ", at the start about " << std::log(double(kVocab))
              << std::endl;
    if (!(loss < 0.5)) return 1;
  }
  return 0;
}
