// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/model/attention.h>
#include <ounce/core/registry.h>
#include <torch/torch.h>

#include <cmath>

namespace ounce {

namespace {

// [b, 1, t, t], true where a query may look: not later, and in the same document. A document starts
// where its position is 0.
at::Tensor document_mask(const at::Tensor& positions_bt) {
  const auto document = positions_bt.eq(0).cumsum(1);
  const auto same = document.unsqueeze(2).eq(document.unsqueeze(1));
  return same.tril_().unsqueeze(1);
}

// [t, past + t], true where a query of the newest t tokens may look.
at::Tensor continuation_mask(int64_t past, int64_t length, at::Device device) {
  return at::ones({length, past + length}, at::TensorOptions(at::kBool).device(device)).tril_(past);
}

}  // namespace

Attention::Attention(const AttentionOptions& options, const PartContext& context)
    : heads_(options.heads),
      kv_heads_(options.kv_heads == 0 ? options.heads : options.kv_heads),
      head_dim_(context.dim / options.heads),
      rope_base_(options.rope_base),
      dropout_(context.dropout) {
  OUNCE_CHECK(context.dim % heads_ == 0, "[attention] dim ", context.dim,
              " is not a multiple of heads ", heads_);
  OUNCE_CHECK(heads_ % kv_heads_ == 0, "[attention] heads ", heads_,
              " is not a multiple of kv_heads ", kv_heads_);
  OUNCE_CHECK(rope_base_ == 0 || head_dim_ % 2 == 0, "[attention] rotary positions need an even ",
              "head size, got ", head_dim_);
  q_proj_ = register_module("q_proj", nn::Linear(context.dim, context.dim));
  k_proj_ = register_module("k_proj", nn::Linear(context.dim, kv_heads_ * head_dim_));
  v_proj_ = register_module("v_proj", nn::Linear(context.dim, kv_heads_ * head_dim_));
  o_proj_ = register_module("o_proj", nn::Linear(context.dim, context.dim));
}

at::Tensor Attention::rotary_angles(const SequenceContext& context, int64_t first, int64_t length,
                                    at::Device device) const {
  const auto options = at::TensorOptions(at::kFloat).device(device);
  const auto position = context.positions.defined()
                            ? context.positions.to(at::kFloat).unsqueeze(1)  // [b, 1, t]
                            : at::arange(first, first + length, options);
  const auto exponent = at::arange(0, head_dim_, 2, options) / -static_cast<double>(head_dim_);
  return position.unsqueeze(-1) * at::exp(exponent * std::log(rope_base_));  // [.., t, d / 2]
}

at::Tensor Attention::rotate(const at::Tensor& x_bhtd, const at::Tensor& angles) const {
  const auto cos = at::cos(angles), sin = at::sin(angles);
  const auto halves = x_bhtd.chunk(2, -1);
  const auto rotated =
      at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1);
  return rotated.to(x_bhtd.scalar_type());
}

at::Tensor Attention::forward(const at::Tensor& x_btd, SequenceContext& context) {
  const auto batch = x_btd.size(0), length = x_btd.size(1);
  const auto split = [&](nn::Linear& projection, int64_t heads) {
    return projection->forward(x_btd).view({batch, length, heads, head_dim_}).transpose(1, 2);
  };
  auto q = split(q_proj_, heads_), k = split(k_proj_, kv_heads_), v = split(v_proj_, kv_heads_);
  auto* state = context.state;
  const auto past = state == nullptr ? 0 : state->length;
  if (rope_base_ != 0) {
    const auto angles = rotary_angles(context, past, length, x_btd.device());
    q = rotate(q, angles);
    k = rotate(k, angles);
  }
  if (state != nullptr) {
    auto &keys = state->tensors.at("k"), &values = state->tensors.at("v");
    OUNCE_CHECK(past + length <= keys.size(2), "[attention] the state holds ", keys.size(2),
                " tokens, asked to take ", past + length, "; make a longer one");
    keys.narrow(2, past, length).copy_(k);
    values.narrow(2, past, length).copy_(v);
    k = keys.narrow(2, 0, past + length).to(q.scalar_type());
    v = values.narrow(2, 0, past + length).to(q.scalar_type());
    state->length += length;
  }
  std::optional<at::Tensor> mask;
  if (context.positions.defined()) {
    mask = document_mask(context.positions);
  } else if (past > 0 && length > 1) {
    mask = continuation_mask(past, length, x_btd.device());
  }
  const bool causal = !mask.has_value() && past == 0;
  const auto mixed = at::scaled_dot_product_attention(q, k, v, mask, is_training() ? dropout_ : 0.0,
                                                      causal, std::nullopt, heads_ != kv_heads_);
  return o_proj_->forward(mixed.transpose(1, 2).reshape({batch, length, heads_ * head_dim_}));
}

MixerState Attention::make_state(int64_t batch, int64_t max_length) const {
  const auto cache = [&] {
    return at::zeros({batch, kv_heads_, max_length, head_dim_}, k_proj_->weight.options());
  };
  return {0, {{"k", cache()}, {"v", cache()}}};
}

double Attention::flops(int64_t batch, int64_t length) const {
  const auto tokens = batch * length;
  // Two products of t x t x d a row; the causal half is what counts.
  const double mixing = 2.0 * static_cast<double>(tokens) * static_cast<double>(length) *
                        static_cast<double>(heads_ * head_dim_);
  return q_proj_->flops(tokens) + k_proj_->flops(tokens) + v_proj_->flops(tokens) +
         o_proj_->flops(tokens) + mixing;
}

void register_attention() {
  registry<Mixer>().add(
      {.name = "attention",
       .doc = "causal softmax attention with rotary positions and grouped queries",
       .defaults = "heads = 8          # query heads\n"
                   "kv_heads = 0       # key and value heads; 0 = heads\n"
                   "rope_base = 1e4    # base of the rotary positions; 0 = none\n"},
      [](const Options& o, const PartContext& context) {
        return std::make_shared<Attention>(
            AttentionOptions{.heads = o.positive("heads"),
                             .kv_heads = o.non_negative("kv_heads"),
                             .rope_base = o.number_in("rope_base", 0, 1e12)},
            context);
      });
}

}  // namespace ounce
