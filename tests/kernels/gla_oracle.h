// SPDX-License-Identifier: MIT
// The oracle of gated linear attention: the recurrence in fp64, one sequence at a time,
// differentiated by autograd.
#pragma once

#include <gtest/gtest.h>
#include <ounce/kernels/gla/gla.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "support/rms_error.h"

namespace ounce::test {

using at::Tensor;
using ounce::GlaOptions;

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Call {
  Tensor q, k, v, g, h0;  // h0 undefined = none
  Tensor cu;              // undefined = dense
  GlaOptions options;

  Call on(at::Device device) const {
    Call out = *this;
    for (auto* x : {&out.q, &out.k, &out.v, &out.g, &out.h0, &out.cu}) {
      if (x->defined()) *x = x->to(device);
    }
    return out;
  }
};

struct Result {
  Tensor o, ht;
  std::vector<Tensor> grads;  // of q, k, v, g and h0 when defined
};

inline Tensor weighted_sum(const Tensor& a, const Tensor& b) { return (a * b).sum(); }

// Zeros where the loss does not depend on an input.
inline std::vector<Tensor> gradients(const Tensor& loss, const std::vector<Tensor>& inputs) {
  std::vector<Tensor> grads(inputs.size());
  if (loss.requires_grad()) {
    const std::vector<Tensor> losses{loss};
    grads = torch::autograd::grad(losses, inputs, {}, {}, false, /*allow_unused=*/true);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!grads[i].defined()) grads[i] = at::zeros_like(inputs[i]);
  }
  return grads;
}

// The definition, written out in fp64 for one sequence: q [t, H, K], g log decays, h0 [H, K, V].
inline std::pair<Tensor, Tensor> recurrence(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& g, const Tensor& h0, double scale,
                                            bool reverse) {
  auto state = h0;
  const int64_t t_count = q.size(0);
  std::vector<Tensor> out(t_count);
  for (int64_t i = 0; i < t_count; ++i) {
    const int64_t t = reverse ? t_count - 1 - i : i;
    state = g[t].exp().unsqueeze(-1) * state + at::einsum("hk,hv->hkv", {k[t], v[t]});
    out[t] = scale * at::einsum("hk,hkv->hv", {q[t], state});
  }
  auto o = t_count > 0 ? at::stack(out) : at::zeros({0, q.size(1), v.size(2)}, q.options());
  return {o, state};
}

// The oracle for a whole call: sequences cut out and run alone.
inline Result oracle(const Call& c, const Tensor& d_o, const Tensor& d_ht) {
  const auto& opt = c.options;
  std::vector<Tensor> leaves;
  for (const auto& x : {c.q, c.k, c.v, c.g, c.h0}) {
    leaves.push_back(x.defined() ? x.detach().to(at::kDouble).requires_grad_() : Tensor());
  }
  const int64_t heads = std::max(c.q.size(2), c.v.size(2)), heads_v = c.v.size(2);
  auto repeat = [&](const Tensor& x, int64_t dim) {
    return x.repeat_interleave(heads / x.size(dim), dim);
  };
  auto g = leaves[3];
  if (opt.gate == ounce::GlaGate::kLogSigmoidLogits) g = at::log_sigmoid(g) / opt.gate_normalizer;
  if (opt.clamp_min) g = g.clamp_min(*opt.clamp_min);
  const auto q = repeat(leaves[0], 2), k = repeat(leaves[1], 2), v = repeat(leaves[2], 2);
  g = repeat(g, 2);
  const double scale = opt.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  const bool v_first = opt.state_layout == ounce::GlaStateLayout::kVK;
  std::vector<Tensor> o, ht;
  auto run = [&](int64_t row, int64_t from, int64_t to, int64_t n) {
    auto h0 = at::zeros({heads, q.size(3), v.size(3)}, q.options());
    if (c.h0.defined()) {
      const auto own = v_first ? leaves[4][n].transpose(-1, -2) : leaves[4][n];
      h0 = repeat(own, 0);
    }
    auto part = [&](const Tensor& x) { return x[row].slice(0, from, to); };
    auto [out, last] = recurrence(part(q), part(k), part(v), part(g), h0, scale, opt.reverse);
    o.push_back(out);
    last = last.unflatten(0, {heads_v, -1}).select(1, 0);
    ht.push_back(v_first ? last.transpose(-1, -2) : last);
  };
  Result r;
  if (c.cu.defined()) {
    for (int64_t n = 0; n + 1 < c.cu.size(0); ++n) {
      run(0, c.cu[n].item<int64_t>(), c.cu[n + 1].item<int64_t>(), n);
    }
    r.o = at::cat(o, 0).unsqueeze(0);
  } else {
    for (int64_t b = 0; b < q.size(0); ++b) run(b, 0, q.size(1), b);
    r.o = at::stack(o);
  }
  r.ht = at::stack(ht);
  auto loss = weighted_sum(r.o, d_o.to(at::kDouble));
  if (d_ht.defined()) loss = loss + weighted_sum(r.ht, d_ht.to(at::kDouble));
  std::vector<Tensor> wanted(leaves.begin(), leaves.end() - (c.h0.defined() ? 0 : 1));
  r.grads = gradients(loss, wanted);
  return r;
}

