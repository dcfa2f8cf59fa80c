// SPDX-License-Identifier: MIT
// Chunkwise and recurrent gated linear attention from ATen operators.
//
// Decays inside a chunk are built as a tree: blocks of 1, 2, 4 .. tokens are joined pairwise, and
// tokens of a right half meet tokens of a left half with the decay from the seam to the one times
// the decay from the other to the seam. Both factors are products of decays, so nothing is divided,
// subtracted in the log domain or anchored: no range of gates overflows or loses accuracy, a decay
// of 0 is exact, and no test of the values is needed.
#include <ATen/ATen.h>
#include <ounce/kernels/gla/gla_chunk_layout.h>
#include <ounce/kernels/gla/gla_reference.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace ounce::gla {
namespace {

// The two halves of every block of 2 h tokens of x [n, c, d]: views [n, c / 2h, h, d].
Tensor left_half(const Tensor& x, int64_t h) { return x.unflatten(1, {-1, 2, h}).select(2, 0); }
Tensor right_half(const Tensor& x, int64_t h) { return x.unflatten(1, {-1, 2, h}).select(2, 1); }

// Of a [n, c, c], the blocks with rows in right halves and columns in left ones: [n, c / 2h, h, h].
Tensor seam_blocks(const Tensor& a, int64_t h) {
  const int64_t n = a.size(0), c = a.size(1);
  return a.as_strided({n, c / (2 * h), h, h}, {c * c, 2 * h * (c + 1), c, 1},
                      a.storage_offset() + h * c);
}

Tensor block_matmul(const Tensor& a, const Tensor& b) {
  return at::bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, {a.size(0), a.size(1)});
}

// What a chunk needs beside its inputs [n, c, .]; q carries the scale.
struct Chunk {
  Tensor q, k, v;
  Tensor prefix;  // [n, c, K] decay from the chunk's start through the token
  Tensor suffix;  // [n, c, K] decay after the token to the chunk's end
  Tensor scores;  // [n, c, c] sum_K q_t k_s decay(s, t), 0 above the diagonal
};

// Gradients of q and k without the pairs s = t, which cancel in the gradient of the decays.
struct OffDiagonal {
  Tensor scores;  // in: gradient of the scores
  Tensor q, k;    // out, added to
};

void join_halves(Chunk& c, OffDiagonal* grad, int64_t h) {
  const auto prefix = right_half(c.prefix, h), suffix = left_half(c.suffix, h);
  const auto q = right_half(c.q, h) * prefix;
  const auto k = h == 1 ? left_half(c.k, h) : left_half(c.k, h) * suffix;
  auto scores = seam_blocks(c.scores, h);
  if (h == 1) {
    scores.copy_((q * k).sum(-1, /*keepdim=*/true));
  } else {
    scores.copy_(block_matmul(q, k.transpose(-1, -2)));
  }
  if (grad == nullptr) return;
  const auto d = seam_blocks(grad->scores, h).contiguous();
  right_half(grad->q, h).addcmul_(h == 1 ? d * k : block_matmul(d, k), prefix);
  left_half(grad->k, h).addcmul_(h == 1 ? d * q : block_matmul(d.transpose(-1, -2), q), suffix);
}

Chunk make_chunk(const ChunkLayout& layout, const Inputs& in, const GlaOptions& options,
                 OffDiagonal* grad, const Tensor& grad_o) {
  Chunk c;
  c.q = layout.split(in.q, 0).mul_(scale(in, options));
  c.k = layout.split(in.k, 0);
  c.v = layout.split(in.v, 0);
  c.prefix = layout.split(log_decay(in.g, options).exp(), 1);
  c.suffix = at::ones_like(c.prefix);
  c.scores = at::zeros({c.q.size(0), layout.chunk, layout.chunk}, c.q.options());
  if (grad != nullptr) {
    grad->scores = at::bmm(grad_o, c.v.transpose(1, 2)).tril_();
    grad->q = at::zeros_like(c.q);
    grad->k = at::zeros_like(c.k);
  }
  for (int64_t h = 1; h < layout.chunk; h *= 2) {
    join_halves(c, grad, h);
    const auto left = left_half(c.prefix, h), right = right_half(c.prefix, h);
    left_half(c.suffix, h).mul_(right.slice(2, h - 1));
    right.mul_(left.slice(2, h - 1));
  }
  c.scores.diagonal(0, 1, 2).copy_((c.q * c.k).sum(-1));
  return c;
}

