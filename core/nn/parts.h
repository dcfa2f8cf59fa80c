// SPDX-License-Identifier: MIT
// The interfaces of the parts a language model is built from. Shapes: b batch, t length, d width,
// n tokens, v vocabulary. Every part is a torch::nn::Module that registers its parameters under
// PyTorch's names and is found by name in the registry of its kind (registry.h).
//
// flops(): floating-point operations of one forward pass, a multiply-add counted as 2; a backward
// pass counts as twice that.
#pragma once

#include <ounce/core/nn/sequence_context.h>
#include <ounce/core/options.h>
#include <torch/nn/module.h>

#include <memory>
#include <utility>

namespace ounce {

// What a part knows of the model around it.
struct PartContext {
  int64_t dim = 0;         // width of the residual stream
  int64_t layer = 0;       // index of the layer, 0-based
  int64_t layers = 1;      // layers in all
  int64_t max_length = 0;  // longest sequence in training
  double dropout = 0;      // probability, active in train() mode only
};

// Mixes along the sequence: attention, gated linear attention, long convolution.
class Mixer : public torch::nn::Module {
 public:
  static constexpr const char* kKind = "mixer";
  using Context = PartContext;

  // x [b, t, d] -> [b, t, d]. With context.state it continues from that state and updates it:
  // feeding a sequence in pieces equals feeding it whole.
  virtual at::Tensor forward(const at::Tensor& x_btd, SequenceContext& context) = 0;
  // Fresh state for `batch` sequences of at most `max_length` tokens, on the parameters' device.
  virtual MixerState make_state(int64_t batch, int64_t max_length) const = 0;
  virtual double flops(int64_t batch, int64_t length) const = 0;
};

// Acts on each token alone.
class Mlp : public torch::nn::Module {
 public:
  static constexpr const char* kKind = "mlp";
  using Context = PartContext;

  virtual at::Tensor forward(const at::Tensor& x_btd) = 0;
  virtual double flops(int64_t tokens) const = 0;
};

class Norm : public torch::nn::Module {
 public:
  static constexpr const char* kKind = "norm";
  using Context = PartContext;

  virtual at::Tensor forward(const at::Tensor& x_btd) = 0;
  // (residual + delta, norm(residual + delta)), fused where the norm can; delta undefined = 0.
  virtual std::pair<at::Tensor, at::Tensor> forward_add(const at::Tensor& residual_btd,
                                                        const at::Tensor& delta_btd) = 0;
};

// One layer: wires norms, a mixer and an mlp around the residual stream. The stream is carried as a
// pair whose sum it is, so that the addition can fuse with the next norm.
class Block : public torch::nn::Module {
 public:
  static constexpr const char* kKind = "block";
  struct Context {
    PartContext part;
    Value mixer, mlp, norm;  // specs of the parts to build
  };

  // (residual, delta) -> (residual, delta); delta is undefined before the first block.
  virtual std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& residual_btd,
                                                    const at::Tensor& delta_btd,
                                                    SequenceContext& context) = 0;
  virtual Mixer& mixer() = 0;
  virtual double flops(int64_t batch, int64_t length) const = 0;
};

// Loss from hidden states and the classifier; the only place besides sampling where the head is
// applied.
class Loss : public torch::nn::Module {
 public:
  static constexpr const char* kKind = "loss";
  struct Context {
    int64_t dim = 0;
    int64_t vocab = 0;
  };

  // hidden [n, d], weight [v, d], targets [n] int64 with -100 for tokens that do not count.
  // Returns the fp32 scalar sum over the counted tokens: the caller divides by their number over
  // all micro-batches.
  virtual at::Tensor forward(const at::Tensor& hidden_nd, const at::Tensor& weight_vd,
                             const at::Tensor& targets_n) = 0;
  virtual double flops(int64_t tokens) const = 0;
};

}  // namespace ounce
