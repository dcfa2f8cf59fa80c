// SPDX-License-Identifier: MIT
// A plain LibTorch loop that saves beside its steps, is killed in the middle, and goes on bit for
// bit: trained twice, once in one go and once with kill -9, the weights come out the same.
#include <ounce/ckpt/checkpointer.h>
#include <ounce/optim/fused_adamw.h>
#include <signal.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <filesystem>
#include <iostream>

namespace {

struct State : ounce::Stateful {  // what has to survive: weights, moments, the step
  torch::nn::Sequential model{torch::nn::Linear(8, 32), torch::nn::Tanh(),
                              torch::nn::Linear(32, 1)};
  ounce::optim::FusedAdamW optimizer{*model, {.lr = 1e-2}};
  int64_t step = 0;

  void visit_state(ounce::StateVisitor& visitor) override {
    visitor.integer("step", step);
    {
      const auto scope = visitor.scope("model");
      ounce::visit_module(*model, visitor);
    }
    const auto scope = visitor.scope("optim");
    optimizer.visit_state(visitor);
  }
};

// Trains up to `steps`, from the newest checkpoint in `folder` on; dies behind step `last`.
at::Tensor train(const std::string& folder, int64_t steps, int64_t last) {
  torch::manual_seed(1);
  State state;
  ounce::ckpt::Checkpointer checkpoints({.levels = {{.path = folder}}});
  if (!ounce::ckpt::list_checkpoints(folder).empty()) {
    const auto report = ounce::ckpt::load_checkpoint(folder, std::nullopt, {{"", &state}});
    std::cout << "goes on from step " << report.info.step << std::endl;
  }
  while (state.step < steps) {
    torch::manual_seed(1000 + state.step);  // data that follows from the step alone
    const auto x = torch::randn({64, 8}), y = x.sin().sum(1, /*keepdim=*/true);
    state.optimizer.zero_grad();
    torch::mse_loss(state.model->forward(x), y).backward();
    {
      const ounce::ckpt::StepGuard guard(checkpoints);  // waits for copies, as far as it must
      state.optimizer.step();
    }
    if (++state.step % 10 == 0) checkpoints.save(state.step, {{"", &state}});
    if (state.step == last) ::raise(SIGKILL);
  }
  return torch::nn::utils::parameters_to_vector(state.model->parameters()).detach();
}

}  // namespace

int main() {
  const auto folder =
      std::filesystem::temp_directory_path() / ("ounce-resume-" + std::to_string(::getpid()));
  if (const auto child = ::fork(); child == 0) {
    train(folder / "killed", 100, 57);
  } else {
    ::waitpid(child, nullptr, 0);
  }
  const auto resumed = train(folder / "killed", 100, -1);
  const bool same = torch::equal(resumed, train(folder / "whole", 100, -1));
  std::filesystem::remove_all(folder);
  std::cout << (same ? "the weights are the same, bit for bit" : "the weights differ") << std::endl;
  return same ? 0 : 1;
}
