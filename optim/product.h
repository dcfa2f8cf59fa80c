// SPDX-License-Identifier: MIT
// A product of batches of matrices and what is added to it.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace ounce::optim {

// alpha a b + beta c + diagonal I
struct Product {
  at::Tensor a, b;  // [count, m, k], [count, k, n]
  at::Tensor c;     // [count, m, n], or undefined: 0
  double alpha = 1, beta = 0, diagonal = 0;
  bool symmetric = false;                   // the result equals its transpose
  std::optional<at::ScalarType> type = {};  // of the result; that of a
};

// Undefined where there is no kernel: it takes bf16 and fp16 on Hopper, sides of 8 n.
at::Tensor fused_product(const Product& product);

}  // namespace ounce::optim
