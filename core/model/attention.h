// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/nn/linear.h>
#include <ounce/core/nn/parts.h>

namespace ounce {

struct AttentionOptions {
  int64_t heads = 8;
  int64_t kv_heads = 0;      // 0 = heads; fewer: grouped-query attention (Ainslie et al. 2023)
  double rope_base = 10000;  // rotary positions (Su et al. 2021, half-split form); 0 = none
};

// Causal softmax attention on at::scaled_dot_product_attention. Parameters q_proj, k_proj, v_proj,
// o_proj, no biases. State: k and v [b, kv_heads, max_length, d / heads]. Packed documents
// (cu_seqlens) take a [b, 1, t, t] mask: memory b t^2 bytes, not the flash kernels' causal path.
class Attention : public Mixer {
 public:
  Attention(const AttentionOptions& options, const PartContext& context);

  at::Tensor forward(const at::Tensor& x_btd, SequenceContext& context) override;
  MixerState make_state(int64_t batch, int64_t max_length) const override;
  double flops(int64_t batch, int64_t length) const override;

 private:
  at::Tensor rotate(const at::Tensor& x_bhtd, const at::Tensor& angles) const;
  at::Tensor rotary_angles(const SequenceContext& context, int64_t first, int64_t length,
                           at::Device device) const;

  int64_t heads_, kv_heads_, head_dim_;
  double rope_base_, dropout_;
  nn::Linear q_proj_{nullptr}, k_proj_{nullptr}, v_proj_{nullptr}, o_proj_{nullptr};
};

void register_attention();

}  // namespace ounce
