// SPDX-License-Identifier: MIT
#include <ounce/kernels/cce/cce_fused_parts.h>

#include <limits>

namespace ounce::fused {

namespace {

// What a slab costs once weighs more, the less there is to multiply.
int64_t default_workspace_bytes(int64_t rows, int64_t dim) {
  return std::clamp((2 * rows << 24) / dim, int64_t{128} << 20, int64_t{512} << 20);
}

// Class weights as the passes over the logits want them, undefined without smoothing.
struct ClassWeights {
  Tensor padded;  // [V, and a tile of zeros at most]
  Tensor sum;     // undefined = V

  ClassWeights(const OptionalTensor& given, int64_t vocab, const at::TensorOptions& fp32,
               const LinearCrossEntropyOptions& o) {
    if (o.label_smoothing() == 0) return;
    const auto weights = given ? given->to(at::kFloat) : at::ones({vocab}, fp32);
    padded = at::constant_pad_nd(weights, {0, cce::kTileColumns - vocab % cce::kTileColumns});
    if (given) sum = padded.sum();
  }
  const float* from(int64_t entry) const {
    return padded.defined() ? padded.const_data_ptr<float>() + entry : nullptr;
  }
};

// The gradients of the classifier and its bias from slabs of dloss/dlogits, whose rows, in fp16,
// are yet to be multiplied by `scale`. fp16 has no room for that: the scales' share of the largest
// goes into x, and the largest into the fp32 product.
class WeightGradient {
 public:
  WeightGradient(const Tensor& x, const Tensor& scale, int64_t dim, bool adds)
      : x_(x), dim_(dim), adds_(adds) {
    if (!scale.defined()) return;
    most_ = scale.amax();
    share_ = (scale / most_.masked_fill(most_ == 0, 1)).to(x.scalar_type()).unsqueeze(1);
    x_ = x * share_;
  }

  // out [S, D] = d^T x, or + it.
  void put(Tensor out, const Tensor& d) const {
    if (x_.size(1) == dim_ && !most_.defined()) return multiply(out, d.t(), x_, adds_);
    auto product = at::mm(d.t(), x_, at::kFloat);
    if (most_.defined()) product.mul_(most_);
    product = product.narrow(1, 0, dim_);
    adds_ ? out.add_(product) : out.copy_(product);
  }
  // [S] fp32: d's rows together.
  Tensor sum(const Tensor& d) const {
    if (!most_.defined()) return d.sum(0, false, at::kFloat);
    return at::mm(share_.t(), d, at::kFloat).squeeze(0).mul_(most_);
  }

