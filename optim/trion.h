// SPDX-License-Identifier: MIT
// Momentum, orthonormalised: Muon (Jordan et al. 2024), and Trion (Modoranu et al. 2025, arXiv
// 2505.17967), which orthonormalises only the basis vectors that hold most of the momentum.
#pragma once

#include <ounce/optim/dct.h>
#include <ounce/optim/fused_step.h>
#include <ounce/optim/named_optimizer.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ounce::optim {

// What the orthonormal step of a matrix [R, C] is multiplied by, beside the learning rate.
enum class StepScale {
  kOriginal,  // sqrt(max(1, R / C)), of Muon and Trion
  // 0.2 sqrt(max(R, C)): entries as large as AdamW's, whose learning rates then serve (Moonlight,
  // Liu et al. 2025)
  kMatchRmsAdamW,
  kSpectral,  // sqrt(R / C): the same change of the output's RMS for any shape (Dion, Ahn et al.
              // 2025)
  kNone,
};

struct TrionOptions {
  double lr = 0.01;            // >= 0
  double momentum = 0.95;      // in [0, 1)
  bool nesterov = false;       // a step along g + momentum b; with rank = 0 only
  double weight_decay = 0.01;  // >= 0, decoupled; norms, biases and embeddings take 0
  CheckFinite check_finite = CheckFinite::kOff;  // of the gradients
  int64_t rank = 256;        // columns kept of the smaller side; 0 or all of them = full rank
  double rank_fraction = 0;  // in (0, 1]: that share of it instead; 0 = rank
  Basis basis = Basis::kDct2;
  int64_t norm = 2;         // 1 or 2: by which columns are ranked
  Side side = Side::kAuto;  // which side is projected; auto: the smaller
  bool statistics = false;  // statistics() says what the columns hold
  Iteration iteration = Iteration::kQuintic;
  int64_t ns_steps = 5;
  StepScale scale = StepScale::kOriginal;
  // Rows of the matrices that are fused in one parameter, each of which is orthonormalised on its
  // own: {2048, 512, 512} for queries, keys and values; one number: so many rows each. Empty: one.
  std::vector<int64_t> split = {};
  // AdamW takes what is not orthonormalised: vectors, the names of `adamw_names`, sides over
  // `max_dim`, and all where `orthonormalize` is false. Its learning rate follows lr's schedule.
  bool orthonormalize = true;
  std::vector<std::string> adamw_names = {"*embed*", "head.*", "*.head.*", "*lm_head*"};  // globs
  int64_t max_dim = 32000;
  double adamw_lr = 3e-4;
  double beta1 = 0.9;                       // in [0, 1)
  double beta2 = 0.95;                      // in [0, 1)
  double eps = 1e-8;                        // > 0
  at::ScalarType state_dtype = at::kFloat;  // or kBFloat16, rounded stochastically
  bool stochastic_rounding = true;          // of bf16 parameters; false: to nearest
  int64_t seed = 0;                         // of that
  std::string implementation = "auto";      // auto | fused | reference, as of DctAdamW
  std::vector<NamedOptimizer::GroupRule> groups = {};
};

// For a matrix p [R, C] (parameters of more dimensions: [d_0, the rest]) with gradient g times
// control.grad_scale, Q the vectors that hold most of b (or its transpose, as in dct.h), s the
// scale:
//   b = m + g;  b' = b Q;   m = b - (1 - momentum) b' Q^T
//   p = (1 - lr weight_decay) p - lr s newton_schulz(b') Q^T
// and of full rank, where Q makes no difference:
//   b = m + g;  m = momentum b;  b' = b, with nesterov g + momentum b
// State per such parameter: momentum, as large as it; of the others AdamW's; in state_dtype
// (fp64 of fp64 parameters), all of it from construction on.
// Matrices of equal shape are orthonormalised together. No host synchronisation.
class Trion : public NamedOptimizer {
 public:
  explicit Trion(NamedParameters parameters, const TrionOptions& options = {});
  explicit Trion(const torch::nn::Module& module, const TrionOptions& options = {})
      : Trion(named_parameters(module), options) {}
  explicit Trion(const std::vector<at::Tensor>& parameters, const TrionOptions& options = {})
      : Trion(named_parameters(parameters), options) {}

