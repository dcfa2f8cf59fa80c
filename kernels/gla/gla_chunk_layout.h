// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/ATen.h>
#include <ounce/kernels/gla/gla_reference.h>

#include <algorithm>

namespace ounce::gla {

// Where tokens lie when sequences are cut into chunks: [chunks, rows, c, .], chunks of one sequence
// in order, the last one padded. Rows are the batch; packed sequences share one row, each starting
// at a chunk of its own, so that chunk tables have shapes known without their values.
class ChunkLayout {
 public:
  ChunkLayout(const Inputs& in, bool reverse);

  // x [b, t, Hx, d] as [chunks * rows * H, c, d] in the compute dtype; padding holds `fill`.
  Tensor split(const Tensor& x, double fill) const;
  // The reverse for gradients and outputs: heads that were read from one are added up.
  Tensor merge(const Tensor& y, int64_t heads_x, at::ScalarType dtype) const;
  // States [n, Hv, K, V] (layout and order as the caller has them) as [sequences, rows * H, K, V].
  Tensor split_state(const Tensor& state, bool v_first) const;
  Tensor merge_state(const Tensor& state, int64_t heads_v, bool v_first, bool add_heads) const;

  int64_t chunks = 0, rows = 1, heads = 1, chunk = 1, sequences = 1;
  at::ScalarType dtype;
  bool packed = false;
  // Packed only. Of each chunk: its sequence, whether it is that sequence's last. Of each sequence:
  // its first and last chunk (any chunk for an empty one) and whether it is empty.
  Tensor chunk_sequence, is_last, first_chunk, last_chunk, is_empty;

  // [chunks, rows * heads, ...] view of [chunks * rows * heads, ...].
  Tensor by_chunk(const Tensor& x) const {
    auto sizes = x.sizes().vec();
    sizes[0] = rows * heads;
    sizes.insert(sizes.begin(), chunks);
    return x.view(sizes);
  }

 private:
  void index_packed(const Tensor& cu_seqlens, int64_t tokens);

  int64_t tokens_ = 0;
  bool reverse_ = false;
  Tensor slot_token_, slot_padding_, token_slot_;
};

inline ChunkLayout::ChunkLayout(const Inputs& in, bool reverse)
    : heads(gla::heads(in)), dtype(compute_dtype(in.q)), reverse_(reverse) {
  const int64_t limit = in.q.is_cuda() ? 64 : 32;
  tokens_ = in.q.size(1);
  while (chunk < limit && chunk < tokens_) chunk *= 2;
  packed = in.cu_seqlens.defined();
  if (packed) {
    index_packed(in.cu_seqlens.to(at::kLong), tokens_);
  } else {
    rows = in.q.size(0);
    chunks = (tokens_ + chunk - 1) / chunk;
  }
}

inline void ChunkLayout::index_packed(const Tensor& cu_seqlens, int64_t tokens) {
  sequences = cu_seqlens.size(0) - 1;
  chunks = std::min(tokens, (tokens + sequences * (chunk - 1)) / chunk);
  const auto starts = cu_seqlens.slice(0, 0, sequences);
  const auto ends = cu_seqlens.slice(0, 1).contiguous();
  const auto counts = (ends - starts + (chunk - 1)).floor_divide(chunk);
  const auto chunk_ends = counts.cumsum(0);
  const auto chunk_starts = chunk_ends - counts;
  const auto options = cu_seqlens.options();

  const auto index = at::arange(chunks, options);
  chunk_sequence =
      at::searchsorted(chunk_ends, index, false, /*right=*/true).clamp_max(sequences - 1);
  const auto offset = (index - chunk_starts.index_select(0, chunk_sequence)) * chunk;
  const auto start = starts.index_select(0, chunk_sequence);
  const auto end = ends.index_select(0, chunk_sequence);
  // Chunks past the last one in use begin at or after the end of their sequence.
  is_last = (start + offset < end).logical_and(start + offset + chunk >= end);
  first_chunk = chunk_starts.clamp_max(chunks - 1);
  last_chunk = (chunk_ends - 1).clamp_min(0);
  is_empty = counts == 0;

  const auto within = offset.unsqueeze(1) + at::arange(chunk, options);
  const auto position = (reverse_ ? end.unsqueeze(1) - 1 - within : start.unsqueeze(1) + within);
  slot_padding_ = (within >= (end - start).unsqueeze(1)).reshape({-1, 1, 1});
  slot_token_ = position.clamp(0, tokens - 1).reshape({-1});

  const auto token = at::arange(tokens, options);
  const auto sequence = at::searchsorted(ends, token, false, /*right=*/true);
  const auto first = starts.index_select(0, sequence);
  const auto step = reverse_ ? ends.index_select(0, sequence) - 1 - token : token - first;
  token_slot_ = chunk_starts.index_select(0, sequence) * chunk + step;
}

inline Tensor ChunkLayout::split(const Tensor& x, double fill) const {
  Tensor padded = x;
  if (packed) {
    padded =
        x.squeeze(0).index_select(0, slot_token_).masked_fill_(slot_padding_, fill).unsqueeze(0);
  } else {
    if (reverse_) padded = padded.flip(1);
    const int64_t missing = chunks * chunk - tokens_;
    if (missing > 0) padded = at::constant_pad_nd(padded, {0, 0, 0, 0, 0, missing}, fill);
  }
  const int64_t heads_x = x.size(2), repeat = heads / heads_x, d = x.size(3);
  auto y = at::empty({chunks, rows, heads_x, repeat, chunk, d}, x.options().dtype(dtype));
  y.copy_(padded.unflatten(1, {chunks, chunk}).unsqueeze(4).permute({1, 0, 3, 4, 2, 5}));
  return y.view({chunks * rows * heads, chunk, d});
}

inline Tensor ChunkLayout::merge(const Tensor& y, int64_t heads_x, at::ScalarType out) const {
  const int64_t repeat = heads / heads_x, d = y.size(-1);
  auto summed = y.view({chunks, rows, heads_x, repeat, chunk, d});
  summed = repeat == 1 ? summed.squeeze(3) : summed.sum(3);
  auto x = at::empty({rows, chunks, chunk, heads_x, d}, y.options().dtype(out));
  x.copy_(summed.permute({1, 0, 3, 2, 4}));
  x = x.view({rows, chunks * chunk, heads_x, d});
  if (packed) return x.index_select(1, token_slot_);
  x = x.slice(1, 0, tokens_);
  return reverse_ ? x.flip(1) : x.contiguous();
}

inline Tensor ChunkLayout::split_state(const Tensor& state, bool v_first) const {
  auto s = (v_first ? state.transpose(-1, -2) : state).to(dtype);
  const int64_t n = s.size(0), heads_v = s.size(1), repeat = heads / heads_v;
  s = s.unsqueeze(2).expand({n, heads_v, repeat, s.size(2), s.size(3)});
  return s.reshape({sequences, rows * heads, s.size(3), s.size(4)});
}

inline Tensor ChunkLayout::merge_state(const Tensor& state, int64_t heads_v, bool v_first,
                                       bool add_heads) const {
  const int64_t k = state.size(-2), v = state.size(-1);
  auto s = state.reshape({sequences * rows, heads_v, heads / heads_v, k, v});
  s = add_heads ? s.sum(2) : s.select(2, 0);
  return (v_first ? s.transpose(-1, -2) : s).contiguous();
}

}  // namespace ounce::gla
