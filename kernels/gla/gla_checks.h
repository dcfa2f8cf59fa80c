// SPDX-License-Identifier: MIT
// What the operators accept: the list of options as the dispatcher has it, and checks of shapes
// that also run on symbolic sizes.
#pragma once

#include <ATen/ATen.h>
#include <ounce/core/check.h>
#include <ounce/kernels/common/implementation.h>
#include <ounce/kernels/gla/gla_reference.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace ounce::gla {

using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

// The options of every operator, in one order: the end of its schema, and its last arguments.
constexpr const char* kOptionSchema =
    "*, float? scale=None, bool output_final_state=False, str gate='log_decay', "
    "float gate_normalizer=16.0, float? clamp_min=None, bool reverse=False, str state_layout='kv', "
    "bool check_numerics=False, str implementation='auto', str intra='tf32', int states_every=0, "
    "int segments=0, "
    "int? max_seqlen=None";

using OptionTypes =
    std::tuple<std::optional<double>, bool, std::string_view, double, std::optional<double>, bool,
               std::string_view, bool, std::string_view, std::string_view, int64_t, int64_t,
               std::optional<int64_t>>;

inline GlaOptions to_options(const OptionTypes& o, const char* op) {
  const auto gate = std::get<2>(o), layout = std::get<6>(o);
  OUNCE_CHECK(gate == "log_decay" || gate == "log_sigmoid_logits", "[", op,
              "] expected gate log_decay or log_sigmoid_logits, got '", gate, "'");
  OUNCE_CHECK(layout == "kv" || layout == "vk", "[", op, "] expected state_layout kv or vk, got '",
              layout, "'");
  return {std::get<0>(o),
          std::get<1>(o),
          gate == "log_decay" ? GlaGate::kLogDecay : GlaGate::kLogSigmoidLogits,
          std::get<3>(o),
          std::get<4>(o),
          std::get<5>(o),
          layout == "kv" ? GlaStateLayout::kKV : GlaStateLayout::kVK,
          std::get<7>(o),
          std::string(std::get<8>(o)),
          std::string(std::get<9>(o)),
          std::get<10>(o),
          std::get<11>(o),
          std::get<12>(o)};
}

// Views of `options`, which must outlive them.
inline OptionTypes to_arguments(const GlaOptions& o) {
  return {o.scale,
          o.output_final_state,
          o.gate == GlaGate::kLogDecay ? "log_decay" : "log_sigmoid_logits",
          o.gate_normalizer,
          o.clamp_min,
          o.reverse,
          o.state_layout == GlaStateLayout::kKV ? "kv" : "vk",
          o.check_numerics,
          o.implementation,
          o.intra,
          o.states_every,
          o.segments,
          o.max_seqlen};
}

inline void check_options(const GlaOptions& o, const char* op) {
  OUNCE_CHECK(!o.scale || std::isfinite(*o.scale), "[", op, "] expected a finite scale, got ",
              *o.scale);
  OUNCE_CHECK(o.gate_normalizer > 0, "[", op, "] expected gate_normalizer > 0, got ",
              o.gate_normalizer);
  OUNCE_CHECK(!o.clamp_min || *o.clamp_min <= 0, "[", op, "] expected clamp_min <= 0, got ",
              *o.clamp_min);
  check_implementation(op, o.implementation);
  OUNCE_CHECK(o.intra == "tf32" || o.intra == "bf16" || o.intra == "fp32", "[", op,
              "] expected intra tf32, bf16 or fp32, got '", o.intra, "'");
  OUNCE_CHECK(o.states_every >= 0 && o.segments >= 0, "[", op,
              "] expected states_every >= 0 and segments >= 0, got ", o.states_every, " and ",
              o.segments);
}

inline bool is_multiple(const SymInt& a, const SymInt& b) { return a % b == 0; }

inline void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                         const char* op) {
  const char* names[] = {"q", "k", "v", "g"};
  const Tensor* inputs[] = {&q, &k, &v, &g};
  for (int i = 0; i < 4; ++i) {
    const auto& x = *inputs[i];
    OUNCE_CHECK(x.dim() == 4, "[", op, "] expected ", names[i],
                " of shape [batch, tokens, heads, channels], got ", x.sym_sizes());
    OUNCE_CHECK(x.sym_size(0) == q.sym_size(0) && x.sym_size(1) == q.sym_size(1), "[", op,
                "] expected ", names[i], " with the batch and tokens of q ", q.sym_sizes(),
                ", got ", x.sym_sizes());
    OUNCE_CHECK(x.device() == q.device(), "[", op, "] expected ", names[i], " on ", q.device(),
                ", got ", x.device());
    OUNCE_CHECK(at::isFloatingType(x.scalar_type()) && (i == 3 || x.dtype() == q.dtype()), "[", op,
                "] expected ", names[i], " of a floating dtype, q, k, v of the same, got ",
                x.scalar_type(), " beside ", q.scalar_type());
  }
  OUNCE_CHECK(k.sym_size(3) == q.sym_size(3) && g.sym_size(3) == q.sym_size(3), "[", op,
              "] expected q, k and g with the same channels, got ", q.sym_size(3), ", ",
              k.sym_size(3), " and ", g.sym_size(3));
  OUNCE_CHECK(q.sym_size(3) >= 1 && v.sym_size(3) >= 1, "[", op,
              "] expected at least one channel, got K = ", q.sym_size(3), ", V = ", v.sym_size(3));
  const auto hq = q.sym_size(2), hk = k.sym_size(2), hv = v.sym_size(2), hg = g.sym_size(2);
  OUNCE_CHECK(hq >= 1 && hk >= 1 && hv >= 1, "[", op, "] expected at least one head, got q ", hq,
              ", k ", hk, ", v ", hv);
  OUNCE_CHECK(
      is_multiple(hq, hk) && is_multiple(hv, hk) && (is_multiple(hq, hv) || is_multiple(hv, hq)),
      "[", op, "] expected heads of q and v that are multiples of k's and of one another, got q ",
      hq, ", k ", hk, ", v ", hv);
  OUNCE_CHECK(hg == hk || hg == hv, "[", op, "] expected as many heads of g as of k (", hk,
              ") or v (", hv, "), got ", hg);
}

