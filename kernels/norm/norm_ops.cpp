// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ounce/core/check.h>
#include <ounce/kernels/norm/norm.h>
#include <ounce/kernels/norm/norm_reference.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace ounce {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check_norm(const char* op, const Tensor& x, const OptionalTensor& weight, double eps) {
  OUNCE_CHECK(x.defined() && x.is_floating_point(), "[", op,
              "] expected x of a floating dtype, got ",
              x.defined() ? c10::toString(x.scalar_type()) : "an undefined tensor");
  OUNCE_CHECK(x.dim() >= 1, "[", op, "] expected x [..., d], got a scalar");
  OUNCE_CHECK(eps > 0, "[", op, "] expected eps > 0, got ", eps);
  if (!weight) return;
  OUNCE_CHECK(weight->is_floating_point(), "[", op, "] expected weight of a floating dtype, got ",
              weight->scalar_type());
  OUNCE_CHECK(weight->dim() == 1 && weight->size(0) == x.size(-1), "[", op,
              "] expected weight [d] with d = ", x.size(-1), ", got ", weight->sizes());
  OUNCE_CHECK(weight->device() == x.device(), "[", op, "] expected weight on ", x.device(),
              ", got ", weight->device(), "; move it there");
}

Tensor rms_norm_kernel(const Tensor& x, const OptionalTensor& weight, double eps) {
  check_norm("rms_norm", x, weight, eps);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return reference::rms_norm(x, weight, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm_kernel(const Tensor& residual, const Tensor& delta,
                                               const OptionalTensor& weight, double eps) {
  check_norm("add_rms_norm", residual, weight, eps);
  OUNCE_CHECK(delta.is_floating_point() && delta.sizes() == residual.sizes(),
              "[add_rms_norm] expected residual and delta of one shape and floating dtypes, got ",
              residual.sizes(), " and ", delta.sizes(), " ", delta.scalar_type());
  OUNCE_CHECK(delta.device() == residual.device(), "[add_rms_norm] expected delta on ",
              residual.device(), ", got ", delta.device(), "; move it there");
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  auto sum = (residual + delta).contiguous();
  auto normed = reference::rms_norm(sum, weight, eps);
  return {std::move(sum), std::move(normed)};
}

std::tuple<Tensor, Tensor> backward_kernel(const Tensor& grad, const Tensor& x,
                                           const OptionalTensor& weight, double eps,
                                           const OptionalTensor& grad_residual,
                                           std::array<bool, 2> wanted) {
  check_norm("rms_norm_backward", x, weight, eps);
  OUNCE_CHECK(grad.sizes() == x.sizes(), "[rms_norm_backward] expected grad of x's shape ",
              x.sizes(), ", got ", grad.sizes());
  OUNCE_CHECK(!wanted[1] || weight,
              "[rms_norm_backward] expected a weight for its gradient, got none");
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return reference::rms_norm_backward(grad, x, weight, eps, grad_residual, wanted);
}

Tensor rms_norm_meta(const Tensor& x, const OptionalTensor&, double) {
  return at::empty_symint(x.sym_sizes(), x.options());
}

std::tuple<Tensor, Tensor> add_rms_norm_meta(const Tensor& residual, const Tensor& delta,
                                             const OptionalTensor&, double) {
  const auto options = residual.options().dtype(at::result_type(residual, delta));
  return {at::empty_symint(residual.sym_sizes(), options),
          at::empty_symint(residual.sym_sizes(), options)};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x,
                                         const OptionalTensor& weight, double,
                                         const OptionalTensor&, std::array<bool, 2> wanted) {
  const auto weight_options = (weight ? *weight : x).options();
  return {wanted[0] ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options()),
          wanted[1] ? at::empty_symint(weight->sym_sizes(), weight_options)
                    : at::empty({0}, weight_options)};
}

Tensor call_rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::rms_norm", "")
                             .typed<decltype(rms_norm_kernel)>();
  return op.call(x, weight, eps);
}

std::tuple<Tensor, Tensor> call_add_rms_norm(const Tensor& residual, const Tensor& delta,
                                             const OptionalTensor& weight, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::add_rms_norm", "")
                             .typed<decltype(add_rms_norm_kernel)>();
  return op.call(residual, delta, weight, eps);
}

std::tuple<Tensor, Tensor> call_backward(const Tensor& grad, const Tensor& x,
                                         const OptionalTensor& weight, double eps,
                                         const OptionalTensor& grad_residual,
                                         std::array<bool, 2> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::rms_norm_backward", "")
                             .typed<decltype(backward_kernel)>();
  return op.call(grad, x, weight, eps, grad_residual, wanted);
}

OptionalTensor when_defined(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                        double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    return call_rms_norm(x, weight, eps);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(3);
    const auto saved = ctx->get_saved_variables();
    const auto weight = when_defined(saved[1]);
    const std::array<bool, 2> wanted = {ctx->needs_input_grad(0),
                                        weight && ctx->needs_input_grad(1)};
    auto [grad_x, grad_weight] = call_backward(
        grads[0], saved[0], weight, ctx->saved_data["eps"].toDouble(), std::nullopt, wanted);
    return {wanted[0] ? grad_x : Tensor(), wanted[1] ? grad_weight : Tensor(), Tensor()};
  }
};

