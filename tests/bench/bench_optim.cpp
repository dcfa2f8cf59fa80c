// SPDX-License-Identifier: MIT
#include "bench_optim.h"

#include <ounce/core/device.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/galore.h>
#include <ounce/optim/trion.h>
#include <torch/torch.h>

#include <cstdio>
#include <memory>
#include <string>

#include "bench.h"

namespace ounce::bench {

namespace {

using optim::NamedOptimizer;
using optim::NamedParameters;

NamedParameters model(at::Device device, int64_t layers, int64_t width, int64_t inner) {
  NamedParameters all;
  const auto add = [&](const std::string& name, int64_t rows, int64_t columns) {
    const auto options = torch::device(device).dtype(at::kBFloat16);
    auto parameter = torch::randn({rows, columns}, options).mul_(0.02).requires_grad_();
    parameter.mutable_grad() = torch::randn({rows, columns}, options).mul_(1e-3);
    all.emplace_back(name, parameter);
  };
  for (int64_t i = 0; i < layers; ++i) {
    const auto layer = "layers." + std::to_string(i) + ".";
    for (const char* name : {"q", "k", "v", "o"}) add(layer + name + ".weight", width, width);
    for (const char* name : {"gate", "up"}) add(layer + name + ".weight", inner, width);
    add(layer + "down.weight", width, inner);
  }
  return all;
}

// LibTorch's kernel on the same tensors, with moments of their dtype.
class TorchAdamW {
 public:
  explicit TorchAdamW(const NamedParameters& parameters) {
    for (const auto& [name, parameter] : parameters) {
      parameters_.push_back(parameter.detach());
      gradients_.push_back(parameter.grad());
      first_.push_back(torch::zeros_like(parameter.detach()));
      second_.push_back(torch::zeros_like(parameter.detach()));
      steps_.push_back(
          torch::zeros({}, parameter.options().dtype(at::kFloat).requires_grad(false)));
    }
  }
  void step() {
    at::_foreach_add_(steps_, 1);
    at::_fused_adamw_(parameters_, gradients_, first_, second_, {}, steps_, 1e-4, 0.9, 0.999, 0.1,
                      1e-8, false, false);
  }
  int64_t state_bytes() const {
    return static_cast<int64_t>(bytes_of(first_) + bytes_of(second_) + bytes_of(steps_));
  }

 private:
  std::vector<at::Tensor> parameters_, gradients_, first_, second_, steps_;
};

struct Timed {
  std::string name;
  std::function<void()> step;
  int64_t state_bytes = 0, peak_bytes = 0;
  std::vector<double> seconds = {};
};

// Steps as in training, where nobody reads the gradients after them.
template <class O, class Options>
Timed ours(const std::string& name, const NamedParameters& parameters, const Options& options) {
  auto optimizer = std::make_shared<O>(parameters, options);
  return {name, [optimizer] { optimizer->step({.consume_gradients = true}); },
          optimizer->state_bytes()};
}

std::vector<Timed> optimizers(const NamedParameters& parameters, bool cuda) {
  std::vector<Timed> all;
  const int64_t rank = cuda ? 256 : 16;
  auto torch_adamw = std::make_shared<TorchAdamW>(parameters);
  all.push_back({"torch fused AdamW", [=] { torch_adamw->step(); }, torch_adamw->state_bytes()});
  optim::AdamWOptions adamw;
  adamw.state_dtype = at::kBFloat16;
  all.push_back(ours<optim::FusedAdamW>("adamw, bf16 moments", parameters, adamw));
  optim::DctAdamWOptions dct;
  dct.rank = rank;
  all.push_back(ours<optim::DctAdamW>("dct_adamw, fp32 moments", parameters, dct));
  dct.state_dtype = at::kBFloat16;
  all.push_back(ours<optim::DctAdamW>("dct_adamw", parameters, dct));
  dct.residual = optim::Residual::kErrorFeedback;
  dct.residual_type = optim::ResidualType::kInt8;
  all.push_back(ours<optim::DctAdamW>("dct_adamw, int8 feedback", parameters, dct));
  dct.residual_type = optim::ResidualType::kBf16;
  all.push_back(ours<optim::DctAdamW>("dct_adamw, bf16 feedback", parameters, dct));
  dct.residual = optim::Residual::kNone;
  dct.update_interval = 10;
  all.push_back(ours<optim::DctAdamW>("dct_adamw, every 10th", parameters, dct));
  optim::TrionOptions trion;
  trion.rank = rank;
  trion.state_dtype = at::kBFloat16;
  all.push_back(ours<optim::Trion>("trion", parameters, trion));
  trion.iteration = optim::Iteration::kGram;
  all.push_back(ours<optim::Trion>("trion, gram", parameters, trion));
  optim::MuonOptions muon;
  muon.state_dtype = at::kBFloat16;
  all.push_back(ours<optim::Muon>("muon", parameters, muon));
  return all;
}

}  // namespace

void run_optim(at::Device device, bool smoke,
               const std::function<void(nlohmann::ordered_json)>& emit) {
  const bool large = device.is_cuda() && !smoke;
  torch::manual_seed(1);
  const auto parameters = large ? model(device, 24, 2048, 5632) : model(device, 2, 64, 176);
  auto all = optimizers(parameters, device.is_cuda() && large);
  std::vector<at::Tensor> gradients, given;
  for (const auto& [name, parameter] : parameters) {
    gradients.push_back(parameter.grad());
    given.push_back(parameter.grad().clone());
  }
  for (auto& timed : all) {
    timed.step();  // what libraries keep is theirs
    const auto before = memory_use(device).current;
    reset_peak_memory(device);
    timed.step();
    timed.peak_bytes = memory_use(device).peak - before;
    at::_foreach_copy_(gradients, given);
  }
  for (int round = 0; round < (large ? 15 : 2); ++round) {
    for (auto& timed : all) {
      timed.seconds.push_back(seconds_of(timed.step, device));
      at::_foreach_copy_(gradients, given);
      synchronize(device);
    }
  }
  const double torch_ms = median(all[0].seconds) * 1e3;
  std::printf("\n%-8s %-26s %9s %9s %10s %10s\n", "family", "optimizer", "ms", "/ torch",
              "state MiB", "peak MiB");
  for (const auto& timed : all) {
    const double ms = median(timed.seconds) * 1e3;
    std::printf("%-8s %-26s %9.3f %9.3f %10.1f %10.1f\n", "optim", timed.name.c_str(), ms,
                ms / torch_ms, double(timed.state_bytes) / (1 << 20),
                double(timed.peak_bytes) / (1 << 20));
    emit({{"t", "optim"},
          {"optimizer", timed.name},
          {"matrices", parameters.size()},
          {"ms", ms},
          {"torch_ms", torch_ms},
          {"of_torch", ms / torch_ms},
          {"state_bytes", timed.state_bytes},
          {"peak_bytes", timed.peak_bytes},
          {"rounds", timed.seconds.size()}});
  }
}

}  // namespace ounce::bench
