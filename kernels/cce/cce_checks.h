// SPDX-License-Identifier: MIT
// The arguments of linear_cross_entropy and what is asked of them; included by cce_calls.h alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/core/check.h>
#include <ounce/kernels/cce/cce.h>
#include <ounce/kernels/common/implementation.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <utility>

namespace ounce::detail {

using CceOptions = LinearCrossEntropyOptions;

// What a call computes in.
inline at::ScalarType compute_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensors of a call, by reference.
struct CceInputs {
  const at::Tensor& hidden;
  const at::Tensor& weight;
  const at::Tensor& target;
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& token_weight;
  const std::optional<at::Tensor>& class_weight;
};

// Enumerations as the schema spells them.

template <class E>
struct Names {
  const char* option;
  std::array<std::pair<const char*, E>, 3> names;

  E parse(std::string_view text) const {
    for (const auto& [name, value] : names) {
      if (text == name) return value;
    }
    fail(Fault::kUsage, "[linear_cross_entropy] expected ", option, " = ", names[0].first, ", ",
         names[1].first, " or ", names[2].first, ", got '", text, "'");
  }
  const char* text(E value) const {
    for (const auto& [name, candidate] : names) {
      if (candidate == value) return name;
    }
    fail(Fault::kUsage, "[linear_cross_entropy] ", option, " = ", static_cast<int>(value),
         " is not one of its values");
  }
};

inline const Names<Reduction> kReductions = {
    "reduction",
    {{{"none", Reduction::kNone}, {"mean", Reduction::kMean}, {"sum", Reduction::kSum}}}};
inline const Names<GradMode> kGradModes = {"grad_mode",
                                           {{{"exact", GradMode::kExact},
                                             {"filter_hidden", GradMode::kFilterHidden},
                                             {"filter", GradMode::kFilter}}}};
inline const Names<Recompute> kRecomputes = {
    "recompute",
    {{{"auto", Recompute::kAuto}, {"never", Recompute::kNever}, {"always", Recompute::kAlways}}}};

inline void check_options(const CceOptions& o) {
  const auto unit = [](double x) { return x >= 0 && x <= 1; };
  OUNCE_CHECK(unit(o.label_smoothing()),
              "[linear_cross_entropy] expected label_smoothing in [0, 1], got ",
              o.label_smoothing());
  OUNCE_CHECK(o.z_loss() >= 0 && std::isfinite(o.z_loss()),
              "[linear_cross_entropy] expected z_loss >= 0, got ", o.z_loss());
  OUNCE_CHECK(o.softcap() >= 0 && std::isfinite(o.softcap()),
              "[linear_cross_entropy] expected softcap > 0, or 0 for none, got ", o.softcap());
  OUNCE_CHECK(std::isfinite(o.logit_scale()),
              "[linear_cross_entropy] expected a finite logit_scale, got ", o.logit_scale());
  OUNCE_CHECK(!o.filter_eps() || *o.filter_eps() > 0,
              "[linear_cross_entropy] expected filter_eps > 0, got ", o.filter_eps().value_or(0));
  OUNCE_CHECK(o.workspace_bytes() >= -1,
              "[linear_cross_entropy] expected workspace_bytes >= 0, or -1 for automatic, got ",
              o.workspace_bytes());
  OUNCE_CHECK(o.accum() == at::kFloat, "[linear_cross_entropy] expected accum = float32, got ",
              o.accum(), "; 64-bit inputs accumulate in 64 bits by themselves");
  check_implementation("linear_cross_entropy", o.implementation());
}

inline void check_same_device(const char* name, const at::Tensor& t, const at::Tensor& hidden) {
  OUNCE_CHECK(t.device() == hidden.device(), "[linear_cross_entropy] expected ", name, " on ",
              hidden.device(), ", got ", t.device(), "; move it there");
  OUNCE_CHECK(t.layout() == at::kStrided, "[linear_cross_entropy] expected ", name,
              " as a dense tensor, got layout ", t.layout());
}

inline void check_weights(const CceInputs& in, int64_t vocab) {
  if (in.bias) {
    check_same_device("bias", *in.bias, in.hidden);
    OUNCE_CHECK(in.bias->dim() == 1 && in.bias->size(0) == vocab,
                "[linear_cross_entropy] expected bias [V] with V = ", vocab, ", got ",
                in.bias->sizes());
    OUNCE_CHECK(in.bias->scalar_type() == in.weight.scalar_type(),
                "[linear_cross_entropy] expected bias of weight's dtype ", in.weight.scalar_type(),
                ", got ", in.bias->scalar_type());
  }
  if (in.token_weight) {
    check_same_device("token_weight", *in.token_weight, in.hidden);
    OUNCE_CHECK(
        in.token_weight->is_floating_point() && in.token_weight->sizes() == in.target.sizes(),
        "[linear_cross_entropy] expected token_weight floating, of target's shape ",
        in.target.sizes(), ", got ", in.token_weight->scalar_type(), " ", in.token_weight->sizes());
  }
  if (in.class_weight) {
    check_same_device("class_weight", *in.class_weight, in.hidden);
    OUNCE_CHECK(in.class_weight->is_floating_point() && in.class_weight->dim() == 1 &&
                    in.class_weight->size(0) == vocab,
                "[linear_cross_entropy] expected class_weight [V] floating with V = ", vocab,
                ", got ", in.class_weight->scalar_type(), " ", in.class_weight->sizes());
  }
}

// While the tensors are still the caller's.
inline void check_constants(const CceInputs& in) {
  OUNCE_CHECK(!in.token_weight || !in.token_weight->requires_grad(),
              "[linear_cross_entropy] expected token_weight without gradient; detach it, or weigh "
              "the losses of reduction = none");
  OUNCE_CHECK(!in.class_weight || !in.class_weight->requires_grad(),
              "[linear_cross_entropy] expected class_weight without gradient; detach it");
}

inline void check_inputs(const CceInputs& in, const CceOptions& o) {
  const auto& [hidden, weight, target, bias, token_weight, class_weight] = in;
  check_options(o);
  OUNCE_CHECK(hidden.dim() >= 1 && hidden.is_floating_point() && hidden.layout() == at::kStrided,
              "[linear_cross_entropy] expected hidden [..., D], dense and floating, got ",
              hidden.scalar_type(), " ", hidden.sizes());
  OUNCE_CHECK(weight.dim() == 2 && weight.size(0) >= 1,
              "[linear_cross_entropy] expected weight [V, D] with V >= 1, got ", weight.sizes());
  const int64_t dim = hidden.size(-1), vocab = weight.size(0);
  OUNCE_CHECK(weight.size(1) == dim, "[linear_cross_entropy] expected weight [V, D] with D = ", dim,
              " as hidden has, got ", weight.sizes());
  check_same_device("weight", weight, hidden);
  const bool half = hidden.scalar_type() == at::kHalf || hidden.scalar_type() == at::kBFloat16;
  OUNCE_CHECK(
      weight.scalar_type() == hidden.scalar_type() || (half && weight.scalar_type() == at::kFloat),
      "[linear_cross_entropy] expected weight of hidden's dtype ", hidden.scalar_type(),
      half ? " or Float" : "", ", got ", weight.scalar_type());
  check_same_device("target", target, hidden);
  OUNCE_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt,
              "[linear_cross_entropy] expected target int64 or int32, got ", target.scalar_type());
  OUNCE_CHECK(target.sizes() == hidden.sizes().slice(0, hidden.dim() - 1),
              "[linear_cross_entropy] expected target of hidden's shape without D, ",
              hidden.sizes().slice(0, hidden.dim() - 1), ", got ", target.sizes());
  if (const auto& main = o.main_grad(); main.defined()) {
    const auto type = compute_type(hidden);
    check_same_device("main_grad", main, hidden);
    OUNCE_CHECK(!main.requires_grad(),
                "[linear_cross_entropy] expected main_grad without a gradient of its own");
    const bool aligned = reinterpret_cast<uintptr_t>(main.const_data_ptr()) % 16 == 0;
    OUNCE_CHECK(aligned,
                "[linear_cross_entropy] expected main_grad at a multiple of 16 bytes, got a view "
                "that begins between; copy it, or begin the view elsewhere");
    OUNCE_CHECK(
        main.sizes() == weight.sizes() && main.scalar_type() == type && main.is_contiguous(),
        "[linear_cross_entropy] expected main_grad contiguous, ", type, " ", weight.sizes(),
        ", got ", main.scalar_type(), " ", main.sizes(), " with strides ", main.strides());
  }
  const int64_t length = target.dim() > 0 ? target.size(-1) : 1;
  OUNCE_CHECK(o.shift() == 0 || (o.shift() > 0 && o.shift() < length),
              "[linear_cross_entropy] expected 0 <= shift < T = ", length, ", got ", o.shift());
  check_weights(in, vocab);
}

}  // namespace ounce::detail
