// SPDX-License-Identifier: MIT
// Schemas, Meta, autograd and autocast of gated linear attention.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ounce/core/check.h>
#include <ounce/kernels/gla/gla_checks.h>
#include <ounce/kernels/gla/gla_reference.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <type_traits>
#include <vector>

namespace ounce::gla {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Pair = std::tuple<Tensor, Tensor>;
using Quintuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Inputs to_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                 const OptionalTensor& state, const OptionalTensor& cu) {
  return {q, k, v, g, state.value_or(Tensor()), cu.value_or(Tensor())};
}

// Stands for a result that was not asked for.
Tensor no_state(const Tensor& q) { return at::empty({0}, q.options().dtype(compute_dtype(q))); }

struct ChunkWise {
  static constexpr const char* kName = "chunk_gla";
  static Pair compute(const Inputs& in, const GlaOptions& o) { return chunk_forward(in, o); }
};

struct Recurrent {
  static constexpr const char* kName = "fused_recurrent_gla";
  static Pair compute(const Inputs& in, const GlaOptions& o) { return recurrent_forward(in, o); }
};

// The definition: differentiated by autograd through its operators.
struct Naive {
  static constexpr const char* kName = "naive_recurrent_gla";
  static Pair compute(const Inputs& in, const GlaOptions& o) { return recurrent_forward(in, o); }
};

struct Backward {
  static constexpr const char* kName = "chunk_gla_backward";
};

struct Step {
  static constexpr const char* kName = "gla_step_";
  static constexpr int64_t kMaxTokens = 8;
};

Tensor autocast(const Tensor& x) {
  const auto device = x.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device);
}

template <class Op, class... Tensors>
auto call(const GlaOptions& options, Tensors&&... tensors);
template <class Op>
class GlaFunction;
template <class Options>
class FirstDerivative;

// Kernels, whose arguments are tensors and then the list of options.
template <class Options>
struct Kernels;

