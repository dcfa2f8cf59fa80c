// SPDX-License-Identifier: MIT
#include <ounce/kernels/cce/cce_fused_parts.h>

#include <limits>

namespace ounce::fused {

namespace {

// What a slab costs once weighs more, the less there is to multiply.
int64_t default_workspace_bytes(int64_t rows, int64_t dim) {
  return std::clamp((2 * rows << 24) / dim, int64_t{128} << 20, int64_t{512} << 20);
}

// fp32 values as three bf16 ones whose products are exact: [..., 3] in a new last dimension.
Tensor split(const Tensor& x) {
  const auto high = x.to(at::kBFloat16);
  const auto rest = x - high;
  const auto middle = rest.to(at::kBFloat16);
  return at::stack({high, middle, (rest - middle).to(at::kBFloat16)}, -1);
}
// a [M, K] fp32, b [K, N] bf16
Tensor exact_product(const Tensor& a, const Tensor& b) {
  const auto parts = split(a).permute({2, 0, 1}).reshape({3 * a.size(0), a.size(1)});
  return at::mm(parts, b, at::kFloat).view({3, a.size(0), b.size(1)}).sum(0);
}

// sum_j C_j over a slab, [D'] fp32.
Tensor column_sum(const Tensor& slab) {
  return at::mm(at::ones({1, slab.size(0)}, slab.options()), slab, at::kFloat).squeeze(0);
}

// Entries a slab, so that its dloss/dlogits fit the workspace: of the counts near the largest, the
// one whose tiles fill the GPU best.
int64_t slab_entries(int64_t rows, int64_t vocab, int64_t dim, const LinearCrossEntropyOptions& o) {
  const auto workspace =
      o.workspace_bytes() >= 0 ? o.workspace_bytes() : default_workspace_bytes(rows, dim);
  const auto most = std::max<int64_t>(1, workspace / (2 * rows) / cce::kTileColumns);
  return cce::best_slab(rows, vocab, dim, static_cast<int>(most), clusters(), cache_bytes());
}

}  // namespace

bool scales(const Tensor& gradient, const Tensor& factor) {
  const auto type = gradient.scalar_type();
  if (!gradient.is_cuda() || !gradient.is_contiguous() ||
      (type != at::kFloat && type != at::kBFloat16) || factor.device() != gradient.device() ||
      factor.numel() != 1 || factor.scalar_type() != at::kFloat ||
      reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % 16 != 0) {
    return false;
  }
  const c10::cuda::CUDAGuard guard(gradient.device());
  return clusters() > 0;
}

void scale_gradient(Tensor& gradient, const Tensor& factor) {
  const c10::cuda::CUDAGuard guard(gradient.device());
  C10_CUDA_CHECK(cce::scale_in_place(gradient.data_ptr(), gradient.scalar_type() == at::kFloat,
                                     gradient.numel(), factor.const_data_ptr<float>(),
                                     c10::cuda::getCurrentCUDAStream()));
}

Tensor rounded_gradient(const Tensor& gradient, const Tensor& factor) {
  const c10::cuda::CUDAGuard guard(gradient.device());
  auto out = at::empty(gradient.sizes(), gradient.options().dtype(at::kBFloat16));
  C10_CUDA_CHECK(cce::scale_to_bf16(gradient.const_data_ptr<float>(), gradient.numel(),
                                    factor.const_data_ptr<float>(), out.data_ptr(),
                                    c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::string why_not(const Tensor& hidden, const Tensor& weight, bool has_bias,
                    const OptionalTensor& class_weight, const LinearCrossEntropyOptions& o) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  if (auto refusal = refusal_of(hidden); !refusal.empty()) return refusal;
  if (hidden.numel() == 0) return "an empty hidden";
  if (hidden.numel() / hidden.size(-1) > most || weight.size(0) > most) return "2^31 rows";
  if (auto refusal = refusal_of(o); !refusal.empty()) return refusal;
  if (o.label_smoothing() > 0 && o.softcap() > 0) return "label smoothing with a softcap";
  if (o.label_smoothing() > 0 && class_weight) return "label smoothing with class weights";
  if (o.grad_mode() != GradMode::kExact) {
    if (o.recompute() == Recompute::kAlways)
      return "a filter with recompute = always (return_lse and return_entropy imply it)";
    const auto refusal = why_not_in_forward(hidden, weight, has_bias, o);
    if (!refusal.empty()) return "a filter with " + refusal;
  }
  return "";
}

reference::Tokens describe_tokens(const Tensor& target, const OptionalTensor& token_weight,
                                  const OptionalTensor& class_weight, int64_t vocab,
                                  const LinearCrossEntropyOptions& o) {
  const c10::cuda::CUDAGuard guard(target.device());
  const auto rows = target.size(0);
  const auto make = [&](at::ScalarType type) {
    return at::empty({rows}, target.options().dtype(type));
  };
  reference::Tokens t{.counted = make(at::kBool),
                      .weight = make(at::kFloat),
                      .hit_weight = make(at::kFloat),
                      .denominator = at::empty({}, target.options().dtype(at::kFloat)),
                      .place = make(at::kInt)};
  const auto y = target.contiguous();
  const auto floats = [](const OptionalTensor& t) {
    return t ? t->to(at::kFloat).contiguous() : Tensor();
  };
  const auto weights = floats(token_weight), classes = floats(class_weight);
  C10_CUDA_CHECK(cce::describe_tokens(
      rows,
      {.target = y.const_data_ptr(),
       .is_int64 = y.scalar_type() == at::kLong,
       .ignore_index = o.ignore_index(),
       .vocab = vocab,
       .token_weight = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
       .class_weight = classes.defined() ? classes.const_data_ptr<float>() : nullptr},
      {.place = t.place.data_ptr<int>(),
       .counted = t.counted.data_ptr<bool>(),
       .weight = t.weight.data_ptr<float>(),
       .hit_weight = t.hit_weight.data_ptr<float>(),
       .denominator = t.denominator.data_ptr<float>()},
      c10::cuda::getCurrentCUDAStream()));
  return t;
}

reference::ForwardRows linear_cross_entropy_rows(const Tensor& hidden, const Tensor& weight,
                                                 const OptionalTensor& bias,
                                                 const reference::Tokens& tokens,
                                                 const LinearCrossEntropyOptions& o) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto rows = hidden.size(0), vocab = weight.size(0);
  const auto x = operand(hidden);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  auto sums = at::empty({rows, 2}, fp32), target_logit = at::empty({rows}, fp32);
  auto* sum = static_cast<cce::Partial*>(sums.data_ptr());
  C10_CUDA_CHECK(cce::start_rows(rows, sum, nullptr, target_logit.data_ptr<float>(), stream));
  Tensor columns;
  const Slabs slabs(weight, bias, vocab);
  slabs.each([&](int64_t from, const Tensor& slab, const float* slab_bias) {
    const auto in_slab = from == 0 ? tokens.place : tokens.place - from;
    const auto logits = logits_of(x, slab, slab_bias, in_slab, o);
    auto partials = at::empty({logits.schedule.partials(), 2}, fp32);
    C10_CUDA_CHECK(cce::add_exponentials(logits, static_cast<cce::Partial*>(partials.data_ptr()),
                                         sum, target_logit.data_ptr<float>(), stream));
    if (o.label_smoothing() == 0) return;
    const auto sum = column_sum(slab);
    columns = columns.defined() ? columns.add_(sum) : sum;
  });
  const auto out = empty_outputs(rows, fp32);
  C10_CUDA_CHECK(cce::finish_rows(rows, row_loss(tokens, vocab, o), sum,
                                  target_logit.const_data_ptr<float>(), row_outputs(out, 0),
                                  stream));
  if (o.label_smoothing() > 0) {
    auto logits = exact_product(columns.unsqueeze(0), x.t()).squeeze(0);
    if (bias) logits += bias->sum(at::kFloat);
    const auto spread = out.lse - logits * (o.logit_scale() / static_cast<double>(vocab));
    const auto weights = tokens.weight * o.label_smoothing();
    out.loss.add_((spread * weights).masked_fill_(tokens.counted.logical_not(), 0));
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_rows_backward(
    const Tensor& grad_rows, const Tensor& grad_lse, const Tensor& hidden, const Tensor& weight,
    const OptionalTensor& bias, const reference::Tokens& tokens, const Tensor& lse,
    const Tensor& nll, const LinearCrossEntropyOptions& o, std::array<bool, 3> wanted,
    at::ScalarType hidden_type) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto rows = hidden.size(0), dim = hidden.size(1), vocab = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  auto factor = at::empty({rows}, fp32), at_target = at::empty({rows}, fp32),
       flat = at::empty({rows}, fp32);
  C10_CUDA_CHECK(cce::upstream_rows(rows, row_loss(tokens, vocab, o),
                                    row_upstream(grad_rows, grad_lse), lse.const_data_ptr<float>(),
                                    nll.const_data_ptr<float>(), factor.data_ptr<float>(),
                                    at_target.data_ptr<float>(), flat.data_ptr<float>(), stream));
  const auto x = counted_rows(hidden, tokens);
  const bool smooths = o.label_smoothing() > 0;

  const Slabs slabs(weight, bias, slab_entries(rows, vocab, x.size(1), o));
  auto dlogits = at::empty({rows, aligned(slabs.entries())}, x.options());
  auto rounding = at::zeros({rows}, fp32);
  const auto grad_x = wanted[0] ? at::empty(x.sizes(), fp32) : Tensor();
  const auto none = at::empty({0}, weight.options());
  const bool adds = o.main_grad().defined();
  const auto grad_weight = !wanted[1] ? none : adds ? o.main_grad() : at::empty_like(weight);
  Tensor grad_bias = at::empty({wanted[2] ? vocab : 0}, weight.options());
  Tensor row_of_weight;  // what smoothing takes from every row of its gradient
  if (smooths && wanted[1]) {
    row_of_weight = exact_product(flat.unsqueeze(0), x).narrow(1, 0, dim);
  }
  slabs.each([&](int64_t from, const Tensor& slab, const float* slab_bias) {
    const auto entries = slab.size(0);
    const auto in_slab = from == 0 ? tokens.place : tokens.place - from;
    const auto logits = logits_of(x, slab, slab_bias, in_slab, o);
    auto partials = at::empty({logits.schedule.partials()}, fp32);
    C10_CUDA_CHECK(cce::logit_gradient(logits,
                                       {.lse = lse.const_data_ptr<float>(),
                                        .factor = factor.const_data_ptr<float>(),
                                        .at_target = at_target.const_data_ptr<float>(),
                                        .out = dlogits.data_ptr(),
                                        .out_stride = dlogits.stride(0)},
                                       partials.data_ptr<float>(), rounding.data_ptr<float>(),
                                       stream));
    const auto d = dlogits.narrow(1, 0, entries);
    if (wanted[0]) {
      multiply(grad_x, d, slab, from > 0);
      if (smooths) grad_x.sub_(flat.unsqueeze(1) * column_sum(slab));
    }
    if (wanted[1]) {
      auto out = grad_weight.narrow(0, from, entries);
      if (x.size(1) != dim) {
        const auto product = at::mm(d.t(), x, at::kFloat).narrow(1, 0, dim);
        adds ? out.add_(product) : out.copy_(product);
      } else {
        multiply(out, d.t(), x, adds);
      }
      if (smooths) out.sub_(row_of_weight);
    }
    if (wanted[2]) {
      const auto sum = d.sum(0, false, at::kFloat);
      grad_bias.narrow(0, from, entries).copy_(smooths ? sum - flat.sum() : sum);
    }
  });
  const auto grad_hidden = at::empty(wanted[0] ? hidden.sizes() : at::IntArrayRef{0},
                                     hidden.options().dtype(hidden_type));
  // What rounding took from or gave to a row's sum goes to its target: exact where the classifier's
  // rows are alike, and their errors would add up.
  if (wanted[0]) finish_hidden(grad_hidden, grad_x, {}, rounding.neg_(), weight, tokens.place);
  return {grad_hidden, adds ? none : grad_weight, grad_bias};
}

}  // namespace ounce::fused
