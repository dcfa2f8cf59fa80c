// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ounce/core/check.h>
#include <ounce/kernels/cce/cce.h>
#include <ounce/kernels/cce/cce_calls.h>
#include <ounce/kernels/cce/cce_fused.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <utility>

namespace ounce {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using detail::CceOptions;
using Inputs = detail::CceInputs;
using Outputs = detail::CceOutputs;
using Gradients = detail::CceGradients;
using Saved = detail::CceSaved;
using Wanted = detail::CceWanted;
using detail::any;
using detail::kGradModes;
using detail::kRecomputes;
using detail::kReductions;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- CPU and CUDA -------------------------------------------------------------------------------

Gradients backward_kernel(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                          const OptionalTensor& grad_entropy, const Inputs& in, const Saved& saved,
                          CceOptions o, Wanted wanted) {
  return detail::backward(grad_loss, grad_lse, grad_entropy, in, saved, std::move(o), wanted,
                          in.hidden.scalar_type());
}

void scale_kernel(const Tensor& gradient, const Tensor& factor) {
  auto in_place = gradient;
  if (fused::scales(gradient, factor)) {
    fused::scale_gradient(in_place, factor);
  } else {
    in_place.mul_(factor);
  }
}

Tensor rounded_kernel(const Tensor& gradient, const Tensor& factor, at::ScalarType type) {
  const bool fits = gradient.scalar_type() == at::kFloat && type == at::kBFloat16;
  if (fits && fused::scales(gradient, factor)) return fused::rounded_gradient(gradient, factor);
  return (gradient * factor).to(type);
}

// --- Meta ---------------------------------------------------------------------------------------

Tensor like(bool full, const Tensor& t) {
  return full ? at::empty_symint(t.sym_sizes(), t.options()) : at::empty({0}, t.options());
}

Outputs forward_meta(const Inputs& in, const CceOptions& o, Wanted wanted) {
  detail::check_wanted(in, o, wanted);
  const auto compute = detail::compute_type(in.hidden);
  const auto options = in.hidden.options().dtype(compute);
  const auto per_token = [&](at::ScalarType type, bool full) {
    return full ? at::empty_symint(in.target.sym_sizes(), options.dtype(type))
                : at::empty({0}, options.dtype(type));
  };
  const auto reduced = [&] {
    return o.reduction() == Reduction::kNone ? per_token(compute, true) : at::empty({}, options);
  };
  return {reduced(),
          per_token(compute, true),
          reduced(),
          at::empty({}, options.dtype(at::kLong)),
          per_token(at::kBool, o.return_correct()),
          per_token(compute, o.grad_mode() != GradMode::kExact),
          per_token(compute, true),
          per_token(compute, o.return_entropy()),
          like(wanted[0], in.hidden).to(compute),
          like(wanted[1] && !o.main_grad().defined(), in.weight),
          wanted[2] ? like(true, *in.bias) : at::empty({0}, in.weight.options())};
}

Gradients backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                        const Inputs& in, const Saved&, CceOptions o, Wanted wanted) {
  return {like(wanted[0], in.hidden), like(wanted[1] && !o.main_grad().defined(), in.weight),
          wanted[2] ? like(true, *in.bias) : at::empty({0}, in.weight.options())};
}

void scale_meta(const Tensor&, const Tensor&) {}

Tensor rounded_meta(const Tensor& gradient, const Tensor&, at::ScalarType type) {
  return at::empty_symint(gradient.sym_sizes(), gradient.options().dtype(type));
}

// --- the dispatcher: options as single arguments, and back --------------------------------------

