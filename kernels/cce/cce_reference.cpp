// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ounce/kernels/cce/cce_reference.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace ounce::reference {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTile = 128;
// Logits closer than this to the largest take their loss from log1p, which keeps the relative
// precision of a loss near 0; further ones take the difference, which cannot overflow.
constexpr double kNearMaximum = -10;

int64_t workspace_bytes(const Tensor& hidden, const LinearCrossEntropyOptions& options) {
  if (options.workspace_bytes() >= 0) return options.workspace_bytes();
  return int64_t{hidden.is_cuda() ? 512 : 128} << 20;
}

// What a converted piece of the weight may take: on a CPU what fits a cache, on a GPU enough that
// its products are not many small ones.
int64_t slab_bytes(const Tensor& hidden, const LinearCrossEntropyOptions& options) {
  if (!hidden.is_cuda()) return int64_t{16} << 20;
  return std::max(int64_t{64} << 20, workspace_bytes(hidden, options) / 4);
}

// Tokens a chunk. Two [rows, V] buffers are alive at a time, with an entropy three; one chunk at
// most where a filter's tiles need whole groups of tokens.
int64_t chunk_rows(const Tensor& hidden, int64_t vocab, at::ScalarType compute,
                   const LinearCrossEntropyOptions& options) {
  const int64_t budget = workspace_bytes(hidden, options);
  const int64_t buffers = options.return_entropy() ? 3 : 2;
  const int64_t row =
      buffers * (vocab + hidden.size(1)) * static_cast<int64_t>(c10::elementSize(compute));
  int64_t rows = std::max<int64_t>(1, budget / row);
  if (options.grad_mode() != GradMode::kExact) rows = std::max(kTile, rows / kTile * kTile);
  return std::min(rows, std::max<int64_t>(1, hidden.size(0)));
}

// The three matrix products. A weight that is not in the dtype they run in is converted a slab of
// the vocabulary at a time.
class Classifier {
 public:
  Classifier(const Tensor& hidden, const Tensor& weight, at::ScalarType compute,
             const LinearCrossEntropyOptions& options)
      : weight_(weight),
        compute_(compute),
        // A GPU multiplies bf16 and accumulates in fp32. A CPU would round the result to bf16, and
        // small gradients underflow in fp16: those are widened.
        operand_(hidden.is_cuda() && hidden.scalar_type() == at::kBFloat16 ? at::kBFloat16
                                                                           : compute),
        slab_(weight.size(0)) {
    if (weight.scalar_type() == operand_) return;
    const int64_t row = 4 * std::max<int64_t>(1, weight.size(1));
    slab_ = std::clamp<int64_t>(slab_bytes(hidden, options) / row, 1, weight.size(0));
  }

  // Rows that do not count become 0, for 0 * NaN would reach the weight's gradient.
  Tensor rows(const Tensor& hidden_rd, const Tensor& counted) const {
    return hidden_rd.to(operand_).masked_fill(counted.logical_not().unsqueeze(1), 0);
  }
  Tensor logits(const Tensor& x_rd) const {
    auto out = at::empty({x_rd.size(0), weight_.size(0)}, x_rd.options().dtype(compute_));
    each_slab([&](int64_t from, const Tensor& slab) {
      auto columns = out.narrow(1, from, slab.size(0));
      if (operand_ == compute_) {
        at::mm_out(columns, x_rd, slab.t());
      } else {
        at::mm_out(columns, x_rd, slab.t(), compute_);
      }
    });
    return out;
  }
  // dlogits weight
  Tensor hidden_gradient(const Tensor& dlogits_rv) const {
    Tensor sum;
    each_slab([&](int64_t from, const Tensor& slab) {
      const auto d = dlogits_rv.narrow(1, from, slab.size(0)).to(operand_);
      const auto part = operand_ == compute_ ? at::mm(d, slab) : at::mm(d, slab, compute_);
      sum = sum.defined() ? sum.add_(part) : part;
    });
    return sum;
  }
  // sum += dlogits^T x
  void add_weight_gradient(Tensor& sum_vd, const Tensor& dlogits_rv, const Tensor& x_rd) const {
    const auto d = dlogits_rv.to(operand_).t();
    if (operand_ == compute_) {
      sum_vd.addmm_(d, x_rd);
    } else {
      at::addmm_out(sum_vd, sum_vd, d, x_rd, compute_);
    }
  }

