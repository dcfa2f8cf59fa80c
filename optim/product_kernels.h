// SPDX-License-Identifier: MIT
// Products of batches of matrices of 16 bits on Hopper that sum in fp32 and round once, also where
// they are added to another matrix, and that make only half of what is symmetric: what iterations
// on Gram matrices are made of. No Torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ounce::optim {

// d = alpha a b + beta c + diagonal I, of `count` matrices one after the other, row-major, at
// multiples of 16 bytes; d is none of the others.
struct BatchedProduct {
  int64_t count = 0, m = 0, n = 0, k = 0;
  const void* a = nullptr;  // [m, k], or transposed: [k, m]
  const void* b = nullptr;  // [k, n], or transposed: [n, k]
  const void* c = nullptr;  // [m, n], or null: 0
  void* d = nullptr;        // [m, n]
  bool a_transposed = false, b_transposed = false;
  bool is_half = false;      // a, b and c are fp16, else bf16
  bool out_is_half = false;  // d
  bool symmetric = false;    // d = d^T: half of its tiles are mirrored, not computed
  float alpha = 1, beta = 0, diagonal = 0;
};

// Sides are multiples of 8 below 2^30; not both a and b are transposed.
bool can_multiply(const BatchedProduct& product);
// How long it takes, as multiples of something: a multiprocessor multiplies whole tiles.
double turns_of(const BatchedProduct& product, int processors);
// One launch. cudaErrorInvalidValue where can_multiply() says no.
cudaError_t multiply(const BatchedProduct& product, cudaStream_t stream);

}  // namespace ounce::optim
