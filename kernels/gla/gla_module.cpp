// SPDX-License-Identifier: MIT
// The mixer "gla".
#include <ounce/core/check.h>
#include <ounce/core/nn/construction.h>
#include <ounce/core/registry.h>
#include <ounce/kernels/gla/gla.h>
#include <torch/torch.h>

#include <cmath>

namespace ounce {
namespace {

constexpr int64_t kStepTokens = 8;  // what gla_step_ takes at once

at::Tensor apply_feature_map(const at::Tensor& x, const std::string& name) {
  if (name == "none") return x;
  if (name == "relu") return at::relu(x);
  if (name == "elu") return at::elu(x);
  if (name == "gelu") return at::gelu(x);
  return at::silu(x);  // silu | swish
}

// Width of all heads together; must divide into them.
int64_t width(double expand, int64_t dim, int64_t heads, const char* key) {
  const auto total = static_cast<int64_t>(std::llround(expand * static_cast<double>(dim)));
  OUNCE_CHECK(total >= heads && total % heads == 0, "[gla] expected ", key,
              " * dim to be a multiple of heads, got ", expand, " * ", dim, " = ", total, " for ",
              heads, " heads");
  return total;
}

// Position of each token in its document, [b, t].
at::Tensor document_positions(const SequenceContext& context, int64_t batch, int64_t tokens) {
  if (!context.cu_seqlens.defined()) return {};
  if (context.positions.defined()) return context.positions;
  const auto cu = context.cu_seqlens.to(at::kLong);
  const auto token = at::arange(batch * tokens, cu.options());
  const auto document = at::searchsorted(cu.slice(0, 1).contiguous(), token, false, /*right=*/true);
  return (token - cu.index_select(0, document)).view({batch, tokens});
}

}  // namespace

ShortConvolution::ShortConvolution(int64_t channels, int64_t size, bool with_bias) : size_(size) {
  OUNCE_CHECK(channels > 0 && size > 0,
              "[ShortConvolution] expected positive sizes, got channels = ", channels,
              ", size = ", size);
  weight =
      register_parameter("weight", torch::empty({channels, 1, size}, nn::construction_options()));
  if (with_bias)
    bias = register_parameter("bias", torch::zeros({channels}, nn::construction_options()));
  const torch::NoGradGuard no_grad;
  weight.normal_(0, 1 / std::sqrt(static_cast<double>(size)));
}

at::Tensor ShortConvolution::forward(const at::Tensor& x, at::Tensor* past,
                                     const at::Tensor& positions) {
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const bool continues = past != nullptr && past->defined();
  const auto before =
      continues ? past->to(x.scalar_type()) : at::zeros({batch, size_ - 1, channels}, x.options());
  const auto padded = at::cat({before, x}, 1);
  at::Tensor y;
  for (int64_t j = 0; j < size_; ++j) {
    const int64_t back = size_ - 1 - j;
    auto tap = padded.slice(1, j, j + tokens);
    if (positions.defined() && back > 0) {
      tap = tap.masked_fill((positions < back).unsqueeze(-1), 0);
    }
    const auto term = tap * weight.select(2, j).select(1, 0);
    y = y.defined() ? y + term : term;
  }
  if (bias.defined()) y = y + bias;
  if (continues) *past = padded.slice(1, tokens).clone();
  return at::silu(y).to(x.scalar_type());
}

GatedLinearAttention::GatedLinearAttention(int64_t dim, const GlaLayerOptions& options)
    : options_(options), kv_heads_(options.kv_heads > 0 ? options.kv_heads : options.heads) {
  const int64_t heads = options.heads;
  OUNCE_CHECK(dim > 0 && heads > 0 && heads % kv_heads_ == 0,
              "[gla] expected kv_heads that divides heads, got heads = ", heads,
              ", kv_heads = ", kv_heads_);
  const int64_t key = width(options.expand_k, dim, heads, "expand_k");
  const int64_t value = width(options.expand_v, dim, heads, "expand_v");
  head_k_ = key / heads;
  head_v_ = value / heads;
  const int64_t groups = heads / kv_heads_;
  // Small, as flash-linear-attention starts: the first tokens see few keys, and where q k is near 0
  // g_norm would enlarge what is left, and its gradient, a hundredfold.
  const double std = std::exp2(-2.5) / std::sqrt(static_cast<double>(dim));
  q_proj = register_module("q_proj", nn::Linear(dim, key, /*bias=*/false, std));
  k_proj = register_module("k_proj", nn::Linear(dim, key / groups, /*bias=*/false, std));
  v_proj = register_module("v_proj", nn::Linear(dim, value / groups, /*bias=*/false, std));
  if (options.output_gate) g_proj = register_module("g_proj", nn::Linear(dim, value));
  gk_down = nn::Linear(dim, options.gate_low_rank);
  gk_up = nn::Linear(options.gate_low_rank, key / groups, /*bias=*/true);
  register_module("gk_proj", torch::nn::Sequential(gk_down, gk_up));
  g_norm = register_module("g_norm", nn::RMSNorm(head_v_, options.norm_eps));
  o_proj = register_module("o_proj", nn::Linear(value, dim));
  if (options.conv_size > 0) {
    auto conv = [&](const char* name, int64_t channels) {
      return register_module(
          name, std::make_shared<ShortConvolution>(channels, options.conv_size, options.conv_bias));
    };
    q_conv1d = conv("q_conv1d", key);
    k_conv1d = conv("k_conv1d", key / groups);
    v_conv1d = conv("v_conv1d", value / groups);
  }
  op_options_.gate = GlaGate::kLogSigmoidLogits;
  op_options_.gate_normalizer = options.gate_normalizer;
  op_options_.clamp_min = options.clamp_min;
  op_options_.implementation = options.implementation;
}

at::Tensor GatedLinearAttention::mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                     const at::Tensor& gate, SequenceContext& context) {
  const int64_t batch = q.size(0), tokens = q.size(1);
  if (context.state != nullptr) {
    auto& state = context.state->tensors.at("recurrent");
    if (tokens <= kStepTokens && !at::GradMode::is_enabled()) {
      return gla_step_(q, k, v, gate, state, {}, op_options_);
    }
    auto options = op_options_;
    options.output_final_state = true;
    auto [o, after] = chunk_gla(q, k, v, gate, state, {}, options);
    state = after;
    return o;
  }
  if (!context.cu_seqlens.defined()) {
    return std::get<0>(chunk_gla(q, k, v, gate, {}, {}, op_options_));
  }
  auto one_row = [](const at::Tensor& x) { return x.flatten(0, 1).unsqueeze(0); };
  const auto o = std::get<0>(chunk_gla(one_row(q), one_row(k), one_row(v), one_row(gate), {},
                                       context.cu_seqlens, op_options_));
  return o.view({batch, tokens, o.size(2), o.size(3)});
}

