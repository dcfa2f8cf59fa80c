// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ounce/core/check.h>
#include <ounce/kernels/cce/cce.h>
#include <ounce/kernels/cce/cce_checks.h>
#include <ounce/kernels/cce/cce_fused.h>
#include <ounce/kernels/cce/cce_reference.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <cmath>
#include <utility>

namespace ounce {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using detail::CceOptions;
using Inputs = detail::CceInputs;
using detail::check_inputs;
using detail::kGradModes;
using detail::kRecomputes;
using detail::kReductions;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// loss, lse, z_loss, n_valid, correct, dropped_mass, nll, entropy, and the loss's gradients of
// hidden (not yet rounded to 16 bits), weight and bias; those without a value are empty [0]
// tensors.
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                           Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using Wanted = std::array<bool, 3>;  // of the gradients

bool any(const Wanted& wanted) { return wanted[0] || wanted[1] || wanted[2]; }

// What backward takes from forward, per token.
struct Saved {
  const Tensor lse, nll;
};

// --- CPU and CUDA -------------------------------------------------------------------------------

// Per-token values at the target's place -> at the place they are predicted from, flat.
Tensor to_hidden_place(const Tensor& t, int64_t shift) {
  return (shift == 0 ? t : at::roll(t, -shift, -1)).reshape({t.numel()});
}
Tensor to_target_place(const Tensor& rows, const Tensor& target, int64_t shift) {
  const auto t = rows.view(target.sizes());
  return shift == 0 ? t : at::roll(t, shift, -1);
}

// Flat, at the place they are predicted from.
Tensor targets_at_hidden(const Inputs& in, const CceOptions& o) {
  if (o.shift() == 0) return in.target.reshape({in.target.numel()});
  auto target = in.target.to(at::kLong, /*non_blocking=*/false, /*copy=*/true);
  target.narrow(-1, 0, o.shift()).fill_(o.ignore_index());
  return to_hidden_place(target, o.shift());
}

reference::Tokens tokens_of(bool fused, const Inputs& in, const CceOptions& o) {
  const auto target = targets_at_hidden(in, o);
  const auto token_weight =
      in.token_weight ? OptionalTensor(to_hidden_place(*in.token_weight, o.shift())) : std::nullopt;
  const auto vocab = in.weight.size(0);
  if (fused) return fused::describe_tokens(target, token_weight, in.class_weight, vocab, o);
  const auto compute = in.hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return reference::describe_tokens(target.to(at::kLong), target.ne(o.ignore_index()), token_weight,
                                    in.class_weight, vocab, compute);
}

void check_targets(const Inputs& in, const CceOptions& o) {
  const auto target =
      o.shift() == 0 ? in.target : in.target.narrow(-1, o.shift(), in.target.size(-1) - o.shift());
  const auto bad = target.lt(0)
                       .logical_or_(target.ge(in.weight.size(0)))
                       .logical_and_(target.ne(o.ignore_index()));
  if (!bad.any().item<bool>()) return;
  fail(Fault::kUsage, "[linear_cross_entropy] expected targets in [0, ", in.weight.size(0),
       ") or ignore_index = ", o.ignore_index(), ", got ", bad.sum().item<int64_t>(),
       " others, the first ", target.masked_select(bad).select(0, 0).item<int64_t>());
}

bool is_fused(const Tensor& hidden, const Inputs& in, const CceOptions& o) {
  return takes_fused("linear_cross_entropy", o.implementation(), hidden,
                     fused::why_not(hidden, in.weight, in.bias.has_value(), in.class_weight, o));
}

Gradients backward_rows(bool fused, const Tensor& grad_rows, const Tensor& grad_lse,
                        const Tensor& grad_entropy, const Tensor& hidden, const Inputs& in,
                        const reference::Tokens& tokens, const Saved& saved, const CceOptions& o,
                        Wanted wanted, at::ScalarType hidden_type) {
  if (fused) {
    return fused::linear_cross_entropy_rows_backward(grad_rows, grad_lse, hidden, in.weight,
                                                     in.bias, tokens, saved.lse, saved.nll, o,
                                                     wanted, hidden_type);
  }
  return reference::linear_cross_entropy_rows_backward(grad_rows, grad_lse, grad_entropy, hidden,
                                                       in.weight, in.bias, in.class_weight, tokens,
                                                       o, wanted, hidden_type);
}

// Upstream of the rows' losses, from that of the loss.
Tensor upstream_of_rows(const Tensor& grad_loss, const reference::Tokens& tokens,
                        const CceOptions& o) {
  if (o.reduction() == Reduction::kMean) return grad_loss / tokens.denominator;
  return o.reduction() == Reduction::kNone ? to_hidden_place(grad_loss, o.shift()) : grad_loss;
}

void check_wanted(const Inputs& in, const CceOptions& o, Wanted wanted) {
  OUNCE_CHECK(!any(wanted) || o.reduction() != Reduction::kNone,
              "[linear_cross_entropy] expected gradients of a scalar, got reduction = none; use "
              "mean, sum or autograd");
  OUNCE_CHECK(!wanted[2] || in.bias,
              "[linear_cross_entropy] expected a bias, whose gradient is asked for");
}

Outputs forward_kernel(const Inputs& in, const CceOptions& o, Wanted wanted) {
  check_inputs(in, o);
  check_wanted(in, o, wanted);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (o.validate_targets()) check_targets(in, o);
  const auto hidden = in.hidden.reshape({in.target.numel(), in.hidden.size(-1)});
  const bool fused = is_fused(hidden, in, o);
  const auto tokens = tokens_of(fused, in, o);
  const auto upstream = [&] {
    return upstream_of_rows(at::ones({}, tokens.weight.options()), tokens, o);
  };
  reference::ForwardRows rows;
  Tensor grad_hidden = at::empty({0}, tokens.weight.options());
  Tensor grad_weight = at::empty({0}, in.weight.options());
  Tensor grad_bias = at::empty({0}, in.weight.options());
  const bool makes_gradients = any(wanted) || o.grad_mode() != GradMode::kExact;
  if (makes_gradients && fused &&
      fused::keeps_exponentials(hidden, in.weight, in.bias.has_value(), o)) {
    std::tie(rows, grad_hidden, grad_weight) = fused::linear_cross_entropy_rows_with_gradients(
        upstream(), hidden, in.weight, tokens, o, {wanted[0], wanted[1]});
  } else {
    rows = fused ? fused::linear_cross_entropy_rows(hidden, in.weight, in.bias, tokens, o)
                 : reference::linear_cross_entropy_rows(hidden, in.weight, in.bias, in.class_weight,
                                                        tokens, o);
    if (any(wanted)) {
      std::tie(grad_hidden, grad_weight, grad_bias) =
          backward_rows(fused, upstream(), at::zeros({}, tokens.weight.options()), {}, hidden, in,
                        tokens, {rows.lse, rows.nll}, o, wanted, tokens.weight.scalar_type());
    }
  }
  const auto per_token = [&](const Tensor& t) { return to_target_place(t, in.target, o.shift()); };
  const auto reduce = [&](const Tensor& t) {
    if (o.reduction() == Reduction::kNone) return per_token(t);
    if (o.reduction() == Reduction::kSum) return t.sum();
    const auto mean = t.sum() / tokens.denominator;
    if (!o.empty_is_nan()) return mean;
    return mean.masked_fill(tokens.counted.any().logical_not(), std::nan(""));
  };
  return {reduce(rows.loss),
          per_token(rows.lse),
          reduce(rows.z_loss),
          tokens.counted.sum(),
          o.return_correct() ? per_token(rows.correct) : rows.correct,
          o.grad_mode() == GradMode::kExact ? rows.dropped_mass : per_token(rows.dropped_mass),
          per_token(rows.nll),
          o.return_entropy() ? per_token(rows.entropy) : rows.entropy,
          wanted[0] ? grad_hidden.view(in.hidden.sizes()) : grad_hidden,
          grad_weight,
          grad_bias};
}

Gradients backward_kernel(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                          const OptionalTensor& grad_entropy, const Inputs& in, const Saved& saved,
                          CceOptions o, Wanted wanted) {
  check_inputs(in, o);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto hidden = in.hidden.reshape({in.target.numel(), in.hidden.size(-1)});
  o.return_entropy(grad_entropy.has_value());
  // With a filter the fused path makes gradients in forward alone.
  const bool fused = o.grad_mode() == GradMode::kExact && is_fused(hidden, in, o);
  const auto tokens = tokens_of(fused, in, o);
  const auto compute = tokens.weight.options();
  const auto zero = at::zeros({}, compute);
  auto [grad_hidden, grad_weight, grad_bias] = backward_rows(
      fused, grad_loss ? upstream_of_rows(grad_loss->to(compute), tokens, o) : zero,
      grad_lse ? to_hidden_place(grad_lse->to(compute), o.shift()) : zero,
      grad_entropy ? to_hidden_place(*grad_entropy, o.shift()) : Tensor(), hidden, in, tokens,
      {to_hidden_place(saved.lse, o.shift()), to_hidden_place(saved.nll, o.shift())}, o, wanted,
      hidden.scalar_type());
  if (wanted[0]) grad_hidden = grad_hidden.view(in.hidden.sizes());
  return {grad_hidden, grad_weight, grad_bias};
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
  check_wanted(in, o, wanted);
  const auto compute = in.hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
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
          like(wanted[1], in.weight),
          wanted[2] ? like(true, *in.bias) : at::empty({0}, in.weight.options())};
}

