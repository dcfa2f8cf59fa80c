// SPDX-License-Identifier: MIT
// AdamW (Loshchilov and Hutter 2019, algorithm 2) in one launch a group, on ATen's fused kernel.
#pragma once

#include <ounce/optim/fused_step.h>
#include <ounce/optim/named_optimizer.h>

#include <cstdint>
#include <vector>

namespace ounce::optim {

struct AdamWOptions {
  double lr = 1e-3;           // >= 0
  double beta1 = 0.9;         // decay of the first moment, in [0, 1)
  double beta2 = 0.95;        // decay of the second moment, in [0, 1)
  double eps = 1e-8;          // > 0, added to the root of the second moment
  double weight_decay = 0.1;  // >= 0, decoupled; norms, biases and embeddings take 0
  CheckFinite check_finite = CheckFinite::kOff;  // of the gradients
  bool amsgrad = false;                          // divide by the largest second moment so far
  bool maximize = false;                         // climb
  at::ScalarType state_dtype = at::kFloat;       // or kBFloat16, rounded stochastically
  bool stochastic_rounding = true;               // of bf16 parameters; false: to nearest
  int64_t seed = 0;                              // of that
  std::string implementation = "auto";           // auto | fused | reference: of what is rounded
  std::vector<NamedOptimizer::GroupRule> groups = {};
};

// With bias correction, t the parameter's own step count from 1 and g the gradient times
// control.grad_scale:
//   p -= lr weight_decay p;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// Parameters are fp32, fp64 or bf16, dense, on a CPU or a GPU; fp16 ones are refused by name. State
// per parameter, in its layout: exp_avg, exp_avg_sq (max_exp_avg_sq with amsgrad) in state_dtype
// (fp64 of fp64 parameters), and step, one fp32: 8 bytes a weight in fp32 (12 with amsgrad), 4 in
// bf16, and 4 a tensor, allocated at construction; a step allocates only scalars (and a copy of a
// gradient whose layout is not its parameter's). fp32 and fp64 with a state of their own dtype take
// LibTorch's fused kernel: where control.grad_scale is given, .grad holds the scaled gradients
// after a step that was not skipped, as after clip_grad_norm_; otherwise gradients are not written.
// What is rounded takes one launch of ours on a Hopper GPU and is composed elsewhere, without
// amsgrad and maximize.
class FusedAdamW : public NamedOptimizer {
 public:
  explicit FusedAdamW(NamedParameters parameters, const AdamWOptions& options = {});
  explicit FusedAdamW(const torch::nn::Module& module, const AdamWOptions& options = {})
      : FusedAdamW(named_parameters(module), options) {}
  explicit FusedAdamW(const std::vector<at::Tensor>& parameters, const AdamWOptions& options = {})
      : FusedAdamW(named_parameters(parameters), options) {}

  void visit_state(StateVisitor& visitor) override;

 protected:
  void update(const StepControl& control) override;

 private:
  struct Slot {
    at::Tensor step, exp_avg, exp_avg_sq, max_exp_avg_sq;
  };
  struct Lists;  // what one call of LibTorch's kernel takes: one device, one dtype

  std::vector<Lists> gather(const torch::optim::OptimizerParamGroup& group) const;
  void update_rounded(size_t group, const StepControl& control);

  std::vector<Slot> slots_;             // as parameters()
  std::vector<AdamWOptions> settings_;  // as param_groups()
  FusedSteps fused_;
};

// Adds `adamw` to the registry.
void register_adamw();

}  // namespace ounce::optim
