// SPDX-License-Identifier: MIT
// What low-rank optimizers are made of: fixed orthonormal bases, the choice of the basis vectors
// that hold most of a gradient, projection onto them and back (DCT-AdamW and Trion, Modoranu et al.
// 2025, arXiv 2505.17967), and the orthonormalisation of Muon (Jordan et al. 2024) by products
// alone.
//
// For a matrix g [R, C] and a basis of vectors b_0 .. b_{n-1}:
//
//   side right, n = C:   s_j = g b_j       a = g Q     g ~ a Q^T     Q [C, rank] = (b_j, j in I)
//   side left,  n = R:   s_j = b_j^T g     a = Q^T g   g ~ Q a       Q [R, rank]
//
// `auto` is right where R >= C, else left: the smaller side is compressed. Everything is computed
// in fp32 (fp64 for fp64) and, where it returns gradients, rounded once to the input's dtype. No
// basis is kept: vectors are made from their numbers.
//
// For Python: torch.ops.ounce.{dct_basis, dct_rank, dct_select, dct_project, dct_backproject,
// newton_schulz}. None of them is differentiable.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

namespace ounce::optim {

enum class Basis {
  kDct2,      // b_k[i] = c_k sqrt(2/n) cos(pi k (2i+1) / (2n)), c_0 = 1/sqrt(2), else 1
  kDct3,      // its transpose: b_i[k]
  kIdentity,  // the rows or columns themselves
  kHadamard,  // signs / sqrt(n), n a power of two, in the order of Sylvester's construction
  kRandom,    // a fixed draw for each n from all rotations; n^3 work at every call
};
std::string_view text(Basis basis);
Basis parse_basis(std::string_view name);  // dct2 | dct3 | identity | hadamard | random

enum class Side { kAuto, kLeft, kRight };
std::string_view text(Side side);
Side parse_side(std::string_view name);  // auto | left | right

// How newton_schulz() takes the singular values towards 1.
enum class Iteration {
  kQuintic,       // a x + b x^3 + c x^5 with Muon's coefficients: into about [0.7, 1.2] in 5 steps
  kPolarExpress,  // the best quintic of each step (Amsel et al. 2025, arXiv 2505.16932), to 1
  kGram,          // kQuintic on the products of the smaller side alone: the same result
};
std::string_view text(Iteration iteration);
Iteration parse_iteration(std::string_view name);  // quintic | polar_express | gram

// [n, n], a basis vector a row, made in fp64 and rounded to the dtype of `options`.
at::Tensor dct_basis(int64_t n, Basis kind, const at::TensorOptions& options);

// [n] fp32 (fp64): the L1 or L2 norm of every s_j; norm = 1 or 2.
at::Tensor dct_rank(const at::Tensor& g, Side side, int64_t norm, Basis basis);

// The `rank` largest of those, [rank] int32 ascending; of equal ones the first. And the share of
// g's square sum that they hold, a scalar; 0 for g = 0. With norm = 2 no other choice holds more.
std::tuple<at::Tensor, at::Tensor> dct_select(const at::Tensor& g, int64_t rank, Side side,
                                              int64_t norm, Basis basis);

// a [R, rank] or, left, [rank, C].
at::Tensor dct_project(const at::Tensor& g, const at::Tensor& indices, Side side, Basis basis);

// a Q^T or Q a, whose projected side has n entries. `auto` is refused: a's shape does not tell.
at::Tensor dct_backproject(const at::Tensor& a, const at::Tensor& indices, int64_t n, Side side,
                           Basis basis);

// U V^T, nearly, of x = U S V^T, [..., R, C]; each matrix on its own; 0 stays 0. bf16 matrices on a
// GPU are multiplied in fp16 once they are scaled, nearer to fp32 than bf16 would be, and there
// those of two steps and of every three go together by their Gram matrices where these are much
// smaller or kGram asks for it. Whoever moves x in lets its memory go when it is no longer read.
at::Tensor newton_schulz(at::Tensor x, int64_t steps, Iteration kind);

}  // namespace ounce::optim