template <class... O>
struct Kernels<std::tuple<O...>> {
  template <class Op>
  static Pair forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                      const OptionalTensor& state, const OptionalTensor& cu, O... o) {
    const auto options = check_call(q, k, v, g, state, cu, {o...}, Op::kName);
    check_boundaries(cu, q.size(1), Op::kName);
    check_gates(g, options, Op::kName);
    if constexpr (!std::is_same_v<Op, Naive>) {
      takes_fused(Op::kName, options.implementation, q, kNotBuilt);
    }
    auto [out, final_state] = Op::compute(to_inputs(q, k, v, g, state, cu), options);
    return {out, final_state.defined() ? final_state : no_state(q)};
  }

  template <class Op>
  static Pair forward_meta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                           const OptionalTensor& state, const OptionalTensor& cu, O... o) {
    const auto options = check_call(q, k, v, g, state, cu, {o...}, Op::kName);
    const auto h = q.sym_size(2) > v.sym_size(2) ? q.sym_size(2) : v.sym_size(2);
    const auto out =
        at::empty_symint({q.sym_size(0), q.sym_size(1), h, v.sym_size(3)}, v.options());
    if (!options.output_final_state) return {out, no_state(q)};
    const auto shape = state_shape(sequence_count(q, cu), q, v, options);
    return {out, at::empty_symint(shape, q.options().dtype(compute_dtype(q)))};
  }

  template <class Op>
  static Pair forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                               const OptionalTensor& state, const OptionalTensor& cu, O... o) {
    const auto options = to_options({o...}, Op::kName);
    const auto out = GlaFunction<Op>::apply(q, k, v, g, state, cu, options);
    return {out[0], out[1]};
  }

  template <class Op>
  static Pair forward_autocast(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                               const OptionalTensor& state, const OptionalTensor& cu, O... o) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
    return call<Op>(to_options({o...}, Op::kName), autocast(q), autocast(k), autocast(v), g, state,
                    cu);
  }

  static Quintuple backward(const Tensor& grad_o, const OptionalTensor& grad_state, const Tensor& q,
                            const Tensor& k, const Tensor& v, const Tensor& g,
                            const OptionalTensor& state, const OptionalTensor& cu, O... o) {
    const auto options = check_call(q, k, v, g, state, cu, {o...}, Backward::kName);
    check_boundaries(cu, q.size(1), Backward::kName);
    auto d = chunk_backward(grad_o, grad_state.value_or(Tensor()), to_inputs(q, k, v, g, state, cu),
                            options);
    return {d.q, d.k, d.v, d.g, state ? d.initial_state : no_state(q)};
  }

  static Quintuple backward_meta(const Tensor& /*grad_o*/, const OptionalTensor& /*grad_state*/,
                                 const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                 const OptionalTensor& state, const OptionalTensor& /*cu*/, O...) {
    auto like = [](const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); };
    return {like(q), like(k), like(v), like(g), state ? like(*state) : no_state(q)};
  }

  static Quintuple backward_autograd(const Tensor& grad_o, const OptionalTensor& grad_state,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& g, const OptionalTensor& state,
                                     const OptionalTensor& cu, O... o) {
    const auto options = to_options({o...}, Backward::kName);
    const auto d = FirstDerivative<std::tuple<O...>>::apply(grad_o, grad_state, q, k, v, g, state,
                                                            cu, options);
    return {d[0], d[1], d[2], d[3], d[4]};
  }

  // Backward may run while autocast is on; its products must not be cast.
  static Quintuple backward_autocast(const Tensor& grad_o, const OptionalTensor& grad_state,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& g, const OptionalTensor& state,
                                     const OptionalTensor& cu, O... o) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
    const auto options = to_options({o...}, Backward::kName);
    return call<Backward>(options, grad_o, grad_state, q, k, v, g, state, cu);
  }

  static GlaOptions check_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                               const Tensor& state, const OptionalTensor& indices, O... o) {
    const auto options = check_call(q, k, v, g, {}, {}, {o...}, Step::kName);
    const char* op = Step::kName;
    OUNCE_CHECK(q.sym_size(1) <= Step::kMaxTokens, "[", op, "] expected at most ", Step::kMaxTokens,
                " tokens, got ", q.sym_size(1), "; use chunk_gla");
    OUNCE_CHECK(!options.reverse, "[", op, "] expected reverse = false, got true");
    OUNCE_CHECK(
        state.dim() == 4 && at::isFloatingType(state.scalar_type()) && state.device() == q.device(),
        "[", op, "] expected a floating state of 4 dimensions on ", q.device(), ", got ",
        state.scalar_type(), " ", state.sym_sizes(), " on ", state.device());
    const auto shape = state_shape(indices ? state.sym_size(0) : q.sym_size(0), q, v, options);
    OUNCE_CHECK(state.sym_sizes() == c10::SymIntArrayRef(shape), "[", op, "] expected state ",
                c10::SymIntArrayRef(shape), ", got ", state.sym_sizes());
    OUNCE_CHECK(
        !indices || (indices->dim() == 1 && indices->sym_size(0) == q.sym_size(0) &&
                     (indices->scalar_type() == at::kInt || indices->scalar_type() == at::kLong)),
        "[", op, "] expected state_indices as int32 or int64 [", q.sym_size(0), "], got ",
        indices->scalar_type(), " ", indices->sym_sizes());
    return options;
  }

  static Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                     Tensor& state, const OptionalTensor& indices, O... o) {
    auto options = check_step(q, k, v, g, state, indices, o...);
    check_gates(g, options, Step::kName);
    takes_fused(Step::kName, options.implementation, q, kNotBuilt);
    options.output_final_state = true;
    const auto slots = indices ? indices->to(at::kLong) : Tensor();
    const auto before = indices ? state.index_select(0, slots) : state;
    const auto [out, after] = recurrent_forward({q, k, v, g, before, {}}, options);
    if (indices) {
      state.index_copy_(0, slots, after.to(state.scalar_type()));
    } else {
      state.copy_(after);
    }
    return out;
  }

  static Tensor step_meta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                          Tensor& state, const OptionalTensor& indices, O... o) {
    check_step(q, k, v, g, state, indices, o...);
    const auto h = q.sym_size(2) > v.sym_size(2) ? q.sym_size(2) : v.sym_size(2);
    return at::empty_symint({q.sym_size(0), q.sym_size(1), h, v.sym_size(3)}, v.options());
  }

  static Tensor step_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                              Tensor& state, const OptionalTensor& indices, O... o) {
    const bool wanted = q.requires_grad() || k.requires_grad() || v.requires_grad() ||
                        g.requires_grad() || state.requires_grad();
    OUNCE_CHECK(!at::GradMode::is_enabled() || !wanted,
                "[gla_step_] expected inputs without gradients; use chunk_gla or no_grad");
    Tensor out;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      out = call<Step>(to_options({o...}, Step::kName), q, k, v, g, state, indices);
    }
    if (!state.is_inference()) torch::autograd::impl::bump_version(state);
    return out;
  }

  static Tensor step_autocast(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                              Tensor& state, const OptionalTensor& indices, O... o) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
    return call<Step>(to_options({o...}, Step::kName), autocast(q), autocast(k), autocast(v), g,
                      state, indices);
  }

  using ForwardSignature = decltype(forward<ChunkWise>);
  using BackwardSignature = decltype(backward);
  using StepSignature = decltype(step);
};

