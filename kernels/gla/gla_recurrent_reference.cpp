// SPDX-License-Identifier: MIT
// The recurrence, token by token, from differentiable ATen operators.
#include <ATen/ATen.h>
#include <ounce/kernels/gla/gla_reference.h>

#include <vector>

namespace ounce::gla {
namespace {

// [b, t, Hx, d] with every head repeated: [b, t, H, d].
Tensor repeat_heads(const Tensor& x, int64_t heads) {
  return x.size(2) == heads ? x : x.repeat_interleave(heads / x.size(2), 2, heads);
}

// Of packed sequences: the sequence of each token [t] and whether it is its first [t].
std::tuple<Tensor, Tensor> token_tables(const Tensor& cu_seqlens, int64_t tokens) {
  const auto ends = cu_seqlens.slice(0, 1).contiguous();
  const auto token = at::arange(tokens, cu_seqlens.options());
  const auto sequence = at::searchsorted(ends, token, false, /*right=*/true);
  return {sequence, cu_seqlens.index_select(0, sequence) == token};
}

}  // namespace

std::tuple<Tensor, Tensor> recurrent_forward(const Inputs& in, const GlaOptions& options) {
  const bool v_first = options.state_layout == GlaStateLayout::kVK;
  const bool packed = in.cu_seqlens.defined();
  const auto dtype = compute_dtype(in.q);
  const int64_t tokens = in.q.size(1), h = heads(in), heads_v = in.v.size(2);
  auto ordered = [&](const Tensor& x) {
    const auto y = repeat_heads(x.to(dtype), h);
    return options.reverse ? y.flip(1) : y;
  };
  const auto q = ordered(in.q) * scale(in, options), k = ordered(in.k), v = ordered(in.v);
  const auto a = ordered(log_decay(in.g, options).exp());

  const int64_t n = sequences(in);
  Tensor initial = in.initial_state.defined()
                       ? in.initial_state.to(dtype)
                       : at::zeros({n, heads_v, q.size(3), v.size(3)}, q.options());
  if (in.initial_state.defined() && v_first) initial = initial.transpose(-1, -2);
  initial = initial.repeat_interleave(h / heads_v, 1, h);
  const bool flip_sequences = packed && options.reverse;
  if (flip_sequences) initial = initial.flip(0);

  Tensor sequence, is_first, final_state = initial;
  if (packed) {
    const auto cu = options.reverse ? tokens - in.cu_seqlens.flip(0) : in.cu_seqlens;
    std::tie(sequence, is_first) = token_tables(cu.to(at::kLong), tokens);
    final_state = initial.clone();
  }
  Tensor state = initial;
  std::vector<Tensor> out;
  out.reserve(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (packed) {
      const auto fresh = initial.index_select(0, sequence.slice(0, t, t + 1));
      state = t == 0 ? fresh : at::where(is_first.select(0, t), fresh, state);
    }
    state = state * a.select(1, t).unsqueeze(-1) +
            k.select(1, t).unsqueeze(-1) * v.select(1, t).unsqueeze(-2);
    out.push_back(at::matmul(q.select(1, t).unsqueeze(-2), state).squeeze(-2));
    if (packed && options.output_final_state) {
      final_state.index_copy_(0, sequence.slice(0, t, t + 1), state);
    }
  }
  if (!packed) final_state = state;
  auto o = tokens > 0 ? at::stack(out, 1) : at::zeros({q.size(0), 0, h, v.size(3)}, q.options());
  if (options.reverse) o = o.flip(1);
  o = o.to(in.v.scalar_type());
  if (!options.output_final_state) return {o, Tensor()};
  if (flip_sequences) final_state = final_state.flip(0);
  // The heads that read one value head share its state.
  final_state = final_state.unflatten(1, {heads_v, h / heads_v}).select(2, 0);
  if (v_first) final_state = final_state.transpose(-1, -2);
  return {o, final_state.clone(at::MemoryFormat::Contiguous)};
}

}  // namespace ounce::gla
