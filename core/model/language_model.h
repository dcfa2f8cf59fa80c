// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/model/model.h>
#include <ounce/core/nn/embedding.h>
#include <ounce/core/nn/linear.h>

#include <memory>
#include <string>
#include <vector>

namespace ounce {

struct LanguageModelOptions {
  int64_t dim = 512;
  int64_t layers = 8;
  Value block = "prenorm";
  // One part for all layers, or an array with one entry a layer (hybrids).
  Value mixer = "gla";
  Value mlp = "swiglu";
  Value norm = "rms_norm";
  Value loss = "cce";
  bool tie_embeddings = true;
  double embed_scale = 1;  // of what enters the stream (Gemma: sqrt(dim)); embeddings start at 0.02
  double dropout = 0;      // on the embedding and on every branch before it joins the stream
  std::string recompute =
      "none";  // none | block: keep only block boundaries, recompute in backward
};

// Causal language model: embed, `layers` blocks, norm, head. Parameters: embed.weight [v, d],
// blocks.<i>.*, norm.weight, and head.weight [v, d] unless tied. Projections that write into the
// residual stream (o_proj, down_proj) are scaled by 1 / sqrt(2 layers) at the start (GPT-2).
class LanguageModel : public Model {
 public:
  LanguageModel(const LanguageModelOptions& options, const Context& context);

  at::Tensor hidden(const at::Tensor& tokens_bt, SequenceContext& context,
                    std::vector<MixerState>* states = nullptr) override;
  const at::Tensor& head_weight() const override;
  at::Tensor loss_sum(const at::Tensor& hidden_btd, const at::Tensor& targets_bt) override;
  std::vector<MixerState> make_states(int64_t batch, int64_t max_length) const override;
  double flops(int64_t batch, int64_t length) const override;

 private:
  std::pair<at::Tensor, at::Tensor> run_block(Block& block, const at::Tensor& residual,
                                              const at::Tensor& delta, SequenceContext& context);

  LanguageModelOptions options_;
  nn::Embedding embed_{nullptr};
  std::vector<std::shared_ptr<Block>> blocks_;
  std::shared_ptr<Norm> norm_;
  std::shared_ptr<Loss> loss_;
  nn::Linear head_{nullptr};  // empty when tied
};

// Registers the model `lm`, the block `prenorm`, the mixer `attention` and the mlp `swiglu`.
void register_models();

}  // namespace ounce