inline SymInt sequence_count(const Tensor& q, const OptionalTensor& cu) {
  return cu ? cu->sym_size(0) - 1 : q.sym_size(0);
}

inline std::vector<SymInt> state_shape(SymInt n, const Tensor& q, const Tensor& v,
                                       const GlaOptions& o) {
  const auto k_size = q.sym_size(3), v_size = v.sym_size(3);
  if (o.state_layout == GlaStateLayout::kVK) return {std::move(n), v.sym_size(2), v_size, k_size};
  return {std::move(n), v.sym_size(2), k_size, v_size};
}

inline void check_sequences(const Tensor& q, const Tensor& v, const OptionalTensor& state,
                            const OptionalTensor& cu, const GlaOptions& options, const char* op) {
  if (cu) {
    OUNCE_CHECK(cu->dim() == 1 &&
                    (cu->scalar_type() == at::kInt || cu->scalar_type() == at::kLong) &&
                    cu->sym_size(0) >= 1,
                "[", op, "] expected cu_seqlens as int32 or int64 [n + 1], got ", cu->scalar_type(),
                " ", cu->sym_sizes());
    OUNCE_CHECK(cu->device() == q.device(), "[", op, "] expected cu_seqlens on ", q.device(),
                ", got ", cu->device());
    OUNCE_CHECK(q.sym_size(0) == 1, "[", op, "] expected batch 1 with cu_seqlens, got ",
                q.sym_size(0), "; flatten batch and tokens into one row");
  }
  if (!state) return;
  const auto shape = state_shape(sequence_count(q, cu), q, v, options);
  const auto dtype = compute_dtype(q);
  OUNCE_CHECK(state->sym_sizes() == c10::SymIntArrayRef(shape) && state->scalar_type() == dtype,
              "[", op, "] expected initial_state ", dtype, " ", c10::SymIntArrayRef(shape),
              ", got ", state->scalar_type(), " ", state->sym_sizes());
  OUNCE_CHECK(state->device() == q.device(), "[", op, "] expected initial_state on ", q.device(),
              ", got ", state->device());
}

// The values of cu_seqlens: read on a CPU, asserted on the device elsewhere.
inline void check_boundaries(const OptionalTensor& cu, int64_t tokens, const char* op) {
  if (!cu) return;
  const auto x = cu->to(at::kLong).contiguous();
  // A tensor of a tracer has no values.
  if (x.is_meta() || x.key_set().has(c10::DispatchKey::Python)) return;
  if (x.is_cpu()) {
    const auto* p = x.data_ptr<int64_t>();
    const int64_t n = x.size(0);
    OUNCE_CHECK(p[0] == 0 && p[n - 1] == tokens && std::is_sorted(p, p + n), "[", op,
                "] expected cu_seqlens from 0 to ", tokens, " that does not decrease, got ", p[0],
                " to ", p[n - 1], std::is_sorted(p, p + n) ? "" : ", decreasing");
    return;
  }
  auto ok = (x.select(0, 0) == 0).logical_and_(x.select(0, -1) == tokens);
  ok.logical_and_((x.slice(0, 1) >= x.slice(0, 0, -1)).all());
  at::_assert_async(ok, c10::str("[", op,
                                 "] cu_seqlens must run from 0 to the number of tokens "
                                 "without decreasing"));
}

inline void check_gates(const Tensor& g, const GlaOptions& options, const char* op) {
  if (!options.check_numerics) return;
  const bool logits = options.gate == GlaGate::kLogSigmoidLogits;
  const auto bad = logits ? g.isnan() : g.le(0).logical_not_();
  if (!bad.any().item<bool>()) return;
  fail(Fault::kUsage, "[", op, "] expected g ", logits ? "without NaN" : "<= 0", ", got ",
       bad.sum().item<int64_t>(), " others, the first ",
       g.masked_select(bad).select(0, 0).item<double>());
}

inline GlaOptions check_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                             const OptionalTensor& state, const OptionalTensor& cu,
                             const OptionTypes& raw, const char* op) {
  auto options = to_options(raw, op);
  check_options(options, op);
  check_inputs(q, k, v, g, op);
  check_sequences(q, v, state, cu, options, op);
  return options;
}

}  // namespace ounce::gla