template <Outputs (*kernel)(const Inputs&, const CceOptions&, Wanted)>
Outputs forward_entry(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                      const OptionalTensor& bias, const OptionalTensor& token_weight,
                      const OptionalTensor& class_weight, int64_t ignore_index,
                      c10::string_view reduction, bool empty_is_nan, int64_t shift,
                      double label_smoothing, double z_loss, double softcap, double logit_scale,
                      c10::string_view grad_mode, std::optional<double> filter_eps,
                      bool return_correct, bool return_entropy, bool validate_targets,
                      int64_t workspace_bytes, c10::string_view recompute, bool deterministic,
                      at::ScalarType accum, c10::string_view implementation, Wanted gradients,
                      const OptionalTensor& main_grad) {
  const auto options = CceOptions()
                           .ignore_index(ignore_index)
                           .reduction(kReductions.parse(reduction))
                           .empty_is_nan(empty_is_nan)
                           .shift(shift)
                           .label_smoothing(label_smoothing)
                           .z_loss(z_loss)
                           .softcap(softcap)
                           .logit_scale(logit_scale)
                           .grad_mode(kGradModes.parse(grad_mode))
                           .filter_eps(filter_eps)
                           .return_correct(return_correct)
                           .return_entropy(return_entropy)
                           .validate_targets(validate_targets)
                           .workspace_bytes(workspace_bytes)
                           .recompute(kRecomputes.parse(recompute))
                           .deterministic(deterministic)
                           .accum(accum)
                           .implementation(std::string(implementation))
                           .main_grad(main_grad.value_or(Tensor()));
  return kernel({hidden, weight, target, bias, token_weight, class_weight}, options, gradients);
}

template <Gradients (*kernel)(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const Inputs&, const Saved&, CceOptions, Wanted)>
Gradients backward_entry(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                         const OptionalTensor& grad_entropy, const Tensor& hidden,
                         const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                         const OptionalTensor& token_weight, const OptionalTensor& class_weight,
                         const Tensor& lse, const Tensor& nll, const OptionalTensor& entropy,
                         int64_t ignore_index, c10::string_view reduction, int64_t shift,
                         double label_smoothing, double z_loss, double softcap, double logit_scale,
                         c10::string_view grad_mode, std::optional<double> filter_eps,
                         int64_t workspace_bytes, bool deterministic, at::ScalarType accum,
                         c10::string_view implementation, Wanted wanted,
                         const OptionalTensor& main_grad) {
  const auto options = CceOptions()
                           .ignore_index(ignore_index)
                           .reduction(kReductions.parse(reduction))
                           .shift(shift)
                           .label_smoothing(label_smoothing)
                           .z_loss(z_loss)
                           .softcap(softcap)
                           .logit_scale(logit_scale)
                           .grad_mode(kGradModes.parse(grad_mode))
                           .filter_eps(filter_eps)
                           .workspace_bytes(workspace_bytes)
                           .deterministic(deterministic)
                           .accum(accum)
                           .implementation(std::string(implementation))
                           .main_grad(main_grad.value_or(Tensor()));
  return kernel(grad_loss, grad_lse, grad_entropy,
                {hidden, weight, target, bias, token_weight, class_weight}, {lse, nll, entropy},
                options, wanted);
}

OptionalTensor when_defined(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

Outputs call_forward(const Inputs& in, const CceOptions& o, Wanted wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::linear_cross_entropy", "")
                             .typed<decltype(forward_entry<detail::forward>)>();
  return op.call(in.hidden, in.weight, in.target, in.bias, in.token_weight, in.class_weight,
                 o.ignore_index(), kReductions.text(o.reduction()), o.empty_is_nan(), o.shift(),
                 o.label_smoothing(), o.z_loss(), o.softcap(), o.logit_scale(),
                 kGradModes.text(o.grad_mode()), o.filter_eps(), o.return_correct(),
                 o.return_entropy(), o.validate_targets(), o.workspace_bytes(),
                 kRecomputes.text(o.recompute()), o.deterministic(), o.accum(), o.implementation(),
                 wanted, when_defined(o.main_grad()));
}

void call_scale(const Tensor& gradient, const Tensor& factor) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::scale_gradient_", "")
                             .typed<decltype(scale_kernel)>();
  op.call(gradient, factor);
}

Tensor call_rounded(const Tensor& gradient, const Tensor& factor, at::ScalarType type) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::rounded_gradient", "")
                             .typed<decltype(rounded_kernel)>();
  return op.call(gradient, factor, type);
}

Gradients call_backward(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                        const OptionalTensor& grad_entropy, const Inputs& in, const Saved& saved,
                        const CceOptions& o, Wanted wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::linear_cross_entropy_backward", "")
                             .typed<decltype(backward_entry<backward_kernel>)>();
  return op.call(grad_loss, grad_lse, grad_entropy, in.hidden, in.weight, in.target, in.bias,
                 in.token_weight, in.class_weight, saved.lse, saved.nll, saved.entropy,
                 o.ignore_index(), kReductions.text(o.reduction()), o.shift(), o.label_smoothing(),
                 o.z_loss(), o.softcap(), o.logit_scale(), kGradModes.text(o.grad_mode()),
                 o.filter_eps(), o.workspace_bytes(), o.deterministic(), o.accum(),
                 o.implementation(), wanted, when_defined(o.main_grad()));
}