at::Tensor GatedLinearAttention::forward(const at::Tensor& x, SequenceContext& context) {
  OUNCE_CHECK(x.dim() == 3 && x.size(2) == q_proj->weight.size(1),
              "[gla] expected x of shape [batch, tokens, ", q_proj->weight.size(1), "], got ",
              x.sizes());
  OUNCE_CHECK(context.state == nullptr || !context.cu_seqlens.defined(),
              "[gla] expected a state or cu_seqlens, got both; feed one document a row");
  auto q = q_proj(x), k = k_proj(x), v = v_proj(x);
  if (q_conv1d) {
    const auto positions = document_positions(context, x.size(0), x.size(1));
    auto past = [&](const char* name) {
      return context.state == nullptr ? nullptr : &context.state->tensors.at(name);
    };
    q = q_conv1d->forward(q, past("conv_q"), positions);
    k = k_conv1d->forward(k, past("conv_k"), positions);
    v = v_conv1d->forward(v, past("conv_v"), positions);
  }
  q = apply_feature_map(q, options_.feature_map);
  k = apply_feature_map(k, options_.feature_map);
  auto by_head = [](const at::Tensor& y, int64_t d) { return y.unflatten(-1, {-1, d}); };
  const auto gate = gk_up(gk_down(x));
  auto o = g_norm(mix(by_head(q, head_k_), by_head(k, head_k_), by_head(v, head_v_),
                      by_head(gate, head_k_), context));
  if (context.state != nullptr) context.state->length += x.size(1);
  o = o.flatten(2);
  if (g_proj) o = o * at::silu(g_proj(x));
  return o_proj(o);
}

