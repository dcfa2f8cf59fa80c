// SPDX-License-Identifier: MIT
// Linear layer and cross-entropy as one operator that never holds the logits of all tokens (Cut
// Cross-Entropy, Wijmans et al. 2024). For token m with hidden state x_m, classifier rows C_j,
// target y, weight t_m and class weights w:
//
// clang-format off
//   u_j  = logit_scale (x_m . C_j + b_j)
//   z_j  = softcap tanh(u_j / softcap), or u_j when off
//   L    = log sum_j exp z_j
//   q_j  = (1 - a) [j = y] + a / V                                   (a: smoothing)
//   row  = t_m (sum_j q_j w_j (L - z_j) + z_loss L^2)
//   loss = row | sum_m row | sum_m row / sum_m t_m w_y               (none | sum | mean)
// clang-format on
//
// over the counted tokens: those whose target is not ignore_index. The other rows have loss 0 and
// gradient 0 whatever they hold, NaN included; without a counted token the loss is 0 (see
// empty_is_nan). With weights at their defaults, -row is the token's log-probability.
//
// Computed in fp32 for fp16, bf16 and fp32, in fp64 for fp64; the weight's gradient is accumulated
// in that precision. Extra memory: workspace_bytes, and an accumulator of V*D*4 bytes when the
// weight has 16 bits; README.md has it exactly. Never synchronises the
// host, except with validate_targets. A second backward over a retained graph is allowed; double
// backward throws.
//
// For Python: torch.ops.ounce.linear_cross_entropy.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>

namespace ounce {

enum class Reduction { kNone, kMean, kSum };

// Which gradients leave out what is negligible. The probabilities are cut in tiles of 128 tokens
// (of the flattened order) by 128 vocabulary entries; a tile is dropped, all its entries of
// dloss/dlogits taken as 0, when it holds no counted token's target and every counted token's
// probability in it is under filter_eps; a target outside [0, V) keeps all. Filtering the weight's
// gradient leaves rare classes without any: wrong for training from scratch.
enum class GradMode {
  kExact,         // none
  kFilterHidden,  // the hidden state's
  kFilter,        // the hidden state's, the weight's and the bias's
};

// How the gradients of a sum or a mean are made: a matter of time and memory.
enum class Recompute {
  kAuto,   // kNever where the fused path does it in three products and there is no main_grad, else
           // kAlways
  kNever,  // by forward, which holds them until backward; as kAlways with an fp16 weight
  // By backward, from logits made again: a fourth product. Also with Reduction::kNone, and for the
  // gradient of lse.
  kAlways
};

struct LinearCrossEntropyOptions {
  TORCH_ARG(int64_t, ignore_index) = -100;
  TORCH_ARG(Reduction, reduction) = Reduction::kMean;
  // The mean of no counted token is NaN, as in PyTorch, instead of 0; its gradient is 0 either way.
  TORCH_ARG(bool, empty_is_nan) = false;
  // Target t is predicted from position t - shift of the last token dimension, which has length T:
  // 0 <= shift < T. Whatever is per token stays at the target's place; the first `shift` are
  // ignored.
  TORCH_ARG(int64_t, shift) = 0;
  TORCH_ARG(double, label_smoothing) = 0;  // a, in [0, 1]
  TORCH_ARG(double, z_loss) = 0;           // >= 0
  TORCH_ARG(double, softcap) = 0;          // >= 0, 0 = off
  TORCH_ARG(double, logit_scale) = 1;      // finite, 1 / temperature
  TORCH_ARG(GradMode, grad_mode) = GradMode::kExact;
  // > 0; absent: epsilon of hidden's dtype / 32 (2^-12 for bf16).
  TORCH_ARG(std::optional<double>, filter_eps) = std::nullopt;
  TORCH_ARG(bool, return_lse) = false;  // differentiable
  TORCH_ARG(bool, return_z_loss) = false;
  TORCH_ARG(bool, return_log_prob) = false;
  TORCH_ARG(bool, return_entropy) = false;  // differentiable
  TORCH_ARG(bool, return_correct) = false;
  // Throws for a target that is neither ignore_index nor in [0, V); synchronises the host. Without
  // it such a target makes its row's loss, and every gradient it touches, NaN.
  TORCH_ARG(bool, validate_targets) = false;