// --- autograd and autocast ----------------------------------------------------------------------

struct SavedOptions : torch::CustomClassHolder {
  explicit SavedOptions(CceOptions options_) : options(std::move(options_)) {}
  CceOptions options;
};

// Below autograd nobody counts main_grad's versions.
void was_added_to(const CceOptions& o) {
  if (o.main_grad().defined()) torch::autograd::impl::bump_version(o.main_grad());
}

// Which of the gradients that backward will want forward makes at once.
Wanted early_gradients(const Inputs& in, const CceOptions& o) {
  if (!at::GradMode::is_enabled()) return {};
  const Wanted wanted = {in.hidden.requires_grad(), in.weight.requires_grad(),
                         in.bias && in.bias->requires_grad()};
  if (!any(wanted)) return {};
  if (o.main_grad().defined() && wanted[1]) return {};  // only backward knows the upstream
  if (o.reduction() == Reduction::kNone || o.recompute() == Recompute::kAlways) return {};
  // What is too small for fp16 before a scaler's factor reaches it would be lost.
  if (in.weight.scalar_type() == at::kHalf) return {};
  if (o.recompute() == Recompute::kNever) return wanted;
  const bool fused =
      o.implementation() != "reference" &&
      fused::why_not_in_forward(in.hidden, in.weight, in.bias.has_value(), o).empty();
  return fused ? wanted : Wanted{};
}

class ForwardFunction : public torch::autograd::Function<ForwardFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                               const Tensor& target, const OptionalTensor& bias,
                               const OptionalTensor& token_weight,
                               const OptionalTensor& class_weight, const CceOptions& options,
                               Wanted asked, Wanted early) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Inputs in{hidden, weight, target, bias, token_weight, class_weight};
    auto [loss, lse, z_loss, n_valid, correct, dropped_mass, nll, entropy, grad_hidden, grad_weight,
          grad_bias] = call_forward(in, options, any(early) ? early : asked);
    variable_list saved = {hidden,
                           weight,
                           target,
                           bias.value_or(Tensor()),
                           token_weight.value_or(Tensor()),
                           class_weight.value_or(Tensor()),
                           lse,
                           nll,
                           options.return_entropy() ? entropy : Tensor()};
    ctx->saved_data["early"] = any(early);
    if (asked[1]) was_added_to(options);
    if (any(early)) {
      saved.insert(saved.end(), {grad_hidden, grad_weight, grad_bias});
      for (auto* t : {&grad_hidden, &grad_weight, &grad_bias}) *t = at::empty({0}, t->options());
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["options"] =
        c10::IValue::make_capsule(c10::make_intrusive<SavedOptions>(options));
    variable_list constant = {z_loss, n_valid,     correct,     dropped_mass,
                              nll,    grad_hidden, grad_weight, grad_bias};
    if (!options.return_entropy()) constant.push_back(entropy);
    ctx->mark_non_differentiable(constant);
    ctx->set_materialize_grads(false);
    return {loss, lse,     z_loss,      n_valid,     correct,  dropped_mass,
            nll,  entropy, grad_hidden, grad_weight, grad_bias};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(9);
    const auto &of_loss = grads[0], &of_lse = grads[1], &of_entropy = grads[7];
    if (!of_loss.defined() && !of_lse.defined() && !of_entropy.defined()) return out;
    const auto saved = ctx->get_saved_variables();
    const auto bias = when_defined(saved[3]), token_weight = when_defined(saved[4]),
               class_weight = when_defined(saved[5]);
    const auto held = ctx->saved_data["options"].toCapsule();
    const auto& options = static_cast<const SavedOptions&>(*held).options;
    const Wanted wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                           bias && ctx->needs_input_grad(3)};
    // A graph of this backward leads to BackwardFunction, which refuses a second derivative.
    const bool early =
        of_loss.defined() && ctx->saved_data["early"].toBool() && !at::GradMode::is_enabled();
    if (!early || of_lse.defined() || of_entropy.defined()) {
      auto [grad_hidden, grad_weight, grad_bias] =
          call_backward(early ? std::nullopt : when_defined(of_loss), when_defined(of_lse),
                        when_defined(of_entropy),
                        {saved[0], saved[1], saved[2], bias, token_weight, class_weight},
                        {saved[6], saved[7], when_defined(saved[8])}, options, wanted);
      if (wanted[1]) was_added_to(options);
      if (wanted[0]) out[0] = grad_hidden;
      if (wanted[1] && !options.main_grad().defined()) out[1] = grad_weight;
      if (wanted[2]) out[3] = grad_bias;
    }
    if (!early) return out;
    const auto put = [&](int place, const Tensor& gradient) {
      out[place] = out[place].defined() ? out[place].add_(gradient) : gradient;
    };
    if (wanted[0]) put(0, call_rounded(saved[9], of_loss, saved[0].scalar_type()));
    // Nobody needs these again unless the graph is kept.
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const auto scaled = [&](const Tensor& gradient) {
      const auto own = keep ? gradient.clone() : gradient;
      call_scale(own, of_loss);
      return own;
    };
    if (wanted[1]) put(1, scaled(saved[10]));
    if (wanted[2]) put(3, scaled(saved[11]));
    return out;
  }
};

