// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/ATen.h>

#include <limits>

namespace ounce::test {

// RMS(x - reference) / RMS(reference) in fp64; the numerator alone where the reference is 0, 0 for
// no elements, infinity for other sizes.
inline double rms_error(const at::Tensor& x, const at::Tensor& reference) {
  if (x.sizes() != reference.sizes()) return std::numeric_limits<double>::infinity();
  if (x.numel() == 0) return 0;
  const auto ref = reference.detach().to(at::kDouble);
  const auto rms = [](const at::Tensor& t) { return t.square().mean().sqrt().item<double>(); };
  const double difference = rms(x.detach().to(at::kDouble) - ref), scale = rms(ref);
  return scale > 0 ? difference / scale : difference;
}

}  // namespace ounce::test