// [chunks, R, K, 1] decay of a whole chunk.
Tensor chunk_decay(const ChunkLayout& layout, const Chunk& c) {
  return layout.by_chunk(c.prefix.select(1, layout.chunk - 1).unsqueeze(-1));
}

// For packed sequences, what the caller's per-sequence states are at the sequence of each chunk.
Tensor at_chunks(const ChunkLayout& layout, const Tensor& states) {
  return states.index_select(0, layout.chunk_sequence);
}

Tensor boundary(const ChunkLayout& layout) { return layout.is_last.view({-1, 1, 1, 1}); }

// Replaces entry i of `states` by that of `other` (undefined = 0) where `mask`.
void replace(Tensor states, const Tensor& mask, const Tensor& other) {
  if (other.defined()) {
    states.copy_(at::where(mask, other, states));
  } else {
    states.masked_fill_(mask, 0);
  }
}

// States entering each chunk, and for one sequence a row the final state behind them:
// [chunks + 1, R, K, V]. `initial` [sequences, R, K, V] or undefined.
Tensor scan_states(const ChunkLayout& layout, const Chunk& c, const Tensor& initial) {
  const int64_t k = c.k.size(2), v = c.v.size(2), r = layout.rows * layout.heads, n = layout.chunks;
  auto states = at::empty({n + 1, r, k, v}, c.q.options());
  auto added = states.slice(0, 1).view({n * r, k, v});
  at::bmm_out(added, (c.k * c.suffix).transpose(1, 2), c.v);
  auto decay = chunk_decay(layout, c);
  Tensor first;
  if (initial.defined()) {
    first = layout.packed ? at_chunks(layout, initial) : initial;
    states.select(0, 0).copy_(first.select(0, 0));
  } else {
    states.select(0, 0).zero_();
  }
  if (layout.packed && n > 1) {
    const auto mask = boundary(layout).slice(0, 0, n - 1);
    replace(states.slice(0, 1, n), mask, first.defined() ? first.slice(0, 1) : first);
    decay = decay.masked_fill(boundary(layout), 0);
  }
  for (int64_t i = 0; i < n; ++i) {
    states.select(0, i + 1).addcmul_(decay.select(0, i), states.select(0, i));
  }
  return states;
}

// Gradients of the states leaving each chunk, the gradient of the first state entering before them:
// [chunks + 1, R, K, V]. `last` is the gradient of the final states, or undefined.
Tensor scan_state_gradients(const ChunkLayout& layout, const Chunk& c, const Tensor& grad_o,
                            const Tensor& last) {
  const int64_t k = c.k.size(2), v = c.v.size(2), r = layout.rows * layout.heads, n = layout.chunks;
  auto grads = at::empty({n + 1, r, k, v}, c.q.options());
  auto added = grads.slice(0, 0, n).view({n * r, k, v});
  at::bmm_out(added, (c.q * c.prefix).transpose(1, 2), grad_o);
  auto decay = chunk_decay(layout, c);
  auto tail = grads.select(0, n);
  if (last.defined() && !layout.packed) {
    tail.copy_(last.select(0, 0));
  } else {
    tail.zero_();
  }
  if (layout.packed) {
    const auto mask = boundary(layout);
    replace(grads.slice(0, 1), mask, last.defined() ? at_chunks(layout, last) : last);
    // A chunk's own gradient does not pass to the chunk before it when that one ends a sequence.
    auto carried = decay.clone();
    if (n > 1) carried.slice(0, 1).masked_fill_(mask.slice(0, 0, n - 1), 0);
    decay = carried;
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    grads.select(0, i).addcmul_(decay.select(0, i), grads.select(0, i + 1));
  }
  return grads;
}

