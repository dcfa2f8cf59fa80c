// SPDX-License-Identifier: MIT
// Gated linear attention (Yang et al. 2023, arXiv 2312.06635, eq. 3): per head, with a decay a_t in
// [0, 1]^K for each key channel,
//     S_t = diag(a_t) S_{t-1} + k_t v_t^T,    o_t = scale * S_t^T q_t.
// Shapes: b batch, t tokens, K key channels, V value channels, n sequences. q [b, t, Hq, K],
// k [b, t, Hk, K], v [b, t, Hv, V], g [b, t, Hk or Hv, K]; Hq and Hv are multiples of Hk, and the
// larger of them is a multiple of the smaller. Head h of H = max(Hq, Hv) reads head h / (H / Hx) of
// each input. o is [b, t, H, V] in v's dtype; there is one state a value head: [n, Hv, K, V].
//
// Numerics: q, k, v share a dtype; g may have another. Decays, states and sums are fp32 (fp64 for
// fp64 inputs). Decays are only multiplied, never divided, so that any g <= 0 is exact, -inf too
// (a_t = 0: the state is dropped). g > 0 grows without bound; see check_numerics.
//
// Every function is also torch.ops.ounce.<name>: autograd (first order), Meta, autocast (casts q,
// k, v; leaves g and states); only naive_recurrent_gla has derivatives of every order. No host
// synchronisation, deterministic; all sizes may be 0 except heads, K and V. Throws ounce::Error
// (Fault::kUsage) for shapes, dtypes, devices and options that do not fit; values of cu_seqlens
// that do not fit are an error on a CPU and a device assertion on a GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/core/nn/linear.h>
#include <ounce/core/nn/parts.h>
#include <ounce/core/nn/rms_norm.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace ounce {

enum class GlaGate {
  kLogDecay,          // a = exp(g)
  kLogSigmoidLogits,  // a = exp(logsigmoid(g) / gate_normalizer)
};

enum class GlaStateLayout {
  kKV,  // states are [n, Hv, K, V]
  kVK,  // states are [n, Hv, V, K]
};

struct GlaOptions {
  std::optional<double> scale;  // default K^-0.5
  bool output_final_state = false;
  GlaGate gate = GlaGate::kLogDecay;
  double gate_normalizer = 16;
  std::optional<double> clamp_min;  // least log decay, <= 0: log a = max(log a, clamp_min)
  bool reverse = false;  // the recurrence runs from each sequence's last token to its first
  GlaStateLayout state_layout = GlaStateLayout::kKV;
  // Throws where g is NaN, or, as a log decay, above 0. Synchronises the host.
  bool check_numerics = false;
  // The following change speed and memory alone; the reference path takes no notice of them.
  // auto | fused | reference. No fused path is built yet: "fused" throws, and "auto" is the
  // reference, of which it warns once on a GPU (OUNCE_STRICT=1: throws).
  std::string implementation = "auto";
  std::string intra = "tf32";         // products inside a chunk: tf32 | bf16 | fp32
  int64_t states_every = 0;           // chunks between states kept for backward; 0 = recompute all
  int64_t segments = 0;               // pieces a sequence is split into; 0 = automatic
  std::optional<int64_t> max_seqlen;  // longest sequence of cu_seqlens
};

// (o, final_state). initial_state [n, Hv, K, V] fp32 (fp64 for fp64 inputs), absent = zeros, n = b.
// With cu_seqlens (int32 or int64, [n + 1], from 0 to t, not decreasing, on the inputs' device) b
// is 1 and row 0 holds n sequences one after the other, empty ones allowed; packed equals separate.
// final_state is undefined unless options.output_final_state; that of an empty sequence is its
// initial state. Both states and q, k, v, g are differentiable.
// Computes in chunks of 32 tokens (64 on a GPU). Allocates o and, until it returns, copies of the
// inputs padded to whole chunks and one state a chunk; saves its inputs alone for backward.
std::tuple<at::Tensor, at::Tensor> chunk_gla(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& g,
                                             const std::optional<at::Tensor>& initial_state = {},
                                             const std::optional<at::Tensor>& cu_seqlens = {},
                                             const GlaOptions& options = {});

// The same function, computed token by token in t steps; backward is chunk_gla's. For short inputs.
std::tuple<at::Tensor, at::Tensor> fused_recurrent_gla(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const std::optional<at::Tensor>& initial_state = {},
    const std::optional<at::Tensor>& cu_seqlens = {}, const GlaOptions& options = {});

