// SPDX-License-Identifier: MIT
// What the loop knows of a model: tokens to hidden states, hidden states to a loss, and the states
// of its mixers for generation. The head is applied inside the loss or by sampling, never
// elsewhere.
#pragma once

#include <ounce/core/nn/parts.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <vector>

namespace ounce {

class Model : public torch::nn::Module {
 public:
  static constexpr const char* kKind = "model";
  struct Context {
    int64_t vocab = 0;       // token ids are below this
    int64_t max_length = 0;  // tokens of a training row
  };

  // tokens [b, t] int64 -> hidden states [b, t, d] after the final norm. `states`, one a layer,
  // makes it continue from them; null in training.
  virtual at::Tensor hidden(const at::Tensor& tokens_bt, SequenceContext& context,
                            std::vector<MixerState>* states = nullptr) = 0;
  // Classifier weight [v, d]; the embedding's when tied.
  virtual const at::Tensor& head_weight() const = 0;
  // fp32 scalar: the loss summed over the targets that count (targets [b, t], -100 = ignored).
  virtual at::Tensor loss_sum(const at::Tensor& hidden_btd, const at::Tensor& targets_bt) = 0;

  virtual std::vector<MixerState> make_states(int64_t batch, int64_t max_length) const = 0;
  // Of one forward pass, loss included (nn/parts.h).
  virtual double flops(int64_t batch, int64_t length) const = 0;
};

}  // namespace ounce