 private:
  Tensor x_, share_, most_;  // the last two undefined for bf16
  int64_t dim_;
  bool adds_;
};

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
                    const LinearCrossEntropyOptions& o) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  if (auto refusal = refusal_of(hidden); !refusal.empty()) return refusal;
  if (hidden.numel() == 0) return "an empty hidden";
  if (hidden.numel() / hidden.size(-1) > most || weight.size(0) > most) return "2^31 rows";
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
                                                 const OptionalTensor& class_weight,
                                                 const reference::Tokens& tokens,
                                                 const LinearCrossEntropyOptions& o) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto rows = hidden.size(0), vocab = weight.size(0);
  const auto x = operand(hidden, hidden.scalar_type());
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const ClassWeights classes(class_weight, vocab, fp32, o);
  const auto loss = row_loss(tokens, vocab, classes.sum, o);
  const auto out = empty_outputs(rows, fp32, o);
  auto target_logit = at::empty({rows}, fp32);
  auto* logit = target_logit.data_ptr<float>();
  // T: Partial or Moments. add(logits, first entry, slots, sums)
  const auto run = [&]<class T>(const T*, const auto& start, const auto& add) {
    constexpr int64_t width = sizeof(T) / sizeof(float);
    auto sums = at::empty({rows, width}, fp32);
    auto* sum = static_cast<T*>(sums.data_ptr());
    C10_CUDA_CHECK(start(sum));
    Slabs(weight, bias, x.scalar_type(), vocab)
        .each([&](int64_t from, const Tensor& slab, const float* slab_bias) {
          const auto in_slab = from == 0 ? tokens.place : tokens.place - from;
          const auto logits = logits_of(x, slab, slab_bias, in_slab, o);
          auto slots = at::empty({logits.schedule.partials(), width}, fp32);
          C10_CUDA_CHECK(add(logits, from, static_cast<T*>(slots.data_ptr()), sum));
        });
    C10_CUDA_CHECK(cce::finish_rows(rows, loss, sum, logit, row_outputs(out, 0), stream));
  };
  const bool plain = !o.return_correct() && !o.return_entropy() && o.label_smoothing() == 0;
  if (plain && x.scalar_type() == at::kBFloat16) {
    run(
        static_cast<cce::Partial*>(nullptr),
        [&](auto* sums) { return cce::start_rows(rows, sums, nullptr, logit, stream); },
        [&](const auto& logits, int64_t, auto* slots, auto* sums) {
          return cce::add_exponentials(logits, slots, sums, logit, stream);
        });
  } else {
    run(
        static_cast<cce::Moments*>(nullptr),
        [&](auto* sums) { return cce::start_rows(rows, sums, logit, stream); },
        [&](const auto& logits, int64_t from, auto* slots, auto* sums) {
          return cce::add_moments(logits, classes.from(from), slots, sums, logit, stream);
        });
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_rows_backward(
    const Upstream& upstream, const Tensor& hidden, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& class_weight, const reference::Tokens& tokens,
    const Results& results, const LinearCrossEntropyOptions& o, std::array<bool, 3> wanted,
    at::ScalarType hidden_type) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto rows = hidden.size(0), dim = hidden.size(1), vocab = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const bool half = hidden.scalar_type() == at::kHalf;
  const ClassWeights classes(class_weight, vocab, fp32, o);
  auto factors = at::empty({rows, 4}, fp32), at_target = at::empty({rows}, fp32);
  const auto scale = half ? at::empty({rows}, fp32) : Tensor();
  auto* factor = static_cast<cce::RowFactors*>(factors.data_ptr());
  C10_CUDA_CHECK(cce::upstream_rows(
      rows, row_loss(tokens, vocab, classes.sum, o), row_upstream(upstream),
      {.lse = floats_of(results.lse),
       .nll = floats_of(results.nll),
       .entropy = floats_of(results.entropy)},
      factor, at_target.data_ptr<float>(), half ? scale.data_ptr<float>() : nullptr, stream));
  const auto x = counted_rows(hidden, tokens);
  const WeightGradient weight_gradient(x, scale, dim, o.main_grad().defined());
  const Slabs slabs(weight, bias, x.scalar_type(), slab_entries(rows, vocab, x.size(1), o));
  auto dlogits = at::empty({rows, aligned(slabs.entries())}, x.options());
  auto rounding = at::zeros({rows}, fp32);
  const auto grad_x = wanted[0] ? at::empty(x.sizes(), fp32) : Tensor();
  const auto none = at::empty({0}, weight.options());
  const bool adds = o.main_grad().defined();
  const auto grad_weight = !wanted[1] ? none : adds ? o.main_grad() : at::empty_like(weight);
  Tensor grad_bias = at::empty({wanted[2] ? vocab : 0}, weight.options());
  slabs.each([&](int64_t from, const Tensor& slab, const float* slab_bias) {
    const auto entries = slab.size(0);
    const auto in_slab = from == 0 ? tokens.place : tokens.place - from;
    const auto logits = logits_of(x, slab, slab_bias, in_slab, o);
    auto partials = at::empty({logits.schedule.partials()}, fp32);
    C10_CUDA_CHECK(cce::logit_gradient(
        logits,
        {.rows = factor,
         .at_target = at_target.const_data_ptr<float>(),
         .general = half || classes.padded.defined() || upstream.entropy.defined(),
         .class_weight = classes.from(from),
         .out = dlogits.data_ptr(),
         .out_stride = dlogits.stride(0)},
        partials.data_ptr<float>(), rounding.data_ptr<float>(), stream));
    const auto d = dlogits.narrow(1, 0, entries);
    if (wanted[0]) multiply(grad_x, d, slab, from > 0);
    if (wanted[1]) weight_gradient.put(grad_weight.narrow(0, from, entries), d);
    if (wanted[2]) grad_bias.narrow(0, from, entries).copy_(weight_gradient.sum(d));
  });
  const auto grad_hidden = at::empty(wanted[0] ? hidden.sizes() : at::IntArrayRef{0},
                                     hidden.options().dtype(hidden_type));
  // What rounding took from or gave to a row's sum goes to its target: exact where the classifier's
  // rows are alike, and their errors would add up.
  if (wanted[0]) finish_hidden(grad_hidden, grad_x, scale, rounding.neg_(), weight, tokens.place);
  return {grad_hidden, adds ? none : grad_weight, grad_bias};
}

}  // namespace ounce::fused