using GlaKernels = Kernels<OptionTypes>;

template <class Op>
struct SignatureOf {
  using type = GlaKernels::ForwardSignature;
};
template <>
struct SignatureOf<Backward> {
  using type = GlaKernels::BackwardSignature;
};
template <>
struct SignatureOf<Step> {
  using type = GlaKernels::StepSignature;
};

// The operator `Op` of the dispatcher, with the options spread out as its last arguments.
template <class Op, class... Tensors>
auto call(const GlaOptions& options, Tensors&&... tensors) {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow((std::string("ounce::") + Op::kName).c_str(), "")
          .template typed<typename SignatureOf<Op>::type>();
  return std::apply([&](const auto&... o) { return handle.call(tensors..., o...); },
                    to_arguments(options));
}

// Gradients come from chunk_gla_backward, whichever way o was computed.
template <class Op>
class GlaFunction : public torch::autograd::Function<GlaFunction<Op>> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& g, const OptionalTensor& state,
                               const OptionalTensor& cu, const GlaOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({q, k, v, g, state.value_or(Tensor()), cu.value_or(Tensor())});
    ctx->set_materialize_grads(false);
    auto& data = ctx->saved_data;
    data["scale"] = options.scale;
    data["logits"] = options.gate == GlaGate::kLogSigmoidLogits;
    data["gate_normalizer"] = options.gate_normalizer;
    data["clamp_min"] = options.clamp_min;
    data["reverse"] = options.reverse;
    data["v_first"] = options.state_layout == GlaStateLayout::kVK;
    data["implementation"] = options.implementation;
    auto [o, final_state] = call<Op>(options, q, k, v, g, state, cu);
    if (!options.output_final_state) ctx->mark_non_differentiable({final_state});
    return {o, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    GlaOptions options;
    options.scale = data["scale"].toOptional<double>();
    if (data["logits"].toBool()) options.gate = GlaGate::kLogSigmoidLogits;
    options.gate_normalizer = data["gate_normalizer"].toDouble();
    options.clamp_min = data["clamp_min"].toOptional<double>();
    options.reverse = data["reverse"].toBool();
    if (data["v_first"].toBool()) options.state_layout = GlaStateLayout::kVK;
    options.implementation = data["implementation"].toStringRef();
    auto optional = [](const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; };
    const auto &q = saved[0], &v = saved[2];
    auto grad_o = grads[0];
    if (!grad_o.defined()) {
      const auto h = q.sym_size(2) > v.sym_size(2) ? q.sym_size(2) : v.sym_size(2);
      grad_o = at::zeros_symint({q.sym_size(0), q.sym_size(1), h, v.sym_size(3)}, v.options());
    }
    const auto state = optional(saved[4]), cu = optional(saved[5]), grad_state = optional(grads[1]);
    auto [dq, dk, dv, dg, dstate] =
        call<Backward>(options, grad_o, grad_state, q, saved[1], v, saved[3], state, cu);
    return {dq, dk, dv, dg, state ? dstate : Tensor(), {}, {}};
  }
};

// The backward operator, which has no derivative of its own.
template <class Options>
class FirstDerivative : public torch::autograd::Function<FirstDerivative<Options>> {
 public:
  static variable_list forward(AutogradContext* /*ctx*/, const Tensor& grad_o,
                               const OptionalTensor& grad_state, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& g, const OptionalTensor& state,
                               const OptionalTensor& cu, const GlaOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dv, dg, dstate] =
        call<Backward>(options, grad_o, grad_state, q, k, v, g, state, cu);
    return {dq, dk, dv, dg, dstate};
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    fail(Fault::kUsage,
         "[chunk_gla] expected first derivatives only, got double backward; "
         "differentiate naive_recurrent_gla");
  }
};

