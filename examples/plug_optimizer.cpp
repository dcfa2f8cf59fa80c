// SPDX-License-Identifier: MIT
// A plain LibTorch model and loop whose AdamW is exchanged for DCT-AdamW: what changes is one line
// and the memory of the optimizer.
#include <ounce/optim/dct_adamw.h>
#include <torch/torch.h>

#include <cstdio>
#include <functional>
#include <memory>

namespace {

// Smooth functions of 64 numbers, learnt by a perceptron.
struct Net : torch::nn::SequentialImpl {
  Net()
      : SequentialImpl(torch::nn::Linear(64, 512), torch::nn::GELU(), torch::nn::Linear(512, 512),
                       torch::nn::GELU(), torch::nn::Linear(512, 8)) {}
};

int64_t bytes_of(const torch::optim::AdamW& optimizer) {
  int64_t bytes = 0;
  for (const auto& [key, state] : optimizer.state()) {
    const auto& adamw = static_cast<const torch::optim::AdamWParamState&>(*state);
    bytes += static_cast<int64_t>(adamw.exp_avg().nbytes() + adamw.exp_avg_sq().nbytes());
  }
  return bytes;
}

using Make = std::function<std::unique_ptr<torch::optim::Optimizer>(Net&)>;

// The loss before and after, and the optimizer.
std::unique_ptr<torch::optim::Optimizer> train(const char* name, const Make& make) {
  torch::manual_seed(1);
  Net net;
  auto optimizer = make(net);
  float first = 0, last = 0;
  for (int step = 0; step < 200; ++step) {
    const auto x = torch::randn({256, 64});
    const auto y = torch::sin(2 * x.unflatten(1, {8, 8}).mean(2));
    optimizer->zero_grad();
    const auto loss = torch::mse_loss(net.forward(x), y);
    loss.backward();
    optimizer->step();
    last = loss.item<float>();
    if (step == 0) first = last;
  }
  std::printf("%-10s loss %.3f -> %.3f", name, first, last);
  return optimizer;
}

}  // namespace

int main() {
  const auto adamw = train("AdamW", [](Net& net) {
    return std::make_unique<torch::optim::AdamW>(net.parameters(), 2e-3);
  });
  const auto full = bytes_of(static_cast<const torch::optim::AdamW&>(*adamw));
  std::printf(", %5.0f KiB of moments\n", static_cast<double>(full) / 1024);

  const auto dct = train("DctAdamW", [](Net& net) {
    return std::make_unique<ounce::optim::DctAdamW>(
        net, ounce::optim::DctAdamWOptions{.lr = 2e-3, .rank = 16});
  });
  const auto low = static_cast<const ounce::optim::DctAdamW&>(*dct).state_bytes();
  std::printf(", %5.0f KiB\n", static_cast<double>(low) / 1024);
  return low < full / 4 ? 0 : 1;
}
