// SPDX-License-Identifier: MIT
// Cases for the fused path, and how near it has to come to the composed formula in fp64 on the same
// 16-bit inputs.
#pragma once

#include <gtest/gtest.h>
#include <ounce/core/device.h>
#include <torch/torch.h>

#include <cmath>

#include "kernels/cce_composed.h"
#include "support/devices.h"
#include "support/expect_error.h"
#include "support/rms_error.h"

namespace ounce::cce_test {

class OnFused : public test::OnDevice {
 protected:
  CceCase random_case(const std::vector<int64_t>& shape, int64_t dim, int64_t vocab,
                      at::ScalarType type = at::kBFloat16) const {
    auto c = cce_test::random_case(shape, dim, vocab, false).on(device()).as(type);
    c.options.implementation("fused");
    return c;
  }
};

inline double one_rounding(const at::Tensor& exact, at::ScalarType type = at::kBFloat16) {
  return test::rms_error(exact.to(type), exact);
}

// A gradient whose true value is 0 (V = 1) has no relative error.
inline double relative_to(const at::Tensor& ours, const at::Tensor& exact) {
  return exact.abs().max().item<double>() < 1e-12 ? ours.abs().max().item<double>()
                                                  : test::rms_error(ours, exact);
}

// The gradient of the hidden state errs by one rounding where a row's mass is spread; where a few
// entries carry it, by what rounding their dloss/dlogits adds, as every bf16 GEMM does.
constexpr double kSpread = 1.2, kPeaked = 1.8;

// With the gradients of what the options ask for. `scale` of all upstreams: fp16 gradients want
// one.
inline void expect_close(const CceCase& c, double hidden_bound, Recompute recompute,
                         double scale = 1) {
  const auto type = c.hidden.scalar_type();
  auto ours = c.as(type), exact = c.as(at::kDouble);
  const bool again = recompute == Recompute::kAlways;
  ours.options.recompute(recompute).return_lse(again).return_z_loss(true);
  const auto out = ours.run();
  const auto ref = composed(exact);
  EXPECT_EQ(out.loss.sizes(), ref.loss.sizes());
  EXPECT_LE(test::rms_error(out.loss, ref.loss), 1e-5);
  if (again) {
    EXPECT_LE(test::rms_error(out.lse, ref.lse), 1e-5);
  }
  EXPECT_LE(test::rms_error(out.z_loss, ref.z_loss), 1e-5);
  const auto lse = [&](const at::Tensor& t) { return again ? t * scale : at::Tensor(); };
  at::Tensor entropy, exact_entropy;
  if (c.options.return_entropy()) {
    EXPECT_LE(test::rms_error(out.entropy, ref.entropy), 2e-5);
    entropy = out.entropy * scale;
    exact_entropy = ref.entropy * scale;
  }
  backward(out.loss * scale, lse(out.lse), entropy);
  backward(ref.loss * scale, lse(ref.lse), exact_entropy);
  const auto hidden = exact.hidden.grad(), weight = exact.weight.grad();
  EXPECT_LE(relative_to(ours.hidden.grad(), hidden),
            hidden_bound * one_rounding(hidden, type) + 1e-6);
  // Forward's is scaled by the upstream after it was rounded.
  EXPECT_LE(relative_to(ours.weight.grad(), weight),
            (again ? 2 : 2.4) * one_rounding(weight, type) + 1e-6);
  if (!c.bias.defined()) return;
  const auto bias = exact.bias.grad();
  EXPECT_LE(relative_to(ours.bias.grad(), bias), 2 * one_rounding(bias, type) + 1e-6);
}
inline void expect_close(const CceCase& c, double hidden_bound) {
  for (const auto recompute : {Recompute::kNever, Recompute::kAlways}) {
    SCOPED_TRACE(recompute == Recompute::kNever ? "gradients in forward" : "in backward");
    expect_close(c, hidden_bound, recompute);
  }
}

}  // namespace ounce::cce_test
