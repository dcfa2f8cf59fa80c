// SPDX-License-Identifier: MIT
// Adam in the subspace of the basis vectors that hold most of each gradient (DCT-AdamW, Modoranu et
// al. 2025, arXiv 2505.17967): moments of `rank` columns instead of all.
#pragma once

#include <ounce/optim/dct.h>
#include <ounce/optim/fused_step.h>
#include <ounce/optim/named_optimizer.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ounce::optim {

// What becomes of g - g Q Q^T, which the projection leaves out.
enum class Residual {
  kNone,           // it is dropped
  kErrorFeedback,  // added to the next gradient; costs residual_type for each weight
  kSign,           // a step of residual_scale times its signs (FRUGAL, Zmushko et al. 2024)
  // A step of it, each row of the long side scaled as Adam scaled the row's projection, and its
  // norm at most 1.01 times that of the step before (Fira, Chen et al. 2024).
  kFira,
};

// In which error feedback is kept.
enum class ResidualType {
  kFp32,  // fp64 of fp64 parameters
  kBf16,  // rounded stochastically
  kInt8,  // with a scale for every 128 neighbours of a row
};

struct DctAdamWOptions {
  double lr = 1e-3;            // >= 0
  double beta1 = 0.9;          // in [0, 1)
  double beta2 = 0.999;        // in [0, 1)
  double eps = 1e-8;           // > 0
  double weight_decay = 0.01;  // >= 0, decoupled; norms, biases and embeddings take 0
  CheckFinite check_finite = CheckFinite::kOff;  // of the gradients
  int64_t rank = 256;                            // columns kept of the smaller side
  double rank_fraction = 0;                      // in (0, 1]: that share of it instead; 0 = rank
  int64_t update_interval = 1;                   // gradients between choices of the columns
  Basis basis = Basis::kDct2;
  int64_t norm = 2;         // 1 or 2: by which columns are ranked
  Side side = Side::kAuto;  // which side is projected; auto: the smaller
  // Moments follow their basis vectors when the choice changes. Without, each keeps its place and
  // goes on with another vector's history.
  bool rotate = true;
  Residual residual = Residual::kNone;
  double residual_scale = 1;  // >= 0, of Residual::kSign
  ResidualType residual_type = ResidualType::kFp32;
  // A column that was not there before begins with a second moment of its present mean square, as
  // if it had been there with that; without, with 0, and its first update is several times too
  // large.
  bool estimate_fresh_columns = true;
  bool project = true;      // false: AdamW
  int64_t min_dim = 0;      // matrices with a smaller side take AdamW; 0 = twice the rank
  int64_t max_dim = 32000;  // so do those with a larger one: embeddings and heads
  at::ScalarType state_dtype = at::kFloat;  // or kBFloat16, rounded stochastically
  bool statistics = false;                  // measure what the columns hold, see statistics()
  bool stochastic_rounding = true;          // of bf16 parameters; false: to nearest
  int64_t seed = 0;                         // of that
  // auto | fused | reference. Fused: on a Hopper GPU, a few launches for all parameters of a shape;
  // it takes fp32 and bf16, the bases dct2 and identity, ranks of 16 n up to 256, sides of 8 n that
  // have no prime factor over 11 where they are projected, and as residual kErrorFeedback alone, in
  // kInt8 of rows of 16 n. At construction "fused" throws for others, with Fault::kUsage; on a GPU
  // "auto" warns once a reason (OUNCE_STRICT=1: throws) and composes them.
  std::string implementation = "auto";
  std::vector<NamedOptimizer::GroupRule> groups = {};
};

// For a matrix p with gradient g times control.grad_scale, its projected side last (p, g: their
// transposes where that is the rows), Q [n, rank] the chosen vectors, t its step count from 1:
//   g = g + e;  e = g - g Q Q^T                                             (kErrorFeedback)
//   a = g Q;    m = beta1 m + (1 - beta1) a;    v = beta2 v + (1 - beta2) a^2
//   u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
//   p = (1 - lr weight_decay) p - lr (u Q^T + the residual's step)
// Parameters of more than two dimensions are matrices [d_0, the rest]. What is not projected takes
// the same without Q: AdamW. State per projected parameter: exp_avg, exp_avg_sq [long side, rank],
// indices [rank] int32, step, with kErrorFeedback residual, with kFira residual_norm, all
// from construction on: moments in state_dtype (fp64 of fp64 parameters), the residual in
// residual_type, with kInt8 residual_scales [rows, blocks] fp32. No
// host synchronisation, so a choice of columns that falls on a skipped step waits for the next one.
class DctAdamW : public NamedOptimizer {
 public:
  explicit DctAdamW(NamedParameters parameters, const DctAdamWOptions& options = {});
  explicit DctAdamW(const torch::nn::Module& module, const DctAdamWOptions& options = {})
      : DctAdamW(named_parameters(module), options) {}
  explicit DctAdamW(const std::vector<at::Tensor>& parameters, const DctAdamWOptions& options = {})
      : DctAdamW(named_parameters(parameters), options) {}

  void visit_state(StateVisitor& visitor) override;

  // With the option, over all projected parameters, of the last choice of columns that was no
  // accumulated one:
  // captured_energy, the share of the gradients' square sum that the columns hold; index_churn, the
  // share of columns that are new; residual_norm, of what the columns leave out.
  Statistics statistics() const override;

  // The first gradient of a step chooses the columns. Fault::kUsage with a residual, which is a
  // matter of all columns.
  bool accumulate(const at::Tensor& parameter) override;

  // The numbers of the basis vectors that a parameter's moments belong to, [rank] int32 ascending;
  // undefined where it is not projected.
  at::Tensor indices_of(const at::Tensor& parameter) const;

 protected:
  void update(const StepControl& control) override;

 private:
  // Of a gradient's projection.
  struct Columns {
    at::Tensor indices;
    bool chosen = false;  // for it
  };
  struct Slot {
    size_t group = 0;
    at::Tensor step, exp_avg, exp_avg_sq;
    at::Tensor indices;                                   // undefined where not projected
    at::Tensor residual, residual_scales, residual_norm;  // undefined without those modes
    int64_t gradients = 0;                                // so many have come
    at::Tensor pending;                                   // accumulated projections, or undefined
    Columns pending_columns;                              // that they are of
    at::Tensor measured;      // fp32 [3]: square sums held and in all, new columns; or undefined
    bool transposed = false;  // the projected side is the rows
  };
  struct Step;  // what one composed step does to one parameter
  struct Alike;
  struct Batch;
  // Those of `list` that take a fused step; the others step.
  std::map<Alike, Batch> fused_of(const std::vector<size_t>& list, size_t group_index,
                                  const StepControl& control);
  FusedTensor tensor_of(size_t index) const;
  bool fuses(size_t index, const FusedTensor& tensor) const;  // as takes_fused()
  static Columns next_columns(Slot& slot, const at::Tensor& g, const DctAdamWOptions& options);

  std::vector<Slot> slots_;                // as parameters()
  std::vector<DctAdamWOptions> settings_;  // as param_groups()
  // Of each group: what is projected by its shape, and the others. The shortest list first, so that
  // a GPU has work while the host prepares the longer ones.
  std::vector<std::vector<std::vector<size_t>>> lists_;
  FusedSteps fused_;
};

// Adds `dct_adamw` to the registry.
void register_dct_adamw();

}  // namespace ounce::optim