Gradients backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                        const Inputs& in, const Saved&, CceOptions, Wanted wanted) {
  return {like(wanted[0], in.hidden), like(wanted[1], in.weight),
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
                      at::ScalarType accum, c10::string_view implementation, Wanted gradients) {
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
                           .implementation(std::string(implementation));
  return kernel({hidden, weight, target, bias, token_weight, class_weight}, options, gradients);
}

template <Gradients (*kernel)(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const Inputs&, const Saved&, CceOptions, Wanted)>
Gradients backward_entry(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                         const OptionalTensor& grad_entropy, const Tensor& hidden,
                         const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                         const OptionalTensor& token_weight, const OptionalTensor& class_weight,
                         const Tensor& lse, const Tensor& nll, int64_t ignore_index,
                         c10::string_view reduction, int64_t shift, double label_smoothing,
                         double z_loss, double softcap, double logit_scale,
                         c10::string_view grad_mode, std::optional<double> filter_eps,
                         int64_t workspace_bytes, bool deterministic, at::ScalarType accum,
                         c10::string_view implementation, Wanted wanted) {
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
                           .implementation(std::string(implementation));
  return kernel(grad_loss, grad_lse, grad_entropy,
                {hidden, weight, target, bias, token_weight, class_weight}, {lse, nll}, options,
                wanted);
}

Outputs call_forward(const Inputs& in, const CceOptions& o, Wanted wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ounce::linear_cross_entropy", "")
                             .typed<decltype(forward_entry<forward_kernel>)>();
  return op.call(
      in.hidden, in.weight, in.target, in.bias, in.token_weight, in.class_weight, o.ignore_index(),
      kReductions.text(o.reduction()), o.empty_is_nan(), o.shift(), o.label_smoothing(), o.z_loss(),
      o.softcap(), o.logit_scale(), kGradModes.text(o.grad_mode()), o.filter_eps(),
      o.return_correct(), o.return_entropy(), o.validate_targets(), o.workspace_bytes(),
      kRecomputes.text(o.recompute()), o.deterministic(), o.accum(), o.implementation(), wanted);
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
                 in.token_weight, in.class_weight, saved.lse, saved.nll, o.ignore_index(),
                 kReductions.text(o.reduction()), o.shift(), o.label_smoothing(), o.z_loss(),
                 o.softcap(), o.logit_scale(), kGradModes.text(o.grad_mode()), o.filter_eps(),
                 o.workspace_bytes(), o.deterministic(), o.accum(), o.implementation(), wanted);
}

