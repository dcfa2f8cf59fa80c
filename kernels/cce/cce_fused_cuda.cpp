// SPDX-License-Identifier: MIT
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <ounce/kernels/cce/cce_fused.h>
#include <ounce/kernels/cce/cce_rows.h>
#include <ounce/kernels/common/implementation.h>

#include <limits>

namespace ounce::fused {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kAlignment = 8;                  // elements, of what the copy engine reads
constexpr int64_t kSlabBytes = int64_t{64} << 20;  // of a weight that has to be copied
constexpr int64_t kWorkspaceBytes = int64_t{128} << 20;
constexpr int64_t kExponentialBytes = int64_t{5} << 29;  // at most a 16th of the GPU's memory
constexpr int64_t kSampled = 64;  // every so many rows of the classifier give the anchors

int64_t aligned(int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

bool is_aligned(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) % kAlignment == 0 && t.stride(0) >= t.size(1) &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

int clusters() {
  static const auto counts = [] {
    std::vector<int> all(c10::cuda::device_count());
    for (size_t i = 0; i < all.size(); ++i) {
      const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(i));
      all[i] = cce::clusters_of_device();
    }
    return all;
  }();
  return counts[c10::cuda::current_device()];
}

// x [rows, D] as a bf16 matrix that the copy engine reads: itself, or a copy with zeros behind D.
Tensor operand(const Tensor& x) {
  const auto dim = x.size(1), padding = aligned(dim) - dim;
  if (padding > 0) return at::constant_pad_nd(x.to(at::kBFloat16), {0, padding});
  if (x.scalar_type() == at::kBFloat16 && is_aligned(x)) return x;
  return x.to(at::kBFloat16).clone(at::MemoryFormat::Contiguous);
}

// The classifier, all of it or in slabs of copies.
class Slabs {
 public:
  Slabs(const Tensor& weight, const OptionalTensor& bias, int64_t entries)
      : weight_(weight), entries_(entries) {
    if (bias) bias_ = bias->to(at::kFloat).contiguous();
    const bool copies = weight.scalar_type() != at::kBFloat16 || !is_aligned(weight) ||
                        aligned(weight.size(1)) != weight.size(1);
    const int64_t most = kSlabBytes / (2 * std::max<int64_t>(1, aligned(weight.size(1))));
    constexpr int64_t tile = cce::kTileColumns;
    if (copies) entries_ = std::min(entries_, std::max(tile, most / tile * tile));
  }

  // f(first entry, slab [S, D'], its bias or null)
  template <class F>
  void each(const F& f) const {
    for (int64_t from = 0; from < weight_.size(0); from += entries_) {
      const auto slab =
          operand(weight_.narrow(0, from, std::min(entries_, weight_.size(0) - from)));
      f(from, slab, bias_.defined() ? bias_.const_data_ptr<float>() + from : nullptr);
    }
  }
  int64_t entries() const { return std::min(entries_, weight_.size(0)); }

