// SPDX-License-Identifier: MIT
#include <ounce/core/nn/forward_context.h>
#include <ounce/core/nn/parts.h>
#include <ounce/core/nn/rms_norm.h>
#include <ounce/core/registry.h>
#include <ounce/kernels/norm/norm.h>
#include <torch/torch.h>

namespace ounce {

namespace {

class RmsNorm final : public Norm {
 public:
  // The inner module is what a ForwardContext is shown. Only its parameter is registered here, so
  // that the parameter is called `weight`; both handles are one tensor, also after to(device).
  RmsNorm(int64_t dim, double eps) : inner_(std::make_shared<nn::RMSNormImpl>(dim, eps)) {
    weight = register_parameter("weight", inner_->weight);
  }

  at::Tensor forward(const at::Tensor& x_btd) override {
    if (auto* context = nn::ForwardContext::current()) return context->rms_norm(*inner_, x_btd);
    return rms_norm(x_btd, weight, inner_->eps);
  }

  std::pair<at::Tensor, at::Tensor> forward_add(const at::Tensor& residual_btd,
                                                const at::Tensor& delta_btd) override {
    if (auto* context = nn::ForwardContext::current()) {
      auto sum = delta_btd.defined() ? residual_btd + delta_btd : residual_btd;
      auto normed = context->rms_norm(*inner_, sum);
      return {std::move(sum), std::move(normed)};
    }
    return add_rms_norm(residual_btd, delta_btd, weight, inner_->eps);
  }

  at::Tensor weight;

 private:
  std::shared_ptr<nn::RMSNormImpl> inner_;
};

}  // namespace

void register_norm() {
  registry<Norm>().add({.name = "rms_norm",
                        .doc = "root mean square normalisation with a learned scale",
                        .defaults = "eps = 1e-5  # added to the mean square"},
                       [](const Options& o, const Norm::Context& c) -> std::shared_ptr<Norm> {
                         return std::make_shared<RmsNorm>(c.dim, o.number_in("eps", 1e-30, 1.0));
                       });
}

}  // namespace ounce