// --- autograd and autocast ----------------------------------------------------------------------

struct SavedOptions : torch::CustomClassHolder {
  explicit SavedOptions(CceOptions options_) : options(std::move(options_)) {}
  CceOptions options;
};

OptionalTensor when_defined(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Which of the gradients that backward will want forward makes at once.
Wanted early_gradients(const Inputs& in, const CceOptions& o) {
  if (!at::GradMode::is_enabled()) return {};
  const Wanted wanted = {in.hidden.requires_grad(), in.weight.requires_grad(),
                         in.bias && in.bias->requires_grad()};
  if (!any(wanted)) return {};
  if (o.reduction() == Reduction::kNone || o.recompute() == Recompute::kAlways) return {};
  // What is too small for fp16 before a scaler's factor reaches it would be lost.
  if (in.weight.scalar_type() == at::kHalf) return {};
  if (o.recompute() == Recompute::kNever) return wanted;
  const bool fused = o.implementation() != "reference" &&
                     fused::keeps_exponentials(in.hidden, in.weight, in.bias.has_value(), o);
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
                           nll};
    ctx->saved_data["early"] = any(early);
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
                        {saved[6], saved[7]}, options, wanted);
      if (wanted[0]) out[0] = grad_hidden;
      if (wanted[1]) out[1] = grad_weight;
      if (wanted[2]) out[3] = grad_bias;
    }
    if (!early) return out;
    const auto put = [&](int place, const Tensor& gradient) {
      out[place] = out[place].defined() ? out[place].add_(gradient) : gradient;
    };
    if (wanted[0]) put(0, call_rounded(saved[8], of_loss, saved[0].scalar_type()));
    // Nobody needs these again unless the graph is kept.
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const auto scaled = [&](const Tensor& gradient) {
      const auto own = keep ? gradient.clone() : gradient;
      call_scale(own, of_loss);
      return own;
    };
    if (wanted[1]) put(1, scaled(saved[9]));
    if (wanted[2]) put(3, scaled(saved[10]));
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
                               const Tensor& nll, const CceOptions& options, Wanted wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_hidden, grad_weight, grad_bias] = call_backward(
        grad_loss, grad_lse, grad_entropy,
        {hidden, weight, target, bias, token_weight, class_weight}, {lse, nll}, options, wanted);
    return {grad_hidden, grad_weight, grad_bias};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    fail(Fault::kUsage, "[linear_cross_entropy] expected a first derivative, got double backward; ",
         "use a loss on materialised logits where second derivatives are needed");
  }
};

