// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/nn/parts.h>
#include <ounce/core/registry.h>
#include <ounce/kernels/cce/cce.h>
#include <torch/torch.h>

#include <cmath>

namespace ounce {

namespace {

constexpr const char* kValueDefaults =
    "softcap = 0.0          # logits become softcap * tanh(logits / softcap); 0 = off\n"
    "logit_scale = 1.0      # multiplies the logits before the softcap; 1 / temperature\n"
    "label_smoothing = 0.0  # share of the target spread evenly over the vocabulary, 0 to 1\n"
    "z_loss = 0.0           # adds z_loss * logsumexp(logits)^2 for each token\n";

LinearCrossEntropyOptions value_options(const Options& o) {
  constexpr double kLarge = 1e30;
  return LinearCrossEntropyOptions()
      .reduction(Reduction::kSum)
      .softcap(o.number_in("softcap", 0, kLarge))
      .logit_scale(o.number_in("logit_scale", -kLarge, kLarge))
      .label_smoothing(o.number_in("label_smoothing", 0, 1))
      .z_loss(o.number_in("z_loss", 0, kLarge));
}

GradMode grad_mode(const std::string& name) {
  if (name == "hidden") return GradMode::kFilterHidden;
  return name == "all" ? GradMode::kFilter : GradMode::kExact;
}

Recompute recompute(const std::string& name) {
  if (name == "never") return Recompute::kNever;
  return name == "always" ? Recompute::kAlways : Recompute::kAuto;
}

double head_flops(int64_t tokens, const Loss::Context& c) {
  return 2.0 * static_cast<double>(tokens) * static_cast<double>(c.dim) *
         static_cast<double>(c.vocab);
}

class CceLoss final : public Loss {
 public:
  CceLoss(LinearCrossEntropyOptions options, const Context& context)
      : options_(std::move(options)), context_(context) {}

  at::Tensor forward(const at::Tensor& hidden_nd, const at::Tensor& weight_vd,
                     const at::Tensor& targets_n) override {
    return linear_cross_entropy(hidden_nd, weight_vd, targets_n, {}, {}, {}, options_).loss;
  }
  double flops(int64_t tokens) const override { return head_flops(tokens, context_); }

 private:
  LinearCrossEntropyOptions options_;
  Context context_;
};

// Holds the logits of all tokens: the plain way, and what the other loss is compared with.
class MaterialisedLoss final : public Loss {
 public:
  MaterialisedLoss(LinearCrossEntropyOptions options, const Context& context)
      : options_(std::move(options)), context_(context) {}

  at::Tensor forward(const at::Tensor& hidden_nd, const at::Tensor& weight_vd,
                     const at::Tensor& targets_n) override {
    const auto compute = hidden_nd.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    auto z = at::linear(hidden_nd, weight_vd).to(compute);
    if (options_.logit_scale() != 1) z = z * options_.logit_scale();
    if (options_.softcap() > 0) z = at::tanh(z / options_.softcap()) * options_.softcap();
    const auto ignore = options_.ignore_index();
    auto loss = at::cross_entropy_loss(z, targets_n, {}, at::Reduction::Sum, ignore,
                                       options_.label_smoothing());
    if (options_.z_loss() > 0) {
      const auto lse = at::logsumexp(z, 1).masked_fill(targets_n.eq(ignore), 0);
      loss = loss + lse.square().sum() * options_.z_loss();
    }
    return loss;
  }
  double flops(int64_t tokens) const override { return head_flops(tokens, context_); }

 private:
  LinearCrossEntropyOptions options_;
  Context context_;
};

}  // namespace

LinearCrossEntropyImpl::LinearCrossEntropyImpl(LinearCrossEntropyModuleOptions options_,
                                               at::Tensor tied)
    : options(std::move(options_)) {
  const auto dim = options.dim(), vocab = options.vocab();
  OUNCE_CHECK(dim > 0 && vocab > 0, "[LinearCrossEntropy] expected positive sizes, got dim = ", dim,
              ", vocab = ", vocab);
  const bool is_tied = tied.defined();
  OUNCE_CHECK(!is_tied || (tied.dim() == 2 && tied.size(0) == vocab && tied.size(1) == dim),
              "[LinearCrossEntropy] expected a tied weight [V, D] = [", vocab, ", ", dim, "], got ",
              is_tied ? tied.sizes() : at::IntArrayRef());
  const bool wants_gradient = !is_tied || tied.requires_grad();
  weight = register_parameter("weight", is_tied ? std::move(tied) : torch::empty({vocab, dim}),
                              wants_gradient);
  bias = options.bias() ? torch::zeros({vocab}, weight.options()) : at::Tensor();
  bias = register_parameter("bias", bias, /*requires_grad=*/bias.defined());
  if (is_tied) return;
  torch::NoGradGuard no_grad;
  weight.normal_(0, 1 / std::sqrt(static_cast<double>(dim)));
}

LinearCrossEntropyOutput LinearCrossEntropyImpl::forward(
    const at::Tensor& hidden, const at::Tensor& target,
    const std::optional<at::Tensor>& token_weight) {
  return linear_cross_entropy(hidden, weight, target, bias, token_weight, {}, options.loss());
}

double LinearCrossEntropyImpl::flops(int64_t tokens) const {
  return head_flops(tokens, {.dim = options.dim(), .vocab = options.vocab()});
}

void register_cce() {
  registry<Loss>().add(
      {.name = "cce",
       .doc = "cross-entropy through the head without holding the logits of all tokens",
       .defaults =
           std::string(kValueDefaults) +
           "filter = \"none\"        # none | hidden | all: gradients that leave out "
           "negligible probabilities; all starves rare tokens\n"
           "workspace_mib = -1     # memory for logits; -1 = automatic\n"
           "recompute = \"auto\"     # auto | never | always: whether backward makes the logits "
           "again, instead of keeping gradients from forward on\n"
           "implementation = \"auto\"  # auto | fused | reference\n"},
      [](const Options& o, const Loss::Context& c) -> std::shared_ptr<Loss> {
        const auto mib = o.integer("workspace_mib");
        auto options =
            value_options(o)
                .grad_mode(grad_mode(o.choice("filter", {"none", "hidden", "all"})))
                .workspace_bytes(mib < 0 ? -1 : mib << 20)
                .recompute(recompute(o.choice("recompute", {"auto", "never", "always"})))
                .implementation(o.choice("implementation", {"auto", "fused", "reference"}));
        return std::make_shared<CceLoss>(std::move(options), c);
      });
  registry<Loss>().add({.name = "cross_entropy",
                        .doc = "cross-entropy from the logits of all tokens, held in memory",
                        .defaults = kValueDefaults},
                       [](const Options& o, const Loss::Context& c) -> std::shared_ptr<Loss> {
                         return std::make_shared<MaterialisedLoss>(value_options(o), c);
                       });
}

}  // namespace ounce