 private:
  template <class F>
  void each_slab(const F& f) const {
    const int64_t vocab = weight_.size(0);
    for (int64_t from = 0; from < vocab; from += slab_) {
      f(from, weight_.narrow(0, from, std::min(slab_, vocab - from)).to(operand_));
    }
  }

  Tensor weight_;
  at::ScalarType compute_, operand_;
  int64_t slab_;  // vocabulary entries
};

// z of a chunk, before bias, scale and softcap are applied -> after. Overwrites it.
void finish_logits(Tensor& z, const OptionalTensor& bias,
                   const LinearCrossEntropyOptions& options) {
  if (bias) z.add_(*bias);
  if (options.logit_scale() != 1) z.mul_(options.logit_scale());
  if (options.softcap() > 0) z.div_(options.softcap()).tanh_().mul_(options.softcap());
}

// exp(z - max) of a chunk, the target's kept apart from the rest: near a loss of 0 the rest is the
// loss and the target's gradient, and would be lost in 1 - p.
struct Exponentials {
  Tensor rest_rv;          // 0 at the target
  Tensor hit, rest_sum;    // of the target; of the rest
  Tensor hit_logit;        // z_y - max
  Tensor log_total, lse;   // relative to max; absolute
  Tensor weighted_logits;  // sum_j w_j (z_j - max), with label smoothing only

  Tensor total() const { return rest_sum + hit; }
};

// -sum_j p_j log p_j
Tensor entropy(const Exponentials& e) {
  const auto sum = at::xlogy(e.rest_rv, e.rest_rv).sum(1) + e.hit * e.hit_logit;
  return e.log_total - sum / e.total();
}

// Overwrites z.
Exponentials exponentials(Tensor& z, const Tensor& target, const OptionalTensor& class_weight,
                          const LinearCrossEntropyOptions& options) {
  Exponentials e;
  const auto index = target.unsqueeze(1);
  const auto max = z.amax(1, /*keepdim=*/true);
  z.sub_(max);
  e.hit_logit = z.gather(1, index).squeeze(1);
  if (options.label_smoothing() > 0) {
    e.weighted_logits = class_weight ? z.mv(*class_weight) : z.sum(1);
  }
  z.exp_();
  e.hit = z.gather(1, index).squeeze(1);
  z.scatter_(1, index, 0);
  e.rest_sum = z.sum(1);
  e.log_total = e.total().log();
  e.lse = max.squeeze(1) + e.log_total;
  e.rest_rv = z;
  return e;
}

// Sum or maximum of each tile of the vocabulary, [rows, tiles].
Tensor per_tile(const Tensor& rv, bool maximum) {
  const int64_t vocab = rv.size(1), whole = vocab / kTile, rest = vocab % kTile;
  std::vector<Tensor> parts;
  if (whole > 0) {
    const auto tiles = rv.narrow(1, 0, whole * kTile).unflatten(1, {whole, kTile});
    parts.push_back(maximum ? tiles.amax(2) : tiles.sum(2));
  }
  if (rest > 0) {
    const auto tail = rv.narrow(1, whole * kTile, rest);
    parts.push_back(maximum ? tail.amax(1, true) : tail.sum(1, true));
  }
  return at::cat(parts, 1);
}

// One chunk of tokens and the vectors that describe it.
struct Chunk {
  Chunk(const Tokens& tokens, int64_t from, int64_t count)
      : target(tokens.target.narrow(0, from, count)),
        counted(tokens.counted.narrow(0, from, count)),
        outside(tokens.outside.narrow(0, from, count)),
        weight(tokens.weight.narrow(0, from, count)),
        hit_weight(tokens.hit_weight.narrow(0, from, count)) {}

  Tensor target, counted, outside, weight, hit_weight;
};