  // [V, D] contiguous, 16-byte aligned, fp32 (fp64 for fp64 inputs): backward adds the weight's
  // gradient to it, with neither a gradient nor a sum in memory beside it; the weight itself gets
  // none. With Recompute::kNever, which would have to add before the upstream is known, it throws.
  TORCH_ARG(at::Tensor, main_grad);

  // These change time, memory and rounding only.
  // -1: 128 MiB on a CPU, 128 to 512 MiB for the fused path's backward, at most 2.5 GiB where its
  // forward makes the gradients, else 512 MiB.
  TORCH_ARG(int64_t, workspace_bytes) = -1;
  TORCH_ARG(Recompute, recompute) = Recompute::kAuto;
  TORCH_ARG(bool, deterministic) = true;
  TORCH_ARG(at::ScalarType, accum) = at::kFloat;  // of the gradients; fp64 inputs use fp64
  // auto | fused | reference. Fused: bf16 or fp16 hidden on a Hopper GPU; with a filter a bf16 sum
  // or mean without bias, smoothing, return_correct and return_entropy, whose gradients forward
  // makes. "fused" throws where that does not fit; "auto" takes the reference, and on a GPU warns
  // once for each reason (OUNCE_STRICT=1: throws).
  TORCH_ARG(std::string, implementation) = "auto";
};

// Tensors that were not asked for are undefined. "Per token" has the target's shape. Floating
// tensors are fp32, or fp64 for fp64 inputs; only loss, lse and entropy carry gradients.
struct LinearCrossEntropyOutput {
  at::Tensor loss;     // scalar, or per token with Reduction::kNone
  at::Tensor n_valid;  // int64 scalar: counted tokens
  at::Tensor lse;      // L per token, 0 where ignored
  // log p_y per token, 0 where ignored: -row of an unweighted, unsmoothed Reduction::kNone, which
  // carries a gradient.
  at::Tensor log_prob;
  at::Tensor entropy;       // -sum_j p_j log p_j per token, 0 where ignored
  at::Tensor z_loss;        // the share of z_loss in loss, reduced as loss is
  at::Tensor correct;       // bool per token: the first largest logit is the target's
  at::Tensor dropped_mass;  // per token, with a filter: sum of the probabilities in dropped tiles
};

// hidden [..., D] fp16, bf16, fp32 or fp64; weight [V, D] of the same dtype, or fp32 with a 16-bit
// hidden; target [...] int32 or int64, hidden's shape without D; bias [V] of weight's dtype;
// token_weight [...] and class_weight [V] floating, without gradient. Any strides. Under autocast,
// hidden is cast and weight is not: it is read in slabs. Gradients come in the inputs' dtypes.
// Throws Fault::kUsage for shapes, dtypes, devices or options that do not fit.
LinearCrossEntropyOutput linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                              const at::Tensor& target,
                                              const std::optional<at::Tensor>& bias = {},
                                              const std::optional<at::Tensor>& token_weight = {},
                                              const std::optional<at::Tensor>& class_weight = {},
                                              const LinearCrossEntropyOptions& options = {});

struct LinearCrossEntropyModuleOptions {
  LinearCrossEntropyModuleOptions(int64_t dim, int64_t vocab) : dim_(dim), vocab_(vocab) {}

  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, vocab);
  TORCH_ARG(bool, bias) = false;
  TORCH_ARG(LinearCrossEntropyOptions, loss);
};

// A classifier with its loss. weight [V, D] is its own, from N(0, 1 / D), or `tied`: the same
// tensor as another module's parameter (an embedding's), registered here too. bias [V] starts at
// zero.
class LinearCrossEntropyImpl : public torch::nn::Module {
 public:
  explicit LinearCrossEntropyImpl(LinearCrossEntropyModuleOptions options, at::Tensor tied = {});

  LinearCrossEntropyOutput forward(const at::Tensor& hidden, const at::Tensor& target,
                                   const std::optional<at::Tensor>& token_weight = {});
  double flops(int64_t tokens) const;  // of forward: 2 tokens V D

  LinearCrossEntropyModuleOptions options;
  at::Tensor weight, bias;
};
TORCH_MODULE(LinearCrossEntropy);

// Registers the losses "cce" (this operator) and "cross_entropy" (the same value from the logits of
// all tokens at once). Part of register_builtins().
void register_cce();

}  // namespace ounce