MixerState GatedLinearAttention::make_state(int64_t batch, int64_t /*max_length*/) const {
  const auto& weight = q_proj->weight;
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  MixerState state;
  state.tensors["recurrent"] = at::zeros({batch, kv_heads_, head_k_, head_v_},
                                         weight.options().dtype(dtype).requires_grad(false));
  if (q_conv1d) {
    auto add = [&](const char* name, const nn::Linear& projection) {
      state.tensors[name] = at::zeros({batch, options_.conv_size - 1, projection->weight.size(0)},
                                      weight.options().dtype(dtype).requires_grad(false));
    };
    add("conv_q", q_proj);
    add("conv_k", k_proj);
    add("conv_v", v_proj);
  }
  return state;
}

double GatedLinearAttention::flops(int64_t batch, int64_t length) const {
  const int64_t tokens = batch * length;
  double total = 0;
  for (const auto& projection : {q_proj, k_proj, v_proj, g_proj, o_proj, gk_down, gk_up}) {
    if (projection) total += projection->flops(tokens);
  }
  for (const auto& conv : {q_conv1d, k_conv1d, v_conv1d}) {
    if (conv) total += 2.0 * static_cast<double>(tokens * conv->weight.numel());
  }
  const auto k = static_cast<double>(head_k_), v = static_cast<double>(head_v_);
  return total + static_cast<double>(tokens * options_.heads) * (4 * k * v + 64 * (k + v));
}

void register_gla() {
  registry<Mixer>().add(
      {.name = "gla",
       .doc = "gated linear attention: a recurrent state with a learned decay for each key channel",
       .defaults = R"(heads = 4
kv_heads = 0            # 0 = heads; fewer share keys, values and states
expand_k = 0.5          # key width / dim
expand_v = 1.0          # value width / dim
feature_map = "none"    # on q and k: none | relu | elu | silu | gelu | swish
conv_size = 0           # causal convolution on q, k, v; 0 = off
conv_bias = false
output_gate = true
norm_eps = 1e-5
gate_normalizer = 16.0  # log decay = logsigmoid(gate) / this
gate_low_rank = 16
clamp_min = -inf        # least log decay a token
implementation = "auto" # auto | fused | reference
)"},
      [](const Options& o, const Mixer::Context& context) -> std::shared_ptr<Mixer> {
        GlaLayerOptions layer;
        layer.heads = o.positive("heads");
        layer.kv_heads = o.non_negative("kv_heads");
        layer.expand_k = o.number("expand_k");
        layer.expand_v = o.number("expand_v");
        layer.feature_map =
            o.choice("feature_map", {"none", "relu", "elu", "silu", "gelu", "swish"});
        layer.conv_size = o.non_negative("conv_size");
        layer.conv_bias = o.flag("conv_bias");
        layer.output_gate = o.flag("output_gate");
        layer.norm_eps = o.number("norm_eps");
        layer.gate_normalizer = o.number("gate_normalizer");
        layer.gate_low_rank = o.positive("gate_low_rank");
        if (const double least = o.number("clamp_min"); std::isfinite(least))
          layer.clamp_min = least;
        layer.implementation = o.choice("implementation", {"auto", "fused", "reference"});
        return std::make_shared<GatedLinearAttention>(context.dim, layer);
      });
}

}  // namespace ounce