// Which tiles of a chunk are kept, for every row of it: bool [rows, tiles].
// A target outside the vocabulary makes its gradients NaN: they are all kept.
Tensor kept_tiles(const Exponentials& e, const Chunk& chunk, double eps) {
  const int64_t rows = chunk.target.size(0);
  const auto probability = per_tile(e.rest_rv, /*maximum=*/true) / e.total().unsqueeze(1);
  auto kept = probability.lt(eps).logical_not_();
  kept.scatter_(1, chunk.target.div(kTile, "floor").unsqueeze(1), true);
  kept.logical_or_(chunk.outside.unsqueeze(1)).logical_and_(chunk.counted.unsqueeze(1));
  const int64_t groups = (rows + kTile - 1) / kTile;
  return at::constant_pad_nd(kept, {0, 0, 0, groups * kTile - rows})
      .unflatten(0, {groups, kTile})
      .any(1)
      .repeat_interleave(kTile, 0)
      .narrow(0, 0, rows);
}

void drop_tiles(Tensor& rv, const Tensor& kept) {
  const int64_t vocab = rv.size(1), whole = vocab / kTile, rest = vocab % kTile;
  const auto dropped = kept.logical_not();
  if (whole > 0) {
    auto tiles = rv.narrow(1, 0, whole * kTile).unflatten(1, {whole, kTile});
    tiles.masked_fill_(dropped.narrow(1, 0, whole).unsqueeze(2), 0);
  }
  if (rest > 0) rv.narrow(1, whole * kTile, rest).masked_fill_(dropped.narrow(1, whole, 1), 0);
}

// Constants of the smoothed targets: q_j w_j is `sharp` [j = y] w_y + `flat` w_j.
struct Smoothing {
  Smoothing(const LinearCrossEntropyOptions& options, const OptionalTensor& class_weight,
            const Tensor& weight, at::ScalarType compute)
      : sharp(1 - options.label_smoothing()),
        flat(options.label_smoothing() / static_cast<double>(weight.size(0))) {
    if (class_weight) class_weights = class_weight->to(compute);
    class_sum = class_weights ? class_weights->sum()
                              : at::full({}, static_cast<double>(weight.size(0)),
                                         weight.options().dtype(compute));
  }

  double sharp, flat;
  OptionalTensor class_weights;
  Tensor class_sum;
};

Tensor negative_log_likelihood(const Exponentials& e) {
  const auto near = at::log1p(e.rest_sum / e.hit);
  return at::where(e.hit_logit > kNearMaximum, near, e.log_total - e.hit_logit);
}

Tensor row_loss(const Exponentials& e, const Tensor& nll, const Chunk& chunk,
                const Smoothing& smoothing) {
  auto loss = nll * chunk.hit_weight * smoothing.sharp;
  if (smoothing.flat > 0) {
    loss += (smoothing.class_sum * e.log_total - e.weighted_logits) * smoothing.flat;
  }
  return loss;
}

// Overwrites e.rest_rv with dloss/dz. `rows`, `lse` and, or undefined, `of_entropy` are the
// upstream of each token's loss (its weight included), of its lse and of its entropy.
Tensor logit_gradient(Exponentials& e, const Chunk& chunk, const Smoothing& smoothing,
                      const Tensor& rows, const Tensor& lse, const Tensor& of_entropy,
                      double z_loss) {
  const auto inverse = e.total().reciprocal();
  const auto sharp = rows * chunk.hit_weight * smoothing.sharp;
  const auto flat = rows * smoothing.flat;
  const auto spread = flat * smoothing.class_sum + rows * e.lse * (2 * z_loss) + lse;
  auto at_target = (spread * e.hit - sharp * e.rest_sum) * inverse - flat * chunk.hit_weight;
  const auto factor = (sharp + spread) * inverse;
  auto& d = e.rest_rv;
  if (of_entropy.defined()) {
    // -p_j (log p_j + H), with log p_j = log e_j - log_total
    const auto scale = of_entropy * inverse;
    const auto shift = e.log_total - entropy(e);
    at_target += scale * e.hit * (shift - e.hit_logit);
    const auto logs = at::xlogy(d, d);
    d.mul_((factor + scale * shift).unsqueeze(1)).sub_(logs.mul_(scale.unsqueeze(1)));
  } else {
    d.mul_(factor.unsqueeze(1));
  }
  if (smoothing.flat > 0) {
    if (smoothing.class_weights) {
      d.addcmul_(flat.unsqueeze(1), smoothing.class_weights->unsqueeze(0), -1);
    } else {
      d.sub_(flat.unsqueeze(1));
    }
  }
  return d.scatter_(1, chunk.target.unsqueeze(1), at_target.unsqueeze(1));
}

}  // namespace