// Of packed sequences: decay * state + left^T right in one chunk a sequence, `otherwise` (undefined
// = 0) for empty ones.
Tensor edge_states(const ChunkLayout& layout, const Chunk& c, const Tensor& chunk_index,
                   const Tensor& states, const Tensor& left, const Tensor& right,
                   const Tensor& otherwise) {
  auto pick = [&](const Tensor& x) { return layout.by_chunk(x).index_select(0, chunk_index); };
  auto edge = at::matmul(pick(left).transpose(-1, -2), pick(right));
  edge.addcmul_(chunk_decay(layout, c).index_select(0, chunk_index),
                states.index_select(0, chunk_index));
  replace(edge, layout.is_empty.view({-1, 1, 1, 1}), otherwise);
  return edge;
}

Tensor empty_final_state(const Inputs& in, const GlaOptions& options) {
  if (in.initial_state.defined()) return in.initial_state.clone();
  const bool v_first = options.state_layout == GlaStateLayout::kVK;
  const int64_t k = in.q.size(3), v = in.v.size(3);
  return at::zeros({sequences(in), in.v.size(2), v_first ? v : k, v_first ? k : v},
                   in.q.options().dtype(compute_dtype(in.q)));
}

bool no_tokens(const Inputs& in) {
  return in.q.size(0) * in.q.size(1) * in.q.size(2) * in.v.size(2) == 0;
}

}  // namespace

int64_t heads(const Inputs& in) { return std::max(in.q.size(2), in.v.size(2)); }

int64_t sequences(const Inputs& in) {
  return in.cu_seqlens.defined() ? in.cu_seqlens.size(0) - 1 : in.q.size(0);
}

at::ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor log_decay(const Tensor& g, const GlaOptions& options) {
  auto log_a = g.to(compute_dtype(g));
  if (options.gate == GlaGate::kLogSigmoidLogits) {
    log_a = at::log_sigmoid(log_a) / options.gate_normalizer;
  }
  if (options.clamp_min) log_a = log_a.clamp_min(*options.clamp_min);
  return log_a;
}

double scale(const Inputs& in, const GlaOptions& options) {
  return options.scale.value_or(1 / std::sqrt(static_cast<double>(in.q.size(3))));
}

std::tuple<Tensor, Tensor> chunk_forward(const Inputs& in, const GlaOptions& options) {
  const bool v_first = options.state_layout == GlaStateLayout::kVK;
  Tensor final_state;
  if (no_tokens(in)) {
    if (options.output_final_state) final_state = empty_final_state(in, options);
    auto sizes = in.v.sizes().vec();
    sizes[2] = heads(in);
    return {at::zeros(sizes, in.v.options()), final_state};
  }
  const ChunkLayout layout(in, options.reverse);
  const auto c = make_chunk(layout, in, options, nullptr, {});
  Tensor initial;
  if (in.initial_state.defined()) initial = layout.split_state(in.initial_state, v_first);
  const auto states = scan_states(layout, c, initial);
  auto o = at::bmm(c.scores, c.v);
  o.baddbmm_(c.q * c.prefix, states.slice(0, 0, layout.chunks).flatten(0, 1));
  if (options.output_final_state) {
    final_state = layout.packed ? edge_states(layout, c, layout.last_chunk, states, c.k * c.suffix,
                                              c.v, initial)
                                : states.select(0, layout.chunks);
    final_state = layout.merge_state(final_state, in.v.size(2), v_first, /*add_heads=*/false);
  }
  return {layout.merge(o, heads(in), in.v.scalar_type()), final_state};
}

namespace {

// Chain rule from the gradient of log a (per head of g) to g.
Tensor gate_gradient(const Tensor& grad_log_a, const Tensor& g, const GlaOptions& options) {
  const auto x = g.to(grad_log_a.scalar_type());
  auto plain = options;
  plain.clamp_min.reset();
  const auto log_a = log_decay(x, plain);
  // Nothing depends on a decay that is exactly 0, or held at its clamp.
  auto dead = log_a.exp() == 0;
  if (options.clamp_min) {
    dead = std::exp(*options.clamp_min) == 0 ? dead.logical_or_(log_a < *options.clamp_min)
                                             : log_a < *options.clamp_min;
  }
  auto grad = grad_log_a;
  if (options.gate == GlaGate::kLogSigmoidLogits) {
    grad = grad * at::sigmoid(-x) / options.gate_normalizer;
  }
  return grad.masked_fill(dead, 0).to(g.scalar_type());
}

}  // namespace