 private:
  const Tensor weight_;
  Tensor bias_;
  int64_t entries_;
};

int64_t cache_bytes() { return at::cuda::getCurrentDeviceProperties()->l2CacheSize; }

cce::Schedule schedule(int64_t rows, int64_t vocab, int64_t dim) {
  return cce::schedule(rows, vocab, dim, clusters(), cache_bytes());
}

// `target` [N] int32 counts from the slab's first entry.
cce::Logits logits_of(const Tensor& x, const Tensor& slab, const float* bias, const Tensor& target,
                      const LinearCrossEntropyOptions& o) {
  return {.hidden = x.const_data_ptr(),
          .weight = slab.const_data_ptr(),
          .rows = x.size(0),
          .vocab = slab.size(0),
          .dim = x.size(1),
          .hidden_stride = x.stride(0),
          .weight_stride = slab.stride(0),
          .bias = bias,
          .scale = static_cast<float>(o.logit_scale()),
          .softcap = static_cast<float>(o.softcap()),
          .target = target.const_data_ptr<int>(),
          .schedule = schedule(x.size(0), slab.size(0), x.size(1))};
}

// -1 where a row has no target.
Tensor targets_of(const reference::Tokens& tokens) {
  return tokens.target.to(at::kInt)
      .masked_fill_(tokens.counted.logical_not(), -1)
      .masked_fill_(tokens.outside, -1);
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

// The smoothed target's share of every entry, and the two sides of dloss/dlogits.
struct Upstream {
  Tensor flat, factor, at_target;  // [N]

  Upstream(const Tensor& grad_rows, const Tensor& grad_lse, const reference::Tokens& tokens,
           const Tensor& lse, const Tensor& nll, int64_t vocab,
           const LinearCrossEntropyOptions& o) {
    const auto ignored = tokens.counted.logical_not();
    const auto rows = (grad_rows.to(at::kFloat) * tokens.weight * o.logit_scale());
    const auto lses = grad_lse.to(at::kFloat) * o.logit_scale();
    const auto sharp = rows * tokens.hit_weight * (1 - o.label_smoothing());
    flat = rows * (o.label_smoothing() / static_cast<double>(vocab));
    const auto spread = rows * (lse * (2 * o.z_loss()) + o.label_smoothing()) + lses;
    factor = (sharp + spread).masked_fill(ignored, 0);
    // spread p - sharp (1 - p) without cancellation
    at_target = spread * nll.neg().exp() + sharp * nll.neg().expm1();
    if (o.softcap() > 0) at_target *= 1 - ((lse - nll) / o.softcap()).square();
    at_target.masked_fill_(ignored, 0);
    flat.masked_fill_(ignored, 0);
    factor = factor.contiguous();
    at_target = at_target.contiguous();
  }
};

// Entries a slab, so that its dloss/dlogits fit the workspace: of the counts near the largest, the
// one whose tiles fill the GPU best.
int64_t slab_entries(int64_t rows, int64_t vocab, int64_t dim, const LinearCrossEntropyOptions& o) {
  const auto workspace = o.workspace_bytes() >= 0 ? o.workspace_bytes() : kWorkspaceBytes;
  const auto most = std::max<int64_t>(1, workspace / (2 * rows) / cce::kTileColumns);
  return cce::best_slab(rows, vocab, dim, static_cast<int>(most), clusters(), cache_bytes());
}

// What forward returns, from each row's lse and nll. `smoothed`: lse - the mean logit, or
// undefined.
reference::ForwardRows outputs_of(const Tensor& lse, const Tensor& nll, const Tensor& smoothed,
                                  const reference::Tokens& tokens,
                                  const LinearCrossEntropyOptions& o) {
  reference::ForwardRows out;
  auto loss = nll * tokens.hit_weight * (1 - o.label_smoothing());
  if (smoothed.defined()) loss += smoothed * o.label_smoothing();
  const auto squared = lse.square() * o.z_loss();
  const auto ignored = tokens.counted.logical_not();
  out.loss = ((loss + squared) * tokens.weight).masked_fill(ignored, 0);
  out.z_loss = (squared * tokens.weight).masked_fill(ignored, 0);
  out.lse = lse.masked_fill(ignored, 0);
  out.nll = nll.masked_fill(ignored, 0);
  out.correct = at::empty({0}, lse.options().dtype(at::kBool));
  out.dropped_mass = at::empty({0}, lse.options());
  return out;
}

// out [N, D] bf16 or fp32 = scale (sum + entry C_y); scale may be undefined. sum [N, >= D] fp32,
// which may be out.
void finish_hidden(Tensor out, const Tensor& sum, const Tensor& scale, const Tensor& entry,
                   const Tensor& weight, const Tensor& target) {
  const auto rows = sum.size(0), dim = weight.size(1);
  const auto c = weight.stride(1) == 1 ? weight : weight.contiguous();
  C10_CUDA_CHECK(
      cce::finish_hidden(rows, dim,
                         {.sum = sum.const_data_ptr<float>(),
                          .sum_stride = sum.stride(0),
                          .scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                          .entry = entry.const_data_ptr<float>(),
                          .weight = c.const_data_ptr(),
                          .weight_is_fp32 = c.scalar_type() == at::kFloat,
                          .weight_stride = c.stride(0),
                          .target = target.const_data_ptr<int>(),
                          .out = out.data_ptr(),
                          .out_is_fp32 = out.scalar_type() == at::kFloat},
                         c10::cuda::getCurrentCUDAStream()));
}

// --- forward with its gradients -----------------------------------------------------------------

// Tokens a chunk, whose exponentials fit the workspace; 0 = not even one pair of tiles does.
int64_t chunk_rows(int64_t rows, int64_t vocab, const LinearCrossEntropyOptions& o) {
  auto bytes = o.workspace_bytes();
  if (bytes < 0) {
    const auto memory = at::cuda::getCurrentDeviceProperties()->totalGlobalMem;
    bytes = std::min(kExponentialBytes, static_cast<int64_t>(memory / 16));
  }
  const auto most = bytes / (2 * aligned(vocab));
  if (most >= rows) return rows;
  const auto whole = most / cce::kPairRows * cce::kPairRows;
  if (whole == 0) return 0;
  const auto chunks = (rows + whole - 1) / whole;
  const auto even = (rows + chunks - 1) / chunks;
  return (even + cce::kPairRows - 1) / cce::kPairRows * cce::kPairRows;
}

reference::Tokens narrow(const reference::Tokens& t, int64_t from, int64_t count) {
  const auto part = [&](const Tensor& x) { return x.narrow(0, from, count); };
  return {part(t.target), part(t.counted),    part(t.outside),
          part(t.weight), part(t.hit_weight), t.denominator};
}

// The exponentials e of a chunk of tokens, relative to an anchor a row, and what they give.
class Chunk {
 public:
  // e: scratch [>= rows, stride] bf16
  Chunk(const Tensor& hidden, const Slabs& slabs, const Tensor& sampled,
        const reference::Tokens& tokens, const Tensor& e, const LinearCrossEntropyOptions& o)
      : slabs_(slabs),
        tokens_(tokens),
        e_(e.narrow(0, 0, hidden.size(0))),
        options_(o),
        target_(targets_of(tokens)),
        x_(operand(hidden).masked_fill(tokens.counted.logical_not().unsqueeze(1), 0)) {
    const auto rows = x_.size(0);
    const auto fp32 = x_.options().dtype(at::kFloat);
    target_logit_ = at::full({rows}, -kInfinity, fp32);
    sums_ = at::zeros({rows, 3}, fp32);
    sums_.select(1, 0).fill_(-kInfinity);
    find_anchor(sampled);
    add_exponentials(nullptr);
    auto again = at::empty({(rows + cce::kPairRows - 1) / cce::kPairRows}, target_.options());
    C10_CUDA_CHECK(cce::find_overflow(rows, anchor_.data_ptr<float>(), sums(),
                                      target_logit_.const_data_ptr<float>(), again.data_ptr<int>(),
                                      stream_));
    add_exponentials(again.const_data_ptr<int>());
    lse = at::empty({rows}, fp32);
    nll = at::empty({rows}, fp32);
    C10_CUDA_CHECK(cce::finish_rows(rows, anchor_.const_data_ptr<float>(), sums(),
                                    target_logit_.const_data_ptr<float>(), lse.data_ptr<float>(),
                                    nll.data_ptr<float>(), stream_));
  }

  // The upstream of each row's loss -> e with its target's entry, and the scale of each row.
  void scale(const Tensor& grad_rows, int64_t vocab) {
    const auto rows = x_.size(0);
    const auto none = at::zeros({}, lse.options());
    const Upstream up(grad_rows, none, tokens_, lse, nll, vocab, options_);
    scaled_ = at::empty_like(x_);
    scale_ = at::empty_like(lse);
    entry_ = at::empty_like(lse);
    C10_CUDA_CHECK(cce::scale_rows({.hidden = x_.const_data_ptr(),
                                    .rows = rows,
                                    .dim = x_.size(1),
                                    .hidden_stride = x_.stride(0),
                                    .target = target_.const_data_ptr<int>()},
                                   {.factor = up.factor.const_data_ptr<float>(),
                                    .at_target = up.at_target.const_data_ptr<float>(),
                                    .anchor = anchor_.const_data_ptr<float>(),
                                    .sums = sums(),
                                    .target_logit = target_logit_.const_data_ptr<float>()},
                                   exponentials(0, nullptr), scaled_.data_ptr(),
                                   scale_.data_ptr<float>(), entry_.data_ptr<float>(), stream_));
  }

  // Before scale(), while e is 0 at the targets: product [rows, D] fp32 = e C.
  void multiply_classifier(Tensor product) const {
    slabs_.each([&](int64_t from, const Tensor& slab, const float*) {
      const auto e = e_.narrow(1, from, slab.size(0));
      if (from == 0) {
        at::mm_out(product, e, slab, at::kFloat);
      } else {
        at::addmm_out(product, product, e, slab, at::kFloat);
      }
    });
  }
  // That product -> the hidden state's gradient.
  void finish_hidden(const Tensor& product, const Tensor& weight) const {
    fused::finish_hidden(product, product, scale_, entry_, weight, target_);
  }
  // sum [V, D] bf16 or fp32, overwritten by the first chunk.
  void add_weight_gradient(Tensor& sum, bool first) const {
    const auto e = e_.narrow(1, 0, sum.size(0)).t();
    if (sum.scalar_type() == at::kFloat) {
      if (first) {
        at::mm_out(sum, e, scaled_, at::kFloat);
      } else {
        at::addmm_out(sum, sum, e, scaled_, at::kFloat);
      }
    } else if (first) {
      at::mm_out(sum, e, scaled_);
    } else {
      at::addmm_out(sum, sum, e, scaled_);
    }
  }

  Tensor lse, nll;  // [rows]

 private:
  cce::AnchoredSum* sums() const { return static_cast<cce::AnchoredSum*>(sums_.data_ptr()); }
  cce::Exponentials exponentials(int64_t from, const int* only) const {
    return {.anchor = anchor_.const_data_ptr<float>(),
            .out = static_cast<char*>(e_.data_ptr()) + from * e_.element_size(),
            .out_stride = e_.stride(0),
            .only = only};
  }
  // A logit that is not far below the largest.
  void find_anchor(const Tensor& sampled) {
    const auto rows = x_.size(0);
    auto best = at::zeros({rows, 2}, lse_options());
    best.select(1, 0).fill_(-kInfinity);
    const auto nowhere = at::full_like(target_, -1);
    const auto logits = logits_of(x_, sampled, nullptr, nowhere, options_);
    auto slots = at::empty({logits.schedule.partials(), 2}, lse_options());
    C10_CUDA_CHECK(cce::add_exponentials(logits, static_cast<cce::Partial*>(slots.data_ptr()),
                                         static_cast<cce::Partial*>(best.data_ptr()),
                                         target_logit_.data_ptr<float>(), stream_));
    anchor_ = best.select(1, 0).masked_fill(tokens_.counted.logical_not(), kInfinity).contiguous();
  }
  void add_exponentials(const int* only) {
    slabs_.each([&](int64_t from, const Tensor& slab, const float*) {
      const auto in_slab = from == 0 ? target_ : target_ - from;
      const auto logits = logits_of(x_, slab, nullptr, in_slab, options_);
      auto slots = at::empty({logits.schedule.partials(), 3}, lse_options());
      C10_CUDA_CHECK(cce::exponentials(logits, exponentials(from, only),
                                       static_cast<cce::AnchoredSum*>(slots.data_ptr()), sums(),
                                       target_logit_.data_ptr<float>(), stream_));
    });
  }
  at::TensorOptions lse_options() const { return x_.options().dtype(at::kFloat); }

  const Slabs& slabs_;
  const reference::Tokens tokens_;
  const Tensor e_;
  const LinearCrossEntropyOptions& options_;
  const Tensor target_, x_;
  Tensor anchor_, sums_, target_logit_;  // [rows], [rows, 3], [rows]
  Tensor scaled_, scale_, entry_;        // [rows, D] bf16, [rows], [rows]
  const c10::cuda::CUDAStream stream_ = c10::cuda::getCurrentCUDAStream();
};

}  // namespace

bool keeps_exponentials(const Tensor& hidden, const Tensor& weight, bool has_bias,
                        const LinearCrossEntropyOptions& o) {
  if (!hidden.is_cuda() || hidden.scalar_type() != at::kBFloat16) return false;
  const c10::cuda::CUDAGuard guard(hidden.device());
  if (clusters() == 0 || has_bias || o.label_smoothing() > 0 || o.return_correct() ||
      o.grad_mode() != GradMode::kExact) {
    return false;
  }
  // A trace may know the tensors by symbols.
  const auto vocab = weight.sym_size(0).guard_int(__FILE__, __LINE__);
  const auto dim = weight.sym_size(1).guard_int(__FILE__, __LINE__);
  return dim % kAlignment == 0 && chunk_rows(cce::kPairRows, vocab, o) > 0;
}

std::tuple<reference::ForwardRows, Tensor, Tensor> linear_cross_entropy_rows_with_gradients(
    const Tensor& grad_rows, const Tensor& hidden, const Tensor& weight,
    const reference::Tokens& tokens, const LinearCrossEntropyOptions& o,
    std::array<bool, 2> wanted) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto rows = hidden.size(0), vocab = weight.size(0), step = chunk_rows(rows, vocab, o);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  auto lse = at::empty({rows}, fp32), nll = at::empty({rows}, fp32);
  const auto grad_hidden = at::empty(wanted[0] ? hidden.sizes() : at::IntArrayRef{0}, fp32);
  // Rounding a sum of two chunks once more is within the error of a rounded gradient; of many,
  // it would add up.
  const bool sums_fp32 = weight.scalar_type() == at::kFloat || rows > 2 * step;
  Tensor grad_weight = at::empty(wanted[1] ? weight.sizes() : at::IntArrayRef{0},
                                 sums_fp32 ? fp32 : weight.options());
  {
    const Slabs slabs(weight, {}, vocab);
    const auto sampled = operand(weight.slice(0, 0, vocab, kSampled));
    const auto e = at::empty({step, aligned(vocab)}, hidden.options());
    for (int64_t from = 0; from < rows; from += step) {
      const auto count = std::min(step, rows - from);
      Chunk chunk(hidden.narrow(0, from, count), slabs, sampled, narrow(tokens, from, count), e, o);
      lse.narrow(0, from, count).copy_(chunk.lse);
      nll.narrow(0, from, count).copy_(chunk.nll);
      const auto product = wanted[0] ? grad_hidden.narrow(0, from, count) : grad_hidden;
      if (wanted[0]) chunk.multiply_classifier(product);
      chunk.scale(grad_rows, vocab);
      if (wanted[0]) chunk.finish_hidden(product, weight);
      if (wanted[1]) chunk.add_weight_gradient(grad_weight, from == 0);
    }
  }
  return {outputs_of(lse, nll, {}, tokens, o), grad_hidden, grad_weight.to(weight.scalar_type())};
}