double filter_eps(at::ScalarType hidden, const LinearCrossEntropyOptions& options) {
  if (options.filter_eps()) return *options.filter_eps();
  switch (hidden) {
    case at::kBFloat16:
      return std::numeric_limits<c10::BFloat16>::epsilon() / 32.0;
    case at::kHalf:
      return std::numeric_limits<c10::Half>::epsilon() / 32.0;
    case at::kFloat:
      return std::numeric_limits<float>::epsilon() / 32.0;
    default:
      return std::numeric_limits<double>::epsilon() / 32.0;
  }
}

Tokens describe_tokens(const Tensor& target, const Tensor& counted,
                       const OptionalTensor& token_weight, const OptionalTensor& class_weight,
                       int64_t vocab, at::ScalarType compute) {
  Tokens t;
  t.counted = counted;
  t.outside = target.lt(0).logical_or_(target.ge(vocab)).logical_and_(counted);
  t.target = target.masked_fill(counted.logical_not().logical_or_(t.outside), 0);
  t.weight = token_weight ? token_weight->to(compute)
                          : at::ones(target.sizes(), target.options().dtype(compute));
  t.weight = t.weight.masked_fill(counted.logical_not(), 0)
                 .masked_fill_(t.outside, std::numeric_limits<double>::quiet_NaN());
  t.hit_weight =
      class_weight ? class_weight->to(compute).index_select(0, t.target) : at::ones_like(t.weight);
  const auto sum = (t.weight * t.hit_weight).sum();
  t.denominator = sum.masked_fill(sum.eq(0), 1);
  return t;
}

