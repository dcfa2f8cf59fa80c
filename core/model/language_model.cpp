// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/model/language_model.h>
#include <ounce/core/recompute.h>
#include <ounce/core/registry.h>
#include <torch/torch.h>

#include <cmath>

namespace ounce {

namespace {

const Value& layer_spec(const Value& spec, int64_t layer, int64_t layers, const char* key) {
  if (!spec.is_array()) return spec;
  const auto count = static_cast<int64_t>(spec.array().size());
  OUNCE_CHECK(count == layers, "[lm] '", key, "' lists ", count, " parts for ", layers,
              " layers; give one, or one a layer");
  return spec.array()[static_cast<size_t>(layer)];
}

bool writes_into_stream(const std::string& name) {
  return name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
}

}  // namespace

LanguageModel::LanguageModel(const LanguageModelOptions& options, const Context& context)
    : options_(options) {
  OUNCE_CHECK(options.recompute == "none" || options.recompute == "block",
              "[lm] recompute: expected none or block, got '", options.recompute, "'");
  OUNCE_CHECK(options.embed_scale > 0 && options.embed_scale <= 1e6,
              "[lm] embed_scale: expected a positive number up to 1e6, got ", options.embed_scale);
  PartContext part{.dim = options.dim,
                   .layers = options.layers,
                   .max_length = context.max_length,
                   .dropout = options.dropout};
  embed_ = register_module("embed", nn::Embedding(context.vocab, options.dim));
  auto list = register_module("blocks", std::make_shared<torch::nn::ModuleListImpl>());
  for (part.layer = 0; part.layer < options.layers; ++part.layer) {
    Block::Context block_context{
        part, layer_spec(options.mixer, part.layer, options.layers, "mixer"),
        layer_spec(options.mlp, part.layer, options.layers, "mlp"), options.norm};
    const auto& spec = layer_spec(options.block, part.layer, options.layers, "block");
    blocks_.push_back(registry<Block>().make(spec, block_context));
    list->push_back(blocks_.back());
  }
  part.layer = 0;
  norm_ = register_module("norm", registry<Norm>().make(options.norm, part));
  loss_ = register_module(
      "loss", registry<Loss>().make(options.loss, {.dim = options.dim, .vocab = context.vocab}));
  if (!options.tie_embeddings) {
    head_ = register_module("head", nn::Linear(options.dim, context.vocab, false, 0.02));
  }
  const torch::NoGradGuard no_grad;
  for (auto& item : named_parameters()) {
    if (writes_into_stream(item.key())) {
      item.value().mul_(1 / std::sqrt(2.0 * static_cast<double>(options.layers)));
    }
  }
}

std::pair<at::Tensor, at::Tensor> LanguageModel::run_block(Block& block, const at::Tensor& residual,
                                                           const at::Tensor& delta,
                                                           SequenceContext& context) {
  if (options_.recompute == "none" || !is_training() || !at::GradMode::is_enabled()) {
    return block.forward(residual, delta, context);
  }
  const auto outputs = recompute(
      [&block, context](const std::vector<at::Tensor>& inputs) mutable {
        auto [r, d] = block.forward(inputs[0], inputs[1], context);
        return std::vector<at::Tensor>{r, d};
      },
      {residual, delta});
  return {outputs[0], outputs[1]};
}

at::Tensor LanguageModel::hidden(const at::Tensor& tokens_bt, SequenceContext& context,
                                 std::vector<MixerState>* states) {
  OUNCE_CHECK(tokens_bt.dim() == 2, "[lm] expected tokens of shape (batch, length), got ",
              tokens_bt.sizes());
  OUNCE_CHECK(states == nullptr || states->size() == blocks_.size(), "[lm] expected ",
              blocks_.size(), " states, got ", states == nullptr ? 0 : states->size());
  auto stream = embed_->forward(tokens_bt);
  if (options_.embed_scale != 1) stream = stream * options_.embed_scale;
  auto residual = at::dropout(stream, options_.dropout, is_training());
  at::Tensor delta;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    context.state = states == nullptr ? nullptr : &(*states)[i];
    std::tie(residual, delta) = run_block(*blocks_[i], residual, delta, context);
  }
  context.state = nullptr;
  return norm_->forward_add(residual, delta).second;
}

const at::Tensor& LanguageModel::head_weight() const {
  return head_.is_empty() ? embed_->weight : head_->weight;
}

at::Tensor LanguageModel::loss_sum(const at::Tensor& hidden_btd, const at::Tensor& targets_bt) {
  return loss_->forward(hidden_btd.flatten(0, 1), head_weight(), targets_bt.flatten());
}

std::vector<MixerState> LanguageModel::make_states(int64_t batch, int64_t max_length) const {
  std::vector<MixerState> states;
  for (const auto& block : blocks_) states.push_back(block->mixer().make_state(batch, max_length));
  return states;
}

double LanguageModel::flops(int64_t batch, int64_t length) const {
  double total = loss_->flops(batch * length);
  for (const auto& block : blocks_) total += block->flops(batch, length);
  return total;
}

}  // namespace ounce