  void visit_state(StateVisitor& visitor) override;
  // With `statistics`, of the matrices with a rank together, each in its last step that was not
  // skipped: captured_energy, the share of b^2 that b' holds, and residual_norm, the norm of what
  // it leaves.
  Statistics statistics() const override;

  bool orthonormalizes(const at::Tensor& parameter) const;

 protected:
  // `options`: without a rank, Muon's.
  Trion(const char* name, NamedParameters parameters, const Options& options, double lr,
        const std::vector<GroupRule>& groups);
  void update(const StepControl& control) override;

 private:
  struct Slot {
    at::Tensor step;
    at::Tensor momentum;             // undefined where AdamW steps,
    at::Tensor exp_avg, exp_avg_sq;  // which has these
    at::Tensor measured;             // fp32 [2]: the squares that b' and b hold; or undefined
  };
  // Matrices of equal shape and settings.
  struct Bucket {
    struct Piece {
      size_t parameter;  // in parameters()
      int64_t from;      // row
      size_t stream;     // of its rounding
    };
    size_t group;
    int64_t rows, columns;
    std::vector<Piece> pieces;
  };
  FusedTrion fused_trion(const Bucket& bucket) const;
  FusedMomentum matrix_of(const Bucket& bucket, const Bucket::Piece& piece) const;
  // As takes_fused(); index: of the matrix's parameter.
  bool fuses(const Bucket& bucket, size_t index, const FusedMomentum& matrix,
             const FusedTrion& how) const;
  using Measured = std::map<size_t, at::Tensor>;  // of parameters, in this step
  Bucket fused_step(const Bucket& bucket, const StepControl& control, Measured& measured);
  void update_group(size_t group, const StepControl& control,
                    const std::vector<bool>& has_composed);
  // The composed step of Bucket::pieces[from] up to `to`
  void orthonormal_step(const Bucket& bucket, size_t from, size_t to, const StepControl& control,
                        Measured& measured);

  const char* name_;
  double lr_;                           // of no group
  std::vector<Slot> slots_;             // as parameters()
  std::vector<TrionOptions> settings_;  // as param_groups()
  std::vector<Bucket> buckets_;
  FusedSteps fused_;
};

// Trion of full rank with the defaults of Muon.
struct MuonOptions {
  double lr = 0.02;            // >= 0
  double momentum = 0.95;      // in [0, 1)
  bool nesterov = true;        // a step along g + momentum b
  double weight_decay = 0.01;  // >= 0, decoupled; norms, biases and embeddings take 0
  CheckFinite check_finite = CheckFinite::kOff;  // of the gradients
  Iteration iteration = Iteration::kQuintic;
  int64_t ns_steps = 5;
  StepScale scale = StepScale::kOriginal;
  std::vector<int64_t> split = {};  // as of Trion, and so are the others
  bool orthonormalize = true;
  std::vector<std::string> adamw_names = TrionOptions().adamw_names;
  int64_t max_dim = 32000;
  double adamw_lr = 3e-4;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  at::ScalarType state_dtype = at::kFloat;  // or kBFloat16, rounded stochastically
  bool stochastic_rounding = true;          // of bf16 parameters; false: to nearest
  int64_t seed = 0;
  std::string implementation = "auto";  // auto | fused | reference, as of DctAdamW
  std::vector<NamedOptimizer::GroupRule> groups = {};
};

class Muon : public Trion {
 public:
  explicit Muon(NamedParameters parameters, const MuonOptions& options = {});
  explicit Muon(const torch::nn::Module& module, const MuonOptions& options = {})
      : Muon(named_parameters(module), options) {}
  explicit Muon(const std::vector<at::Tensor>& parameters, const MuonOptions& options = {})
      : Muon(named_parameters(parameters), options) {}
};

// Adds `trion` and `muon` to the registry.
void register_trion();

}  // namespace ounce::optim