ForwardRows linear_cross_entropy_rows(const Tensor& hidden, const Tensor& weight,
                                      const OptionalTensor& bias,
                                      const OptionalTensor& class_weight, const Tokens& tokens,
                                      const LinearCrossEntropyOptions& options) {
  const auto compute = tokens.weight.scalar_type();
  const int64_t count = hidden.size(0);
  const bool filters = options.grad_mode() != GradMode::kExact;
  const Classifier classifier(hidden, weight, compute, options);
  const Smoothing smoothing(options, class_weight, weight, compute);
  ForwardRows out;
  out.loss = at::empty({count}, tokens.weight.options());
  out.lse = at::empty_like(out.loss);
  out.z_loss = at::empty_like(out.loss);
  out.nll = at::empty_like(out.loss);
  out.correct =
      at::empty({options.return_correct() ? count : 0}, out.loss.options().dtype(at::kBool));
  out.entropy = at::empty({options.return_entropy() ? count : 0}, out.loss.options());
  out.dropped_mass = at::empty({filters ? count : 0}, out.loss.options());

  const int64_t step = chunk_rows(hidden, weight.size(0), compute, options);
  for (int64_t from = 0; from < count; from += step) {
    const int64_t rows = std::min(step, count - from);
    const Chunk chunk(tokens, from, rows);
    const auto put = [&](Tensor& to, const Tensor& values) {
      to.narrow(0, from, rows).copy_(values.masked_fill(chunk.counted.logical_not(), 0));
    };
    auto z = classifier.logits(classifier.rows(hidden.narrow(0, from, rows), chunk.counted));
    finish_logits(z, bias, options);
    if (options.return_correct()) {
      const auto hit = z.argmax(1).eq(chunk.target);
      put(out.correct, hit.masked_fill(chunk.outside, 0));
    }
    const auto e = exponentials(z, chunk.target, smoothing.class_weights, options);
    const auto squared = e.lse.square() * options.z_loss();
    const auto nll = negative_log_likelihood(e);
    put(out.nll, nll);
    put(out.loss, (row_loss(e, nll, chunk, smoothing) + squared) * chunk.weight);
    put(out.z_loss, squared * chunk.weight);
    put(out.lse, e.lse);
    if (options.return_entropy()) put(out.entropy, entropy(e));
    if (filters) {
      const auto kept = kept_tiles(e, chunk, filter_eps(hidden.scalar_type(), options));
      const auto mass = per_tile(e.rest_rv, /*maximum=*/false).masked_fill(kept, 0).sum(1);
      put(out.dropped_mass, mass / e.total());
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_rows_backward(
    const Tensor& grad_rows, const Tensor& grad_lse, const Tensor& grad_entropy,
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& class_weight, const Tokens& tokens,
    const LinearCrossEntropyOptions& options, std::array<bool, 3> wanted,
    at::ScalarType hidden_type) {
  const auto compute = tokens.weight.scalar_type();
  const int64_t count = hidden.size(0), vocab = weight.size(0);
  const Classifier classifier(hidden, weight, compute, options);
  const Smoothing smoothing(options, class_weight, weight, compute);
  const auto sums = weight.options().dtype(compute);
  auto grad_hidden = at::empty(wanted[0] ? hidden.sizes() : at::IntArrayRef{0},
                               hidden.options().dtype(hidden_type));
  const bool adds = options.main_grad().defined();
  Tensor grad_weight = !wanted[1] ? at::empty({0}, sums)
                       : adds     ? options.main_grad()
                                  : at::zeros(weight.sizes(), sums);
  Tensor grad_bias = wanted[2] ? at::zeros({vocab}, sums) : at::empty({0}, sums);
  const auto ignored = tokens.counted.logical_not();
  // The derivative of u enters where everything is linear: in the upstream.
  const auto rows_upstream =
      (grad_rows.to(compute) * tokens.weight * options.logit_scale()).masked_fill(ignored, 0);
  const auto lse_upstream = (grad_lse.to(compute) * options.logit_scale()).masked_fill(ignored, 0);

  const auto entropy_upstream =
      grad_entropy.defined()
          ? (grad_entropy.to(compute) * options.logit_scale()).masked_fill(ignored, 0)
          : Tensor();

  const int64_t step = chunk_rows(hidden, vocab, compute, options);
  for (int64_t from = 0; from < count; from += step) {
    const int64_t rows = std::min(step, count - from);
    const Chunk chunk(tokens, from, rows);
    const auto x = classifier.rows(hidden.narrow(0, from, rows), chunk.counted);
    auto z = classifier.logits(x);
    finish_logits(z, bias, options);
    Tensor slope;
    if (options.softcap() > 0) slope = z.div(options.softcap()).square_().neg_().add_(1);
    auto e = exponentials(z, chunk.target, smoothing.class_weights, options);
    Tensor kept;
    if (options.grad_mode() != GradMode::kExact) {
      kept = kept_tiles(e, chunk, filter_eps(hidden.scalar_type(), options));
    }
    auto d =
        logit_gradient(e, chunk, smoothing, rows_upstream.narrow(0, from, rows),
                       lse_upstream.narrow(0, from, rows),
                       grad_entropy.defined() ? entropy_upstream.narrow(0, from, rows) : Tensor(),
                       options.z_loss());
    if (slope.defined()) d.mul_(slope);
    slope.reset();
    if (options.grad_mode() == GradMode::kFilter) drop_tiles(d, kept);
    if (wanted[1]) classifier.add_weight_gradient(grad_weight, d, x);
    if (wanted[2]) grad_bias.add_(d.sum(0));
    if (options.grad_mode() == GradMode::kFilterHidden) drop_tiles(d, kept);
    if (wanted[0]) grad_hidden.narrow(0, from, rows).copy_(classifier.hidden_gradient(d));
  }
  if (adds) grad_weight = at::empty({0}, sums);
  return {grad_hidden, grad_weight.to(weight.scalar_type()), grad_bias.to(weight.scalar_type())};
}

}  // namespace ounce::reference