void scale_gradient(Tensor& gradient, const Tensor& factor) {
  const c10::cuda::CUDAGuard guard(gradient.device());
  C10_CUDA_CHECK(cce::scale_in_place(gradient.data_ptr(), gradient.scalar_type() == at::kFloat,
                                     gradient.numel(), factor.const_data_ptr<float>(),
                                     c10::cuda::getCurrentCUDAStream()));
}

std::string why_not(const Tensor& hidden, const Tensor& weight, const OptionalTensor& class_weight,
                    const LinearCrossEntropyOptions& o) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  if (!hidden.is_cuda()) return c10::str("tensors on ", hidden.device());
  const c10::cuda::CUDAGuard guard(hidden.device());
  if (clusters() == 0) return "a GPU that is not of the Hopper generation";
  if (hidden.scalar_type() != at::kBFloat16) return c10::str("hidden in ", hidden.scalar_type());
  if (hidden.numel() == 0) return "an empty hidden";
  if (hidden.numel() / hidden.size(-1) > most || weight.size(0) > most) return "2^31 rows";
  if (o.grad_mode() != GradMode::kExact) return "a filter";
  if (o.return_correct()) return "return_correct";
  if (o.label_smoothing() > 0 && o.softcap() > 0) return "label smoothing with a softcap";
  if (o.label_smoothing() > 0 && class_weight) return "label smoothing with class weights";
  return "";
}

