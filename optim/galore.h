// SPDX-License-Identifier: MIT
// Adam in the subspace of a gradient's leading singular vectors, found anew every so often (GaLore,
// Zhao et al. 2024, arXiv 2403.03507). Beside DctAdamW so that like can be compared with like.
#pragma once

#include <ounce/optim/dct.h>
#include <ounce/optim/fused_step.h>
#include <ounce/optim/named_optimizer.h>

#include <cstdint>
#include <vector>

namespace ounce::optim {

// How the leading singular vectors are found.
enum class Subspace {
  kSvd,         // by a full decomposition, which on a GPU waits for the host
  kRandomized,  // in the range of the gradient times a random matrix (Halko et al. 2011)
};

struct GaLoreOptions {
  double lr = 0.01;         // >= 0
  double beta1 = 0.9;       // in [0, 1)
  double beta2 = 0.999;     // in [0, 1)
  double eps = 1e-8;        // > 0
  double weight_decay = 0;  // >= 0, decoupled; norms, biases and embeddings take 0
  CheckFinite check_finite = CheckFinite::kOff;  // of the gradients
  int64_t rank = 128;                            // columns kept of the smaller side
  double rank_fraction = 0;                      // in (0, 1]: that share of it instead; 0 = rank
  int64_t update_interval = 200;                 // gradients between choices of the subspace
  double scale = 0.25;                           // >= 0, of the projected step
  Subspace subspace = Subspace::kSvd;
  Side side = Side::kAuto;  // which side is projected; auto: the smaller
  bool project = true;      // false: AdamW
  int64_t min_dim = 0;      // matrices with a smaller side take AdamW; 0 = twice the rank
  int64_t max_dim = 32000;  // so do those with a larger one: embeddings and heads
  at::ScalarType state_dtype = at::kFloat;  // or kBFloat16, rounded stochastically
  bool stochastic_rounding = true;          // of bf16 parameters; false: to nearest
  int64_t seed = 0;                         // of that
  std::string implementation =
      "auto";  // auto | fused | reference, as of DctAdamW, of what is not projected
  std::vector<NamedOptimizer::GroupRule> groups = {};
};

// As DctAdamW (p, g, a and u are of its text), with Q [n, rank] of the singular vectors:
//   p = (1 - lr weight_decay) p - lr scale u Q^T
// Moments stay in their columns when Q changes, as published. State per projected parameter:
// exp_avg, exp_avg_sq [long side, rank] in state_dtype (fp64 of fp64
// parameters), basis [n, rank] in fp32 (fp64), step, all from construction on.
class GaLore : public NamedOptimizer {
 public:
  explicit GaLore(NamedParameters parameters, const GaLoreOptions& options = {});
  explicit GaLore(const torch::nn::Module& module, const GaLoreOptions& options = {})
      : GaLore(named_parameters(module), options) {}
  explicit GaLore(const std::vector<at::Tensor>& parameters, const GaLoreOptions& options = {})
      : GaLore(named_parameters(parameters), options) {}

  void visit_state(StateVisitor& visitor) override;

  // Q; undefined where a parameter is not projected.
  at::Tensor basis_of(const at::Tensor& parameter) const;

 protected:
  void update(const StepControl& control) override;

 private:
  struct Slot {
    at::Tensor step, exp_avg, exp_avg_sq;
    at::Tensor basis;         // undefined where not projected
    int64_t gradients = 0;    // so many have come
    bool transposed = false;  // the projected side is the rows
  };

  std::vector<Slot> slots_;              // as parameters()
  std::vector<GaLoreOptions> settings_;  // as param_groups()
  FusedSteps fused_;
};

// Adds `galore` to the registry.
void register_galore();

}  // namespace ounce::optim