Outputs forward_autograd(const Inputs& in, const CceOptions& o, Wanted asked) {
  OUNCE_CHECK(
      !in.token_weight || !in.token_weight->requires_grad(),
      "[linear_cross_entropy] expected token_weight without gradient; detach it, or weigh the "
      "losses of reduction = none");
  OUNCE_CHECK(!in.class_weight || !in.class_weight->requires_grad(),
              "[linear_cross_entropy] expected class_weight without gradient; detach it");
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
                                     saved.lse, saved.nll, o, wanted);
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
  const auto drop_undefined = [](const OptionalTensor& t) {
    return t && t->defined() ? t : std::nullopt;
  };
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
      "str implementation='auto', bool[3] gradients=[False, False, False]) -> "
      "(Tensor loss, Tensor lse, Tensor z_loss, Tensor n_valid, Tensor correct, "
      "Tensor dropped_mass, Tensor nll, Tensor entropy, Tensor grad_hidden, Tensor grad_weight, "
      "Tensor grad_bias)");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");
  m.def("rounded_gradient(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor");
  m.def(
      "linear_cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor hidden, "
      "Tensor weight, Tensor target, Tensor? bias, Tensor? token_weight, Tensor? class_weight, "
      "Tensor lse, Tensor nll, *, int ignore_index, str reduction, int shift, float "
      "label_smoothing, float z_loss, "
      "float softcap, float logit_scale, str grad_mode, float? filter_eps, int workspace_bytes, "
      "bool deterministic, ScalarType accum, str implementation, bool[3] wanted) -> "
      "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(ounce, CPU, m) {
  m.impl("linear_cross_entropy", forward_entry<forward_kernel>);
  m.impl("linear_cross_entropy_backward", backward_entry<backward_kernel>);
  m.impl("scale_gradient_", scale_kernel);
  m.impl("rounded_gradient", rounded_kernel);
}
TORCH_LIBRARY_IMPL(ounce, CUDA, m) {
  m.impl("linear_cross_entropy", forward_entry<forward_kernel>);
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