// Its derivative would be the second one of the loss.
class BackwardFunction : public torch::autograd::Function<BackwardFunction> {
 public:
  static variable_list forward(AutogradContext*, const OptionalTensor& grad_loss,
                               const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                               const Tensor& hidden, const Tensor& weight, const Tensor& target,
                               const OptionalTensor& bias, const OptionalTensor& token_weight,
                               const OptionalTensor& class_weight, const Tensor& lse,
                               const Tensor& nll, const OptionalTensor& entropy,
                               const CceOptions& options, Wanted wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_hidden, grad_weight, grad_bias] =
        call_backward(grad_loss, grad_lse, grad_entropy,
                      {hidden, weight, target, bias, token_weight, class_weight},
                      {lse, nll, entropy}, options, wanted);
    return {grad_hidden, grad_weight, grad_bias};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    fail(Fault::kUsage, "[linear_cross_entropy] expected a first derivative, got double backward; ",
         "use a loss on materialised logits where second derivatives are needed");
  }
};

Outputs forward_autograd(const Inputs& in, const CceOptions& given, Wanted asked) {
  auto o = given;
  detail::check_constants(in);
  const bool adds_later = o.main_grad().defined() && in.weight.requires_grad() && !any(asked);
  OUNCE_CHECK(!adds_later || o.recompute() != Recompute::kNever,
              "[linear_cross_entropy] expected recompute = auto or always with main_grad, which "
              "backward adds to, got never");
  // The fused path's filter is in forward, which cannot add yet.
  if (adds_later && o.grad_mode() != GradMode::kExact) {
    takes_fused("linear_cross_entropy", o.implementation(), in.hidden,
                "a filter with a main_grad that backward adds to");
    o.implementation("reference");
  }
  auto out = ForwardFunction::apply(in.hidden, in.weight, in.target, in.bias, in.token_weight,
                                    in.class_weight, o, asked,
                                    any(asked) ? Wanted{} : early_gradients(in, o));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], out[9], out[10]};
}

Gradients backward_autograd(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                            const OptionalTensor& grad_entropy, const Inputs& in,
                            const Saved& saved, CceOptions o, Wanted wanted) {
  auto out = BackwardFunction::apply(grad_loss, grad_lse, grad_entropy, in.hidden, in.weight,
                                     in.target, in.bias, in.token_weight, in.class_weight,
                                     saved.lse, saved.nll, saved.entropy, o, wanted);
  return {out[0], out[1], out[2]};
}

// The hidden state is cast; the weight is read in slabs as it is.
Outputs forward_autocast(const Inputs& in, const CceOptions& o, Wanted wanted) {
  const auto device = in.hidden.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto hidden =
      at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), in.hidden, device);
  return call_forward({hidden, in.weight, in.target, in.bias, in.token_weight, in.class_weight}, o,
                      wanted);
}

}  // namespace