TORCH_LIBRARY_FRAGMENT(ounce, m) {
  const std::string options = kOptionSchema;
  const std::string inputs =
      "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, " +
      options + ") -> (Tensor, Tensor)";
  m.def(("chunk_gla" + inputs).c_str());
  m.def(("fused_recurrent_gla" + inputs).c_str());
  m.def(("naive_recurrent_gla" + inputs).c_str());
  m.def(
      ("chunk_gla_backward(Tensor grad_o, Tensor? grad_final_state, Tensor q, Tensor k, Tensor v, "
       "Tensor g, Tensor? initial_state=None, Tensor? cu_seqlens=None, " +
       options + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
          .c_str());
  m.def(("gla_step_(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) state, "
         "Tensor? state_indices=None, " +
         options + ") -> Tensor")
            .c_str());
}

TORCH_LIBRARY_IMPL(ounce, CompositeImplicitAutograd, m) {
  m.impl("naive_recurrent_gla", GlaKernels::forward<Naive>);
}

TORCH_LIBRARY_IMPL(ounce, CompositeExplicitAutograd, m) {
  m.impl("chunk_gla", GlaKernels::forward<ChunkWise>);
  m.impl("fused_recurrent_gla", GlaKernels::forward<Recurrent>);
  m.impl("chunk_gla_backward", GlaKernels::backward);
  m.impl("gla_step_", GlaKernels::step);
}

TORCH_LIBRARY_IMPL(ounce, Meta, m) {
  m.impl("chunk_gla", GlaKernels::forward_meta<ChunkWise>);
  m.impl("fused_recurrent_gla", GlaKernels::forward_meta<Recurrent>);
  m.impl("chunk_gla_backward", GlaKernels::backward_meta);
  m.impl("gla_step_", GlaKernels::step_meta);
}

TORCH_LIBRARY_IMPL(ounce, Autograd, m) {
  m.impl("chunk_gla", GlaKernels::forward_autograd<ChunkWise>);
  m.impl("fused_recurrent_gla", GlaKernels::forward_autograd<Recurrent>);
  m.impl("chunk_gla_backward", GlaKernels::backward_autograd);
  m.impl("gla_step_", GlaKernels::step_autograd);
}

void register_autocast(torch::Library& m) {
  m.impl("chunk_gla", GlaKernels::forward_autocast<ChunkWise>);
  m.impl("fused_recurrent_gla", GlaKernels::forward_autocast<Recurrent>);
  m.impl("naive_recurrent_gla", GlaKernels::forward_autocast<Naive>);
  m.impl("chunk_gla_backward", GlaKernels::backward_autocast);
  m.impl("gla_step_", GlaKernels::step_autocast);
}
TORCH_LIBRARY_IMPL(ounce, AutocastCPU, m) { register_autocast(m); }
TORCH_LIBRARY_IMPL(ounce, AutocastCUDA, m) { register_autocast(m); }

OptionalTensor drop_undefined(const OptionalTensor& x) {
  return x && x->defined() ? x : std::nullopt;
}

void check_defined(std::initializer_list<const Tensor*> tensors, const char* op) {
  for (const auto* x : tensors) {
    OUNCE_CHECK(x->defined(), "[", op, "] expected every tensor that is not optional, got an ",
                "undefined one");
  }
}

template <class Op>
Pair call_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                  const GlaOptions& options) {
  check_defined({&q, &k, &v, &g}, Op::kName);
  auto [o, final_state] =
      call<Op>(options, q, k, v, g, drop_undefined(initial_state), drop_undefined(cu_seqlens));
  return {o, options.output_final_state ? final_state : Tensor()};
}

}  // namespace
}  // namespace ounce::gla

namespace ounce {

std::tuple<at::Tensor, at::Tensor> chunk_gla(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& g,
                                             const std::optional<at::Tensor>& initial_state,
                                             const std::optional<at::Tensor>& cu_seqlens,
                                             const GlaOptions& options) {
  return gla::call_forward<gla::ChunkWise>(q, k, v, g, initial_state, cu_seqlens, options);
}

std::tuple<at::Tensor, at::Tensor> fused_recurrent_gla(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
    const GlaOptions& options) {
  return gla::call_forward<gla::Recurrent>(q, k, v, g, initial_state, cu_seqlens, options);
}

at::Tensor gla_step_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& g, at::Tensor& state,
                     const std::optional<at::Tensor>& state_indices, const GlaOptions& options) {
  gla::check_defined({&q, &k, &v, &g, &state}, gla::Step::kName);
  return gla::call<gla::Step>(options, q, k, v, g, state, gla::drop_undefined(state_indices));
}

std::tuple<at::Tensor, at::Tensor> naive_recurrent_gla(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
    const GlaOptions& options) {
  return gla::call_forward<gla::Naive>(q, k, v, g, initial_state, cu_seqlens, options);
}

}  // namespace ounce
