// SPDX-License-Identifier: MIT
#include <ATen/autocast_mode.h>
#include <ounce/core/model/attention.h>
#include <ounce/core/model/language_model.h>
#include <ounce/core/nn/linear.h>
#include <ounce/core/registry.h>
#include <torch/torch.h>

namespace ounce {

namespace {

// x + mixer(norm(x)), then x + mlp(norm(x)). Parameters mixer_norm.*, mixer.*, mlp_norm.*, mlp.*.
class PrenormBlock : public Block {
 public:
  explicit PrenormBlock(const Context& context) : dropout_(context.part.dropout) {
    mixer_norm_ = register_module("mixer_norm", registry<Norm>().make(context.norm, context.part));
    mixer_ = register_module("mixer", registry<Mixer>().make(context.mixer, context.part));
    mlp_norm_ = register_module("mlp_norm", registry<Norm>().make(context.norm, context.part));
    mlp_ = register_module("mlp", registry<Mlp>().make(context.mlp, context.part));
  }

  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& residual_btd,
                                            const at::Tensor& delta_btd,
                                            SequenceContext& context) override {
    auto [residual, x] = mixer_norm_->forward_add(residual_btd, delta_btd);
    const auto mixed = drop(mixer_->forward(narrow(x), context));
    std::tie(residual, x) = mlp_norm_->forward_add(residual, mixed);
    return {residual, drop(mlp_->forward(narrow(x)))};
  }

  Mixer& mixer() override { return *mixer_; }
  double flops(int64_t batch, int64_t length) const override {
    return mixer_->flops(batch, length) + mlp_->flops(batch * length);
  }

 private:
  // Under autocast every projection would cast its input again: do it once for all of them.
  static at::Tensor narrow(const at::Tensor& x) {
    const auto device = x.device().type();
    return at::autocast::is_autocast_enabled(device)
               ? x.to(at::autocast::get_autocast_dtype(device))
               : x;
  }
  at::Tensor drop(const at::Tensor& x) const { return at::dropout(x, dropout_, is_training()); }

  double dropout_;
  std::shared_ptr<Norm> mixer_norm_, mlp_norm_;
  std::shared_ptr<Mixer> mixer_;
  std::shared_ptr<Mlp> mlp_;
};

// down_proj(silu(gate_proj x) * up_proj x), Shazeer 2020, eq. 6.
class SwiGlu : public Mlp {
 public:
  SwiGlu(int64_t dim, int64_t hidden) {
    gate_proj_ = register_module("gate_proj", nn::Linear(dim, hidden));
    up_proj_ = register_module("up_proj", nn::Linear(dim, hidden));
    down_proj_ = register_module("down_proj", nn::Linear(hidden, dim));
  }

  at::Tensor forward(const at::Tensor& x_btd) override {
    return down_proj_->forward(at::silu(gate_proj_->forward(x_btd)) * up_proj_->forward(x_btd));
  }
  double flops(int64_t tokens) const override {
    return gate_proj_->flops(tokens) + up_proj_->flops(tokens) + down_proj_->flops(tokens);
  }

 private:
  nn::Linear gate_proj_{nullptr}, up_proj_{nullptr}, down_proj_{nullptr};
};

// 8/3 of the width keeps the parameters of a plain MLP of 4 times the width.
int64_t swiglu_hidden(int64_t dim, int64_t multiple) {
  return (dim * 8 / 3 + multiple - 1) / multiple * multiple;
}

}  // namespace

void register_models() {
  register_attention();
  registry<Block>().add(
      {.name = "prenorm", .doc = "norm before mixer and mlp, residual around each", .defaults = ""},
      [](const Options&, const Block::Context& context) {
        return std::make_shared<PrenormBlock>(context);
      });
  registry<Mlp>().add(
      {.name = "swiglu",
       .doc = "gated linear unit with SiLU",
       .defaults = "hidden = 0      # inner width; 0 = 8/3 of the width, rounded up to `multiple`\n"
                   "multiple = 64\n"},
      [](const Options& o, const PartContext& context) {
        const auto hidden = o.non_negative("hidden");
        return std::make_shared<SwiGlu>(
            context.dim, hidden > 0 ? hidden : swiglu_hidden(context.dim, o.positive("multiple")));
      });
  registry<Model>().add(
      {.name = "lm",
       .doc = "causal language model from registered parts",
       .defaults = "dim = 512                         # width of the residual stream\n"
                   "layers = 8\n"
                   "block = { name = \"prenorm\" }\n"
                   "mixer = { name = \"gla\" }          # or a list, one entry a layer\n"
                   "mlp = { name = \"swiglu\" }\n"
                   "norm = { name = \"rms_norm\" }\n"
                   "loss = { name = \"cce\" }\n"
                   "tie_embeddings = true\n"
                   "embed_scale = 1.0                  # sqrt(dim) calms the first steps\n"
                   "dropout = 0.0\n"
                   "recompute = \"none\"                # none | block\n",
       .parts = {{"block", "block"},
                 {"mixer", "mixer"},
                 {"mlp", "mlp"},
                 {"norm", "norm"},
                 {"loss", "loss"}}},
      [](const Options& o, const Model::Context& context) {
        LanguageModelOptions options;
        options.dim = o.positive("dim");
        options.layers = o.positive("layers");
        options.block = *o.find("block");
        options.mixer = *o.find("mixer");
        options.mlp = *o.find("mlp");
        options.norm = *o.find("norm");
        options.loss = *o.find("loss");
        options.tie_embeddings = o.flag("tie_embeddings");
        options.embed_scale = o.number("embed_scale");
        options.dropout = o.number_in("dropout", 0, 0.99);
        options.recompute = o.choice("recompute", {"none", "block"});
        return std::make_shared<LanguageModel>(options, context);
      });
}

}  // namespace ounce
