// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/nn/linear.h>
#include <ounce/core/nn/parts.h>
#include <torch/nn/module.h>

// A mixer from outside of the library: y_t = W (x_t, x_(t-1), ..., x_(t-n+1)), with zeros before
// the start.
class TokenShift : public ounce::Mixer {
 public:
  TokenShift(int64_t dim, int64_t taps) : taps_(taps) {
    project_ = register_module("project", ounce::nn::Linear(dim * taps, dim));
  }

  at::Tensor forward(const at::Tensor& x_btd, ounce::SequenceContext& context) override {
    auto past = context.state != nullptr
                    ? context.state->tensors.at("past")
                    : at::zeros({x_btd.size(0), taps_ - 1, x_btd.size(2)}, x_btd.options());
    const auto all = at::cat({past, x_btd}, 1);
    const auto length = x_btd.size(1);
    std::vector<at::Tensor> shifted;
    for (int64_t i = 0; i < taps_; ++i) shifted.push_back(all.narrow(1, taps_ - 1 - i, length));
    if (context.state != nullptr) {
      context.state->tensors["past"] = all.narrow(1, length, taps_ - 1).clone();
      context.state->length += length;
    }
    return project_->forward(at::cat(shifted, -1));
  }

  ounce::MixerState make_state(int64_t batch, int64_t) const override {
    const auto dim = project_->weight.size(0);
    return {0, {{"past", at::zeros({batch, taps_ - 1, dim}, project_->weight.options())}}};
  }

  double flops(int64_t batch, int64_t length) const override {
    return project_->flops(batch * length);
  }

  static std::shared_ptr<ounce::Mixer> make(const ounce::Options& options,
                                            const ounce::PartContext& context) {
    return std::make_shared<TokenShift>(context.dim, options.positive("taps"));
  }

 private:
  int64_t taps_;
  ounce::nn::Linear project_{nullptr};
};