// Feeds t <= 8 tokens a sequence to `state` [slots, Hv, K, V] (any floating dtype) and returns o.
// Row i of the batch uses slot state_indices[i] (int32 or int64 [b], distinct, in range), slot i
// when absent. Not differentiable; options.reverse is refused, output_final_state ignored.
at::Tensor gla_step_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& g, at::Tensor& state,
                     const std::optional<at::Tensor>& state_indices = {},
                     const GlaOptions& options = {});

// The recurrence written out in ATen operators, differentiated by autograd to any order: the
// definition. Keeps every state when gradients are on.
std::tuple<at::Tensor, at::Tensor> naive_recurrent_gla(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const std::optional<at::Tensor>& initial_state = {},
    const std::optional<at::Tensor>& cu_seqlens = {}, const GlaOptions& options = {});

// Settings of the layer. Parameter names and defaults follow flash-linear-attention's layer, with
// one exception: its default, which fuses norm and gate, calls the norm g_norm_swish_gate, and here
// it is g_norm as without that fusion.
struct GlaLayerOptions {
  int64_t heads = 4;
  int64_t kv_heads = 0;              // 0 = heads; else a divisor of heads
  double expand_k = 0.5;             // key width over all heads / dim
  double expand_v = 1.0;             // value width over all heads / dim
  std::string feature_map = "none";  // on q and k: none | relu | elu | silu | gelu | swish
  int64_t conv_size = 0;             // causal depthwise convolution and SiLU on q, k, v; 0 = off
  bool conv_bias = false;
  bool output_gate = true;  // o = norm(o) * SiLU(g_proj(x))
  double norm_eps = 1e-5;
  double gate_normalizer = 16;
  int64_t gate_low_rank = 16;
  std::optional<double> clamp_min;
  std::string implementation = "auto";
};

// y_t = SiLU(bias + sum_j weight[:, 0, j] x_{t - size + 1 + j}) over [b, t, channels]; tokens
// before the start of a document count as zero. Parameters: weight [channels, 1, size], bias
// [channels] or none.
class ShortConvolution : public torch::nn::Module {
 public:
  ShortConvolution(int64_t channels, int64_t size, bool bias);

  // `past` [b, size - 1, channels] holds the tokens before x (undefined = zeros) and is replaced by
  // those before the next call when it is defined. `positions` [b, t] counts from each document's
  // start (undefined = one document a row).
  at::Tensor forward(const at::Tensor& x_btd, at::Tensor* past, const at::Tensor& positions);

  at::Tensor weight, bias;

 private:
  int64_t size_;
};

// The mixer "gla": q, k, v, gate and output projections around chunk_gla, a per-head RMSNorm and a
// SiLU output gate. Parameters: q_proj, k_proj, v_proj, g_proj, o_proj (no bias), gk_proj.0 (no
// bias), gk_proj.1 (bias), g_norm.weight [V], {q,k,v}_conv1d. State: recurrent [b, kv_heads, K, V]
// fp32, and conv_{q,k,v} [b, conv_size - 1, width]. Pieces of at most 8 tokens without gradients go
// through gla_step_, which updates the recurrent state in place.
class GatedLinearAttention : public Mixer {
 public:
  GatedLinearAttention(int64_t dim, const GlaLayerOptions& options);

  at::Tensor forward(const at::Tensor& x_btd, SequenceContext& context) override;
  MixerState make_state(int64_t batch, int64_t max_length) const override;
  // Projections, and 4 K V + 64 (K + V) a token and head: the chunkwise form with chunks of 64,
  // its masked half not counted.
  double flops(int64_t batch, int64_t length) const override;

  nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, g_proj{nullptr}, o_proj{nullptr};
  nn::Linear gk_down{nullptr}, gk_up{nullptr};  // gk_proj.0, gk_proj.1
  nn::RMSNorm g_norm{nullptr};
  std::shared_ptr<ShortConvolution> q_conv1d, k_conv1d, v_conv1d;  // null without a convolution

 private:
  at::Tensor mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& gate, SequenceContext& context);

  GlaLayerOptions options_;
  GlaOptions op_options_;
  int64_t kv_heads_, head_k_, head_v_;
};

// Adds the mixer "gla" to the registry.
void register_gla();

}  // namespace ounce