class AddRmsNormFunction : public torch::autograd::Function<AddRmsNormFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& residual, const Tensor& delta,
                               const OptionalTensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [sum, normed] = call_add_rms_norm(residual, delta, weight, eps);
    ctx->save_for_backward({sum, weight.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["residual_type"] = static_cast<int64_t>(residual.scalar_type());
    ctx->saved_data["delta_type"] = static_cast<int64_t>(delta.scalar_type());
    ctx->set_materialize_grads(false);
    return {sum, normed};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto weight = when_defined(saved[1]);
    const bool residual_wanted = ctx->needs_input_grad(0), delta_wanted = ctx->needs_input_grad(1);
    const bool weight_wanted = weight && ctx->needs_input_grad(2);
    Tensor grad_sum = grads[0], grad_weight;
    if (grads[1].defined()) {
      const std::array<bool, 2> wanted = {residual_wanted || delta_wanted, weight_wanted};
      auto [dx, dw] = call_backward(grads[1], saved[0], weight, ctx->saved_data["eps"].toDouble(),
                                    when_defined(grads[0]), wanted);
      if (wanted[0]) grad_sum = dx;
      if (wanted[1]) grad_weight = dw;
    }
    const auto as = [&](bool is_wanted, const char* type) {
      if (!is_wanted || !grad_sum.defined()) return Tensor();
      return grad_sum.to(static_cast<at::ScalarType>(ctx->saved_data[type].toInt()));
    };
    return {as(residual_wanted, "residual_type"), as(delta_wanted, "delta_type"), grad_weight,
            Tensor()};
  }
};

// Its derivative would be the second one of the norm.
class BackwardFunction : public torch::autograd::Function<BackwardFunction> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& x,
                               const OptionalTensor& weight, double eps,
                               const OptionalTensor& grad_residual, std::array<bool, 2> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_x, grad_weight] = call_backward(grad, x, weight, eps, grad_residual, wanted);
    return {grad_x, grad_weight};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    fail(Fault::kUsage, "[rms_norm] expected a first derivative, got double backward; ",
         "use ounce::nn::RMSNorm where second derivatives are needed");
  }
};

Tensor rms_norm_autograd(const Tensor& x, const OptionalTensor& weight, double eps) {
  return RmsNormFunction::apply(x, weight, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm_autograd(const Tensor& residual, const Tensor& delta,
                                                 const OptionalTensor& weight, double eps) {
  auto out = AddRmsNormFunction::apply(residual, delta, weight, eps);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad, const Tensor& x,
                                             const OptionalTensor& weight, double eps,
                                             const OptionalTensor& grad_residual,
                                             std::array<bool, 2> wanted) {
  auto out = BackwardFunction::apply(grad, x, weight, eps, grad_residual, wanted);
  return {out[0], out[1]};
}

OptionalTensor drop_undefined(const OptionalTensor& t) {
  return t && t->defined() ? t : std::nullopt;
}

}  // namespace

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  OUNCE_CHECK(x.defined(), "[rms_norm] expected x of a floating dtype, got an undefined tensor");
  return call_rms_norm(x, drop_undefined(weight), eps);
}

std::pair<Tensor, Tensor> add_rms_norm(const Tensor& residual, const OptionalTensor& delta,
                                       const OptionalTensor& weight, double eps) {
  OUNCE_CHECK(residual.defined(),
              "[add_rms_norm] expected residual [..., d], got an undefined tensor");
  if (!drop_undefined(delta)) return {residual, rms_norm(residual, weight, eps)};
  auto [sum, normed] = call_add_rms_norm(residual, *delta, drop_undefined(weight), eps);
  return {std::move(sum), std::move(normed)};
}

TORCH_LIBRARY_FRAGMENT(ounce, m) {
  m.def("rms_norm(Tensor x, Tensor? weight=None, float eps=1e-05) -> Tensor");
  m.def(
      "add_rms_norm(Tensor residual, Tensor delta, Tensor? weight=None, float eps=1e-05) -> "
      "(Tensor sum, Tensor normed)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, Tensor? grad_residual, "
      "bool[2] wanted) -> (Tensor grad_x, Tensor grad_weight)");
}

#define OUNCE_NORM_KERNELS(m)                  \
  m.impl("rms_norm", rms_norm_kernel);         \
  m.impl("add_rms_norm", add_rms_norm_kernel); \
  m.impl("rms_norm_backward", backward_kernel)

TORCH_LIBRARY_IMPL(ounce, CPU, m) { OUNCE_NORM_KERNELS(m); }
TORCH_LIBRARY_IMPL(ounce, CUDA, m) { OUNCE_NORM_KERNELS(m); }
TORCH_LIBRARY_IMPL(ounce, Meta, m) {
  m.impl("rms_norm", rms_norm_meta);
  m.impl("add_rms_norm", add_rms_norm_meta);
  m.impl("rms_norm_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(ounce, Autograd, m) {
  m.impl("rms_norm", rms_norm_autograd);
  m.impl("add_rms_norm", add_rms_norm_autograd);
  m.impl("rms_norm_backward", backward_autograd);
}

// Outputs keep the input's dtype: nothing to cast.
#define OUNCE_NORM_FALLTHROUGH(m)                                \
  m.impl("rms_norm", torch::CppFunction::makeFallthrough());     \
  m.impl("add_rms_norm", torch::CppFunction::makeFallthrough()); \
  m.impl("rms_norm_backward", torch::CppFunction::makeFallthrough())

TORCH_LIBRARY_IMPL(ounce, AutocastCPU, m) { OUNCE_NORM_FALLTHROUGH(m); }
TORCH_LIBRARY_IMPL(ounce, AutocastCUDA, m) { OUNCE_NORM_FALLTHROUGH(m); }

#undef OUNCE_NORM_KERNELS
#undef OUNCE_NORM_FALLTHROUGH

}  // namespace ounce
