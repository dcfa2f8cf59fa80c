// SPDX-License-Identifier: MIT
// Forward with its gradients: three products, with the exponentials of a chunk of tokens in memory.
// A filter takes two of them over the tiles that it keeps.
#include <ounce/kernels/cce/cce_filter.h>
#include <ounce/kernels/cce/cce_fused_parts.h>

#include <utility>

namespace ounce::fused {

namespace {

constexpr int64_t kExponentialBytes = int64_t{5} << 29;  // at most a 16th of the GPU's memory
constexpr int64_t kHalvedBytes = int64_t{7} << 28;  // from here on two chunks cost 1 %
constexpr int64_t kSampled = 128;  // every so many rows of the classifier give the anchors
constexpr int64_t kWhole = 64;     // entries of the vocabulary

// Elements from row to row of exponentials: rows of whole cache lines.
int64_t row_stride(int64_t vocab) { return (vocab + kWhole - 1) / kWhole * kWhole; }

// Tokens a chunk, whose exponentials fit the workspace; 0 = not even one pair of tiles does.
int64_t chunk_rows(int64_t rows, int64_t vocab, const LinearCrossEntropyOptions& o) {
  auto bytes = o.workspace_bytes();
  if (bytes < 0) {
    const auto memory = at::cuda::getCurrentDeviceProperties()->totalGlobalMem;
    bytes = std::min(kExponentialBytes, static_cast<int64_t>(memory / 16));
    const auto half = (rows / 2 + cce::kPairRows) * 2 * row_stride(vocab);
    if (2 * rows * vocab > kHalvedBytes) bytes = std::min(bytes, half);
  }
  const auto most = bytes / (2 * row_stride(vocab));
  if (most >= rows) return rows;
  const auto whole = most / cce::kPairRows * cce::kPairRows;
  if (whole == 0) return 0;
  const auto chunks = (rows + whole - 1) / whole;
  const auto even = (rows + chunks - 1) / chunks;
  return (even + cce::kPairRows - 1) / cce::kPairRows * cce::kPairRows;
}

reference::Tokens narrow(const reference::Tokens& t, int64_t from, int64_t count) {
  const auto part = [&](const Tensor& x) { return x.narrow(0, from, count); };
  return {.counted = part(t.counted),
          .weight = part(t.weight),
          .hit_weight = part(t.hit_weight),
          .denominator = t.denominator,
          .place = part(t.place)};
}

// Which tiles of a chunk's exponentials are kept.
class Filter {
 public:
  Filter(int64_t rows, int64_t vocab, const at::TensorOptions& ints)
      : rows_(rows),
        vocab_(vocab),
        boxes_(at::empty({(vocab + cce::kTileColumns - 1) / cce::kTileColumns * cce::kTileColumns /
                              cce::kBoxColumns,
                          rows},
                         ints)),
        kept_(at::empty({cce::filter_tiles(rows), cce::filter_tiles(vocab)},
                        ints.dtype(at::kBool))) {}