Gradients chunk_backward(const Tensor& grad_out, const Tensor& grad_final, const Inputs& in,
                         const GlaOptions& options) {
  const bool v_first = options.state_layout == GlaStateLayout::kVK;
  if (no_tokens(in)) {
    Gradients out{at::zeros_like(in.q, at::MemoryFormat::Contiguous),
                  at::zeros_like(in.k, at::MemoryFormat::Contiguous),
                  at::zeros_like(in.v, at::MemoryFormat::Contiguous),
                  at::zeros_like(in.g, at::MemoryFormat::Contiguous),
                  {}};
    if (in.initial_state.defined()) {
      out.initial_state = grad_final.defined()
                              ? grad_final.clone(at::MemoryFormat::Contiguous)
                              : at::zeros_like(in.initial_state, at::MemoryFormat::Contiguous);
    }
    return out;
  }
  const ChunkLayout layout(in, options.reverse);
  const auto grad_o = layout.split(grad_out, 0);
  OffDiagonal off;
  const auto c = make_chunk(layout, in, options, &off, grad_o);

  Tensor initial, last;
  if (in.initial_state.defined()) initial = layout.split_state(in.initial_state, v_first);
  if (grad_final.defined()) {
    // The final state of a value head is that of its first head.
    last = layout.split_state(grad_final, v_first).clone();
    const int64_t repeat = layout.heads / in.v.size(2);
    if (repeat > 1) last.unflatten(1, {-1, repeat}).slice(2, 1).zero_();
  }
  const auto states = scan_states(layout, c, initial).slice(0, 0, layout.chunks);
  const auto grads = scan_state_gradients(layout, c, grad_o, last);
  const auto leaving = grads.slice(0, 1).flatten(0, 1);
  const auto k_suffix = c.k * c.suffix;

  const auto grad_v = at::bmm(c.scores.transpose(1, 2), grad_o).baddbmm_(k_suffix, leaving);
  const auto from_state = at::bmm(c.v, leaving.transpose(1, 2)).mul_(c.suffix);
  // The decay of the chunk as a whole; closes the sums below at the chunk's end.
  auto total = (states.flatten(0, 1) * leaving).sum(-1) * c.prefix.select(1, layout.chunk - 1);
  total += (from_state * c.k).sum(1);
  off.k += from_state;
  off.q.addcmul_(at::bmm(grad_o, states.flatten(0, 1).transpose(1, 2)), c.prefix);
  auto grad_g = (c.q * off.q).sub_(c.k * off.k);
  grad_g = grad_g.flip(1).cumsum(1).flip(1).add_(total.unsqueeze(1));

  const auto same = off.scores.diagonal(0, 1, 2).unsqueeze(-1);
  off.q.addcmul_(same, c.k).mul_(scale(in, options));
  off.k.addcmul_(same, c.q);
  Gradients out{layout.merge(off.q, in.q.size(2), in.q.scalar_type()),
                layout.merge(off.k, in.k.size(2), in.k.scalar_type()),
                layout.merge(grad_v, in.v.size(2), in.v.scalar_type()),
                gate_gradient(layout.merge(grad_g, in.g.size(2), layout.dtype), in.g, options),
                {}};
  if (in.initial_state.defined()) {
    auto first = layout.packed ? edge_states(layout, c, layout.first_chunk, grads.slice(0, 1),
                                             c.q * c.prefix, grad_o, last)
                               : grads.select(0, 0);
    out.initial_state = layout.merge_state(first, in.v.size(2), v_first, /*add_heads=*/true);
  }
  return out;
}

}  // namespace ounce::gla
