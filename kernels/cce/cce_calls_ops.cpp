// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ounce/kernels/cce/cce_calls.h>
#include <ounce/kernels/cce/cce_fused.h>
#include <ounce/kernels/cce/cce_reference.h>

#include <cmath>

namespace ounce::detail {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Per-token values at the target's place -> at the place they are predicted from, flat.
Tensor to_hidden_place(const Tensor& t, int64_t shift) {
  return (shift == 0 ? t : at::roll(t, -shift, -1)).reshape({t.numel()});
}
Tensor to_target_place(const Tensor& rows, const Tensor& target, int64_t shift) {
  const auto t = rows.view(target.sizes());
  return shift == 0 ? t : at::roll(t, shift, -1);
}

// Flat, at the place they are predicted from.
Tensor targets_at_hidden(const CceInputs& in, const CceOptions& o) {
  if (o.shift() == 0) return in.target.reshape({in.target.numel()});
  auto target = in.target.to(at::kLong, /*non_blocking=*/false, /*copy=*/true);
  target.narrow(-1, 0, o.shift()).fill_(o.ignore_index());
  return to_hidden_place(target, o.shift());
}

reference::Tokens tokens_of(bool fused, const CceInputs& in, const CceOptions& o) {
  const auto target = targets_at_hidden(in, o);
  const auto token_weight =
      in.token_weight ? OptionalTensor(to_hidden_place(*in.token_weight, o.shift())) : std::nullopt;
  const auto vocab = in.weight.size(0);
  if (fused) return fused::describe_tokens(target, token_weight, in.class_weight, vocab, o);
  return reference::describe_tokens(target.to(at::kLong), target.ne(o.ignore_index()), token_weight,
                                    in.class_weight, vocab, compute_type(in.hidden));
}

void check_targets(const CceInputs& in, const CceOptions& o) {
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

bool is_fused(const Tensor& hidden, const CceInputs& in, const CceOptions& o) {
  return takes_fused("linear_cross_entropy", o.implementation(), hidden,
                     fused::why_not(hidden, in.weight, in.bias.has_value(), o));
}

CceGradients backward_rows(bool fused, const fused::Upstream& upstream, const Tensor& hidden,
                           const CceInputs& in, const reference::Tokens& tokens,
                           const fused::Results& results, const CceOptions& o, CceWanted wanted,
                           at::ScalarType hidden_type) {
  if (fused) {
    return fused::linear_cross_entropy_rows_backward(upstream, hidden, in.weight, in.bias,
                                                     in.class_weight, tokens, results, o, wanted,
                                                     hidden_type);
  }
  return reference::linear_cross_entropy_rows_backward(
      upstream.loss, upstream.lse, upstream.entropy, hidden, in.weight, in.bias, in.class_weight,
      tokens, o, wanted, hidden_type);
}

// Upstream of the rows' losses, from that of the loss.
Tensor upstream_of_rows(const Tensor& grad_loss, const reference::Tokens& tokens,
                        const CceOptions& o) {
  if (o.reduction() == Reduction::kMean) return grad_loss / tokens.denominator;
  return o.reduction() == Reduction::kNone ? to_hidden_place(grad_loss, o.shift()) : grad_loss;
}

}  // namespace

void check_wanted(const CceInputs& in, const CceOptions& o, CceWanted wanted) {
  OUNCE_CHECK(!any(wanted) || o.reduction() != Reduction::kNone,
              "[linear_cross_entropy] expected gradients of a scalar, got reduction = none; use "
              "mean, sum or autograd");
  OUNCE_CHECK(!wanted[2] || in.bias,
              "[linear_cross_entropy] expected a bias, whose gradient is asked for");
}

CceOutputs forward(const CceInputs& in, const CceOptions& o, CceWanted wanted) {
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
      fused::why_not_in_forward(hidden, in.weight, in.bias.has_value(), o).empty()) {
    std::tie(rows, grad_hidden, grad_weight) = fused::linear_cross_entropy_rows_with_gradients(
        upstream(), hidden, in.weight, tokens, o, {wanted[0], wanted[1]});
  } else {
    rows = fused ? fused::linear_cross_entropy_rows(hidden, in.weight, in.bias, in.class_weight,
                                                    tokens, o)
                 : reference::linear_cross_entropy_rows(hidden, in.weight, in.bias, in.class_weight,
                                                        tokens, o);
    if (any(wanted)) {
      std::tie(grad_hidden, grad_weight, grad_bias) =
          backward_rows(fused, {upstream(), at::zeros({}, tokens.weight.options()), {}}, hidden, in,
                        tokens, {rows.lse, rows.nll, {}}, o, wanted, tokens.weight.scalar_type());
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

CceGradients backward(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                      const OptionalTensor& grad_entropy, const CceInputs& in,
                      const CceSaved& saved, CceOptions o, CceWanted wanted,
                      at::ScalarType hidden_type) {
  check_inputs(in, o);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto hidden = in.hidden.reshape({in.target.numel(), in.hidden.size(-1)});
  OUNCE_CHECK(
      !grad_entropy || saved.entropy,
      "[linear_cross_entropy] expected the entropy that forward gave, with a gradient of it");
  o.return_entropy(grad_entropy.has_value());
  const bool fused =
      o.grad_mode() == GradMode::kExact
          ? is_fused(hidden, in, o)
          : takes_fused("linear_cross_entropy", o.implementation(), hidden, "a filter in backward");
  const auto tokens = tokens_of(fused, in, o);
  const auto compute = tokens.weight.options();
  const auto zero = at::zeros({}, compute);
  const auto at_hidden = [&](const OptionalTensor& t) {
    return t ? to_hidden_place(t->to(compute), o.shift()) : Tensor();
  };
  const fused::Upstream upstream = {
      grad_loss ? upstream_of_rows(grad_loss->to(compute), tokens, o) : zero,
      grad_lse ? at_hidden(grad_lse) : zero, at_hidden(grad_entropy)};
  auto [grad_hidden, grad_weight, grad_bias] =
      backward_rows(fused, upstream, hidden, in, tokens,
                    {at_hidden(saved.lse), at_hidden(saved.nll), at_hidden(saved.entropy)}, o,
                    wanted, hidden_type);
  if (wanted[0]) grad_hidden = grad_hidden.view(in.hidden.sizes());
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace ounce::detail