  // Of a slab's entries from `first` on.
  cce::BoxMass* boxes(int64_t first) const {
    return static_cast<cce::BoxMass*>(boxes_.data_ptr()) + first / cce::kBoxColumns * rows_;
  }
  // dropped_mass [rows]
  void find_kept(const Tensor& anchor, const float* lse, const reference::Tokens& tokens,
                 double eps, const Tensor& dropped_mass) {
    auto parts = at::empty({(kept_.size(1) + cce::kStripTiles - 1) / cce::kStripTiles, rows_},
                           anchor.options());
    C10_CUDA_CHECK(cce::find_kept(rows_, vocab_,
                                  {.boxes = boxes(0),
                                   .anchor = anchor.const_data_ptr<float>(),
                                   .lse = lse,
                                   .counted = tokens.counted.const_data_ptr<bool>(),
                                   .target = tokens.place.const_data_ptr<int>()},
                                  static_cast<float>(eps), kept_.data_ptr<bool>(),
                                  parts.data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
    auto out = dropped_mass;
    at::sum_out(out, parts, 0);
  }

  // product [rows, D] fp32 = e slab, or + it: e [rows, S] and slab [S, D], from entry `first` on.
  void multiply_classifier(const Tensor& product, const Tensor& e, const Tensor& slab,
                           int64_t first) const {
    const auto kept = kept_.narrow(1, first / cce::kFilterTile, cce::filter_tiles(slab.size(0)));
    const auto parts = cce::parts_of(rows_, product.size(1), clusters());
    if (parts == 1) return multiply(product, e, false, slab, kept, first > 0);
    auto out = at::empty({parts, rows_, product.size(1)}, product.options());
    multiply(out, e, false, slab, kept, false);
    auto sum = product;
    if (first == 0) {
      at::sum_out(sum, out, 0);
    } else {
      sum.add_(out.sum(0));
    }
  }
  // sum [V, D] = e^T x, or + it: e [rows, V], x [rows, D]
  void add_weight_gradient(const Tensor& sum, const Tensor& e, const Tensor& x, bool first) const {
    multiply(sum, e, true, x, kept_.t(), !first);
  }

 private:
  // out [parts, m, n] or [m, n]; kept [tiles of m, tiles of the inner dimension]
  void multiply(const Tensor& out, const Tensor& left, bool left_is_transposed, const Tensor& right,
                const Tensor& kept, bool add) const {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    auto list = at::empty(kept.sizes(), boxes_.options()),
         count = at::empty({kept.size(0)}, list.options());
    C10_CUDA_CHECK(cce::list_kept({.kept = kept.const_data_ptr<bool>(),
                                   .rows = static_cast<int>(kept.size(0)),
                                   .columns = static_cast<int>(kept.size(1)),
                                   .row_stride = static_cast<int>(kept.stride(0)),
                                   .column_stride = static_cast<int>(kept.stride(1))},
                                  list.data_ptr<int>(), count.data_ptr<int>(), stream));
    C10_CUDA_CHECK(cce::multiply_kept({.left = left.const_data_ptr(),
                                       .left_is_transposed = left_is_transposed,
                                       .right = right.const_data_ptr(),
                                       .left_stride = left.stride(0),
                                       .right_stride = right.stride(0),
                                       .m = out.size(-2),
                                       .n = out.size(-1),
                                       .inner = right.size(0),
                                       .list = list.const_data_ptr<int>(),
                                       .count = count.const_data_ptr<int>(),
                                       .list_stride = static_cast<int>(kept.size(1)),
                                       .out = out.data_ptr(),
                                       .out_is_fp32 = out.scalar_type() == at::kFloat,
                                       .add = add,
                                       .parts = out.dim() == 3 ? static_cast<int>(out.size(0)) : 1},
                                      clusters(), stream));
  }

  int64_t rows_, vocab_;
  Tensor boxes_;  // [boxes, rows] of two bf16 numbers
  Tensor kept_;   // [tiles, tiles] bool
};

// The exponentials e of a chunk of tokens, relative to an anchor a row, and what they give.
class Chunk {
 public:
  // e: scratch [>= rows, stride] bf16
  Chunk(const Tensor& hidden, const Slabs& slabs, const Tensor& sampled, int64_t vocab,
        reference::Tokens tokens, const Tensor& e, const LinearCrossEntropyOptions& o)
      : slabs_(slabs),
        tokens_(std::move(tokens)),
        loss_(row_loss(tokens_, vocab, {}, o)),
        e_(e.narrow(0, 0, hidden.size(0))),
        options_(o),
        x_(counted_rows(hidden, tokens_)) {
    const auto rows = x_.size(0);
    if (o.grad_mode() != GradMode::kExact) filter_.emplace(rows, vocab, tokens_.place.options());
    const auto fp32 = x_.options().dtype(at::kFloat);
    anchor_ = at::empty({rows}, fp32);
    target_logit_ = at::empty({rows}, fp32);
    sums_ = at::empty({rows, 3}, fp32);
    find_anchors(sampled);
    add_exponentials(nullptr);
    auto again = at::empty({(rows + cce::kPairRows - 1) / cce::kPairRows}, tokens_.place.options());
    C10_CUDA_CHECK(cce::find_overflow(rows, anchor_.data_ptr<float>(), sums(),
                                      target_logit_.const_data_ptr<float>(), again.data_ptr<int>(),
                                      stream_));
    add_exponentials(again.const_data_ptr<int>());
  }

  void write_outputs(const cce::RowOutputs& out) {
    lse_ = out.lse, nll_ = out.nll;
    C10_CUDA_CHECK(cce::finish_rows(x_.size(0), loss_, anchor_.const_data_ptr<float>(), sums(),
                                    target_logit_.const_data_ptr<float>(), out, stream_));
  }
  // After that, with a filter: dropped_mass [rows].
  void apply_filter(double eps, const Tensor& dropped_mass) {
    filter_->find_kept(anchor_, lse_, tokens_, eps, dropped_mass);
  }

  // After that: the upstream of each row's loss -> e with its target's entry, and each row's scale,
  // which the hidden states take too.
  void scale(const cce::RowUpstream& upstream) {
    const auto rows = x_.size(0);
    scale_ = at::empty({rows}, anchor_.options());
    entry_ = at::empty({rows}, anchor_.options());
    C10_CUDA_CHECK(cce::scale_rows({.hidden = x_.const_data_ptr(),
                                    .rows = rows,
                                    .dim = x_.size(1),
                                    .hidden_stride = x_.stride(0),
                                    .target = tokens_.place.const_data_ptr<int>()},
                                   {.loss = loss_,
                                    .upstream = upstream,
                                    .results = {.lse = lse_, .nll = nll_},
                                    .target_logit = target_logit_.const_data_ptr<float>(),
                                    .sums = sums()},
                                   exponentials(0, nullptr), x_.data_ptr(),
                                   scale_.data_ptr<float>(), entry_.data_ptr<float>(), stream_));
  }

  // Before scale(), while e is 0 at the targets: product [rows, D] fp32 = e C.
  void multiply_classifier(const Tensor& product) const {
    slabs_.each([&](int64_t first, const Tensor& slab, const float*) {
      if (filter_) {
        filter_->multiply_classifier(product, e_.narrow(1, first, slab.size(0)), slab, first);
        return;
      }
      each_part(slab.size(0), [&](int64_t from, int64_t count) {
        multiply(product, e_.narrow(1, first + from, count), slab.narrow(0, from, count),
                 first + from > 0);
      });
    });
  }
  // That product -> the hidden state's gradient.
  void finish_hidden(const Tensor& product, const Tensor& weight) const {
    fused::finish_hidden(product, product, scale_, entry_, weight, tokens_.place);
  }
  // sum [V, D] bf16 or fp32, overwritten by the first chunk.
  void add_weight_gradient(const Tensor& sum, bool first) const {
    if (options_.grad_mode() == GradMode::kFilter) {
      filter_->add_weight_gradient(sum, e_.narrow(1, 0, sum.size(0)), x_, first);
      return;
    }
    each_part(sum.size(0), [&](int64_t from, int64_t count) {
      multiply(sum.narrow(0, from, count), e_.narrow(1, from, count).t(), x_, !first);
    });
  }

 private:
  cce::AnchoredSum* sums() const { return static_cast<cce::AnchoredSum*>(sums_.data_ptr()); }
  cce::Exponentials exponentials(int64_t from, const int* only) const {
    return {.anchor = anchor_.const_data_ptr<float>(),
            .out = static_cast<char*>(e_.data_ptr()) + from * e_.element_size(),
            .out_stride = e_.stride(0),
            .boxes = filter_ ? filter_->boxes(from) : nullptr,
            .only = only};
  }
  // A sampled logit of each row that is not far below the largest.
  void find_anchors(const Tensor& sampled) {
    const auto rows = x_.size(0);
    auto best = at::empty({rows, 2}, anchor_.options());
    auto* first = static_cast<cce::Partial*>(best.data_ptr());
    auto* target_logit = target_logit_.data_ptr<float>();
    C10_CUDA_CHECK(cce::start_rows(rows, first, sums(), target_logit, stream_));
    const auto logits = logits_of(x_, sampled, nullptr, {}, options_);
    auto slots = at::empty({logits.schedule.partials(), 2}, anchor_.options());
    C10_CUDA_CHECK(cce::add_exponentials(logits, static_cast<cce::Partial*>(slots.data_ptr()),
                                         first, target_logit, stream_));
    C10_CUDA_CHECK(
        cce::anchor_rows(rows, first, loss_.counted, anchor_.data_ptr<float>(), stream_));
  }
  void add_exponentials(const int* only) {
    slabs_.each([&](int64_t from, const Tensor& slab, const float*) {
      const auto in_slab = from == 0 ? tokens_.place : tokens_.place - from;
      const auto logits = logits_of(x_, slab, nullptr, in_slab, options_);
      auto slots = at::empty({logits.schedule.partials(), 3}, anchor_.options());
      C10_CUDA_CHECK(cce::exponentials(logits, exponentials(from, only),
                                       static_cast<cce::AnchoredSum*>(slots.data_ptr()), sums(),
                                       target_logit_.data_ptr<float>(), stream_));
    });
  }
  // A GEMM with a size that is not a multiple of 64 takes several times as long: the rest goes
  // alone.
  template <class F>
  static void each_part(int64_t entries, const F& f) {
    const auto whole = entries / kWhole * kWhole;
    if (whole > 0) f(0, whole);
    if (whole < entries) f(whole, entries - whole);
  }

  const Slabs& slabs_;
  const reference::Tokens tokens_;
  const cce::RowLoss loss_;
  const Tensor e_;
  const LinearCrossEntropyOptions& options_;
  Tensor x_;  // scaled by scale()
  Tensor anchor_, sums_, target_logit_;  // [rows], [rows, 3], [rows]
  Tensor scale_, entry_;                 // [rows]
  const float *lse_ = nullptr, *nll_ = nullptr;
  std::optional<Filter> filter_;
  const c10::cuda::CUDAStream stream_ = c10::cuda::getCurrentCUDAStream();
};

}  // namespace

std::string why_not_in_forward(const Tensor& hidden, const Tensor& weight, bool has_bias,
                               const LinearCrossEntropyOptions& o) {
  if (auto refusal = refusal_of(hidden); !refusal.empty()) return refusal;
  if (hidden.scalar_type() == at::kHalf) return "hidden in Half";  // exponentials need bf16's range
  if (o.return_correct()) return "return_correct";
  if (o.return_entropy()) return "return_entropy";
  if (has_bias) return "a bias";
  if (o.label_smoothing() > 0) return "label smoothing";
  if (o.reduction() == Reduction::kNone) return "reduction = none";
  if (weight.dim() != 2) return "a weight that is not [V, D]";  // which is refused later
  const c10::cuda::CUDAGuard guard(hidden.device());
  // A trace may know the tensors by symbols.
  const auto vocab = weight.sym_size(0).guard_int(__FILE__, __LINE__);
  const auto dim = weight.sym_size(1).guard_int(__FILE__, __LINE__);
  if (dim % kAlignment != 0) return c10::str("D = ", dim, ", no multiple of ", kAlignment);
  const bool fits = vocab > 0 && chunk_rows(cce::kPairRows, vocab, o) > 0;
  return fits ? "" : c10::str("a workspace that does not hold ", cce::kPairRows, " tokens");
}

std::tuple<reference::ForwardRows, Tensor, Tensor> linear_cross_entropy_rows_with_gradients(
    const Tensor& upstream, const Tensor& hidden, const Tensor& weight,
    const reference::Tokens& tokens, const LinearCrossEntropyOptions& o,
    std::array<bool, 2> wanted) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto rows = hidden.size(0), vocab = weight.size(0), step = chunk_rows(rows, vocab, o);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const bool filters = o.grad_mode() != GradMode::kExact;
  const auto out = empty_outputs(rows, fp32, o);
  const auto grad_hidden = at::empty(wanted[0] ? hidden.sizes() : at::IntArrayRef{0}, fp32);
  // Rounding a sum of two chunks once more is within the error of a rounded gradient; of many,
  // it would add up.
  const bool sums_fp32 = weight.scalar_type() == at::kFloat || rows > 2 * step;
  const bool adds = wanted[1] && o.main_grad().defined();
  Tensor grad_weight = adds ? o.main_grad()
                            : at::empty(wanted[1] ? weight.sizes() : at::IntArrayRef{0},
                                        sums_fp32 ? fp32 : weight.options());
  {
    const auto type = hidden.scalar_type();
    const Slabs slabs(weight, {}, type, vocab);
    const auto sampled = operand(weight.slice(0, 0, vocab, kSampled), type);
    const auto e = at::empty({step, row_stride(vocab)}, hidden.options());
    for (int64_t from = 0; from < rows; from += step) {
      const auto count = std::min(step, rows - from);
      Chunk chunk(hidden.narrow(0, from, count), slabs, sampled, vocab, narrow(tokens, from, count),
                  e, o);
      chunk.write_outputs(row_outputs(out, from));
      if (filters) {
        chunk.apply_filter(reference::filter_eps(hidden.scalar_type(), o),
                           out.dropped_mass.narrow(0, from, count));
      }
      const auto product = wanted[0] ? grad_hidden.narrow(0, from, count) : grad_hidden;
      if (wanted[0]) chunk.multiply_classifier(product);
      chunk.scale(row_upstream({upstream, {}, {}}));
      if (wanted[0]) chunk.finish_hidden(product, weight);
      if (wanted[1]) chunk.add_weight_gradient(grad_weight, from == 0 && !adds);
    }
  }
  if (adds) grad_weight = at::empty({0}, fp32);
  return {out, grad_hidden, grad_weight.to(weight.scalar_type())};
}

}  // namespace ounce::fused