reference::ForwardRows linear_cross_entropy_rows(const Tensor& hidden, const Tensor& weight,
                                                 const OptionalTensor& bias,
                                                 const reference::Tokens& tokens,
                                                 const LinearCrossEntropyOptions& o) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto rows = hidden.size(0), vocab = weight.size(0);
  const auto x = operand(hidden);
  const auto target = targets_of(tokens);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  auto sums = at::zeros({rows, 2}, fp32);
  sums.select(1, 0).fill_(-kInfinity);
  auto target_logit = at::full({rows}, -kInfinity, fp32);
  Tensor columns;
  const Slabs slabs(weight, bias, vocab);
  slabs.each([&](int64_t from, const Tensor& slab, const float* slab_bias) {
    const auto in_slab = from == 0 ? target : target - from;
    const auto logits = logits_of(x, slab, slab_bias, in_slab, o);
    auto partials = at::empty({logits.schedule.partials(), 2}, fp32);
    C10_CUDA_CHECK(cce::add_exponentials(logits, static_cast<cce::Partial*>(partials.data_ptr()),
                                         static_cast<cce::Partial*>(sums.data_ptr()),
                                         target_logit.data_ptr<float>(), stream));
    if (o.label_smoothing() == 0) return;
    const auto sum = column_sum(slab);
    columns = columns.defined() ? columns.add_(sum) : sum;
  });
  auto lse = at::empty({rows}, fp32), nll = at::empty({rows}, fp32);
  C10_CUDA_CHECK(cce::finish_rows(rows, static_cast<const cce::Partial*>(sums.data_ptr()),
                                  target_logit.const_data_ptr<float>(), lse.data_ptr<float>(),
                                  nll.data_ptr<float>(), stream));
  Tensor smoothed;
  if (o.label_smoothing() > 0) {
    auto logits = exact_product(columns.unsqueeze(0), x.t()).squeeze(0);
    if (bias) logits += bias->sum(at::kFloat);
    const double v = static_cast<double>(vocab);
    smoothed = lse - logits * (o.logit_scale() / v);
  }
  return outputs_of(lse, nll, smoothed, tokens, o);
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
  const Upstream up(grad_rows, grad_lse, tokens, lse, nll, vocab, o);
  // 0 * NaN of a row that does not count would reach the weight's gradient.
  const auto x = operand(hidden).masked_fill(tokens.counted.logical_not().unsqueeze(1), 0);
  const auto target = targets_of(tokens);
  const bool smooths = o.label_smoothing() > 0;

  const Slabs slabs(weight, bias, slab_entries(rows, vocab, x.size(1), o));
  auto dlogits = at::empty({rows, aligned(slabs.entries())}, x.options());
  auto rounding = at::zeros({rows}, fp32);
  Tensor grad_x;
  Tensor grad_weight = at::empty(wanted[1] ? weight.sizes() : at::IntArrayRef{0}, weight.options());
  Tensor grad_bias = at::empty({wanted[2] ? vocab : 0}, weight.options());
  Tensor row_of_weight;  // what smoothing takes from every row of its gradient
  if (smooths && wanted[1]) {
    row_of_weight = exact_product(up.flat.unsqueeze(0), x).narrow(1, 0, dim);
  }
  slabs.each([&](int64_t from, const Tensor& slab, const float* slab_bias) {
    const auto entries = slab.size(0);
    const auto in_slab = from == 0 ? target : target - from;
    const auto logits = logits_of(x, slab, slab_bias, in_slab, o);
    auto partials = at::empty({logits.schedule.partials()}, fp32);
    C10_CUDA_CHECK(cce::logit_gradient(logits,
                                       {.lse = lse.const_data_ptr<float>(),
                                        .factor = up.factor.const_data_ptr<float>(),
                                        .at_target = up.at_target.const_data_ptr<float>(),
                                        .out = dlogits.data_ptr(),
                                        .out_stride = dlogits.stride(0)},
                                       partials.data_ptr<float>(), rounding.data_ptr<float>(),
                                       stream));
    const auto d = dlogits.narrow(1, 0, entries);
    if (wanted[0]) {
      if (grad_x.defined()) {
        at::addmm_out(grad_x, grad_x, d, slab, at::kFloat);
      } else {
        grad_x = at::mm(d, slab, at::kFloat);
      }
      if (smooths) grad_x.sub_(up.flat.unsqueeze(1) * column_sum(slab));
    }
    if (wanted[1]) {
      auto out = grad_weight.narrow(0, from, entries);
      if (x.size(1) != dim) {
        out.copy_(at::mm(d.t(), x, at::kFloat).narrow(1, 0, dim));
      } else if (weight.scalar_type() == at::kFloat) {
        at::mm_out(out, d.t(), x, at::kFloat);
      } else {
        at::mm_out(out, d.t(), x);
      }
      if (smooths) out.sub_(row_of_weight);
    }
    if (wanted[2]) {
      const auto sum = d.sum(0, false, at::kFloat);
      grad_bias.narrow(0, from, entries).copy_(smooths ? sum - up.flat.sum() : sum);
    }
  });
  const auto grad_hidden = at::empty(wanted[0] ? hidden.sizes() : at::IntArrayRef{0},
                                     hidden.options().dtype(hidden_type));
  // What rounding took from or gave to a row's sum goes to its target: exact where the classifier's
  // rows are alike, and their errors would add up.
  if (wanted[0]) finish_hidden(grad_hidden, grad_x, {}, rounding.neg_(), weight, target);
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace ounce::fused