LinearCrossEntropyOutput linear_cross_entropy(const Tensor& hidden, const Tensor& weight,
                                              const Tensor& target, const OptionalTensor& bias,
                                              const OptionalTensor& token_weight,
                                              const OptionalTensor& class_weight,
                                              const LinearCrossEntropyOptions& o) {
  OUNCE_CHECK(hidden.defined() && weight.defined() && target.defined(),
              "[linear_cross_entropy] expected hidden, weight and target, got an undefined tensor");
  using detail::drop_undefined;
  const auto bias_ = drop_undefined(bias), token_weight_ = drop_undefined(token_weight),
             class_weight_ = drop_undefined(class_weight);
  auto options = o;
  // Whoever asks for these may differentiate them, which takes the logits again.
  if ((o.return_lse() || o.return_entropy()) && o.recompute() == Recompute::kAuto) {
    options.recompute(Recompute::kAlways);
  }
  auto [loss, lse, z_loss, n_valid, correct, dropped_mass, nll, entropy, grad_hidden, grad_weight,
        grad_bias] =
      call_forward({hidden, weight, target, bias_, token_weight_, class_weight_}, options, {});
  LinearCrossEntropyOutput out;
  out.loss = std::move(loss);
  out.n_valid = std::move(n_valid);
  if (o.return_lse()) out.lse = std::move(lse);
  if (o.return_z_loss()) out.z_loss = std::move(z_loss);
  if (o.return_log_prob()) out.log_prob = nll.neg();
  if (o.return_entropy()) out.entropy = std::move(entropy);
  if (o.return_correct()) out.correct = std::move(correct);
  if (o.grad_mode() != GradMode::kExact) out.dropped_mass = std::move(dropped_mass);
  return out;
}

TORCH_LIBRARY_FRAGMENT(ounce, m) {
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias=None, "
      "Tensor? token_weight=None, Tensor? class_weight=None, *, int ignore_index=-100, "
      "str reduction='mean', bool empty_is_nan=False, int shift=0, float label_smoothing=0., float "
      "z_loss=0., "
      "float softcap=0., float logit_scale=1., str grad_mode='exact', float? filter_eps=None, "
      "bool return_correct=False, bool return_entropy=False, bool validate_targets=False, int "
      "workspace_bytes=-1, "
      "str recompute='auto', bool deterministic=True, ScalarType accum=float, "
      "str implementation='auto', bool[3] gradients=[False, False, False], "
      "Tensor(a!)? main_grad=None) -> "
      "(Tensor loss, Tensor lse, Tensor z_loss, Tensor n_valid, Tensor correct, "
      "Tensor dropped_mass, Tensor nll, Tensor entropy, Tensor grad_hidden, Tensor grad_weight, "
      "Tensor grad_bias)");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");
  m.def("rounded_gradient(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor");
  m.def(
      "linear_cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor hidden, "
      "Tensor weight, Tensor target, Tensor? bias, Tensor? token_weight, Tensor? class_weight, "
      "Tensor lse, Tensor nll, Tensor? entropy, *, int ignore_index, str reduction, int shift, "
      "float "
      "label_smoothing, float z_loss, "
      "float softcap, float logit_scale, str grad_mode, float? filter_eps, int workspace_bytes, "
      "bool deterministic, ScalarType accum, str implementation, bool[3] wanted, "
      "Tensor(a!)? main_grad=None) -> "
      "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(ounce, CPU, m) {
  m.impl("linear_cross_entropy", forward_entry<detail::forward>);
  m.impl("linear_cross_entropy_backward", backward_entry<backward_kernel>);
  m.impl("scale_gradient_", scale_kernel);
  m.impl("rounded_gradient", rounded_kernel);
}
TORCH_LIBRARY_IMPL(ounce, CUDA, m) {
  m.impl("linear_cross_entropy", forward_entry<detail::forward>);
  m.impl("linear_cross_entropy_backward", backward_entry<backward_kernel>);
  m.impl("scale_gradient_", scale_kernel);
  m.impl("rounded_gradient", rounded_kernel);
}
TORCH_LIBRARY_IMPL(ounce, Meta, m) {
  m.impl("linear_cross_entropy", forward_entry<forward_meta>);
  m.impl("linear_cross_entropy_backward", backward_entry<backward_meta>);
  m.impl("scale_gradient_", scale_meta);
  m.impl("rounded_gradient", rounded_meta);
}
TORCH_LIBRARY_IMPL(ounce, Autograd, m) {
  m.impl("linear_cross_entropy", forward_entry<forward_autograd>);
  m.impl("linear_cross_entropy_backward", backward_entry<backward_autograd>);
}
TORCH_LIBRARY_IMPL(ounce, AutocastCPU, m) {
  m.impl("linear_cross_entropy", forward_entry<forward_autocast>);
}
TORCH_LIBRARY_IMPL(ounce, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", forward_entry<forward_autocast>);
}

}  // namespace ounce