using Function = decltype(&ounce::chunk_gla);

inline Result run(Function f, const Call& c, const Tensor& d_o, const Tensor& d_ht) {
  auto opt = [](const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; };
  std::vector<Tensor> leaves;
  for (const auto& x : {c.q, c.k, c.v, c.g, c.h0}) {
    if (x.defined()) leaves.push_back(x.detach().requires_grad_());
  }
  Result r;
  std::tie(r.o, r.ht) = f(leaves[0], leaves[1], leaves[2], leaves[3],
                          c.h0.defined() ? opt(leaves[4]) : std::nullopt, opt(c.cu), c.options);
  auto loss = weighted_sum(r.o, d_o.to(r.o.scalar_type()));
  if (d_ht.defined()) loss = loss + weighted_sum(r.ht, d_ht);
  r.grads = gradients(loss, leaves);
  return r;
}

// Runs f and the oracle with random gradients of o and of the final state; errors of o, ht, dq ..
inline void expect_close(Function f, Call c, double bound, const std::string& what) {
  c.options.output_final_state = true;
  const int64_t n = c.cu.defined() ? c.cu.size(0) - 1 : c.q.size(0);
  const int64_t heads = std::max(c.q.size(2), c.v.size(2));
  const bool v_first = c.options.state_layout == ounce::GlaStateLayout::kVK;
  const int64_t k = c.q.size(3), v = c.v.size(3);
  const auto wide = c.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto d_o = at::randn({c.q.size(0), c.q.size(1), heads, v}, c.v.options());
  const auto d_ht =
      at::randn({n, c.v.size(2), v_first ? v : k, v_first ? k : v}, c.q.options().dtype(wide));
  const auto ref = oracle(c, d_o, d_ht);
  const auto got = run(f, c, d_o, d_ht);
  EXPECT_EQ(got.o.scalar_type(), c.v.scalar_type());
  EXPECT_EQ(got.ht.scalar_type(), wide);
  const char* names[] = {"dq", "dk", "dv", "dg", "dh0"};
  double worst = std::max(rms_error(got.o, ref.o), rms_error(got.ht, ref.ht));
  EXPECT_LE(rms_error(got.o, ref.o), bound) << what << " o";
  EXPECT_LE(rms_error(got.ht, ref.ht), bound) << what << " ht";
  for (size_t i = 0; i < ref.grads.size(); ++i) {
    const double e = rms_error(got.grads[i], ref.grads[i]);
    EXPECT_LE(e, bound) << what << " " << names[i];
    EXPECT_TRUE(std::isfinite(e)) << what << " " << names[i];
    worst = std::max(worst, e);
  }
  testing::Test::RecordProperty(what, std::to_string(worst));
  if (bound > 1e-9)
    std::printf("  %-28s worst error %.2e, bound %.0e\n", what.c_str(), worst, bound);
}

inline Tensor gates(at::IntArrayRef shape, double normalizer, at::ScalarType dtype) {
  return (at::log_sigmoid(at::randn(shape, at::kDouble)) / normalizer).to(dtype);
}

inline Call make(int64_t b, int64_t t, int64_t h, int64_t k, int64_t v, double normalizer,
                 at::ScalarType dtype = at::kDouble, bool with_state = true) {
  Call c;
  c.q = at::randn({b, t, h, k}, dtype);
  c.k = at::randn({b, t, h, k}, dtype);
  c.v = at::randn({b, t, h, v}, dtype);
  c.g = gates({b, t, h, k}, normalizer, dtype);
  if (with_state) c.h0 = at::randn({b, h, k, v}, dtype == at::kDouble ? at::kDouble : at::kFloat);
  return c;
}

}  // namespace ounce::test
