// SPDX-License-Identifier: MIT
// Which vectors of a fixed orthonormal basis hold most of a matrix: the device side of low-rank
// optimizers that project on columns of a DCT matrix (arXiv 2505.17967). No Torch here. Pointers
// are of the device; nothing is allocated and nothing waits: every launch can be captured in a
// graph. Results do not depend on timing; they may differ in the last bits between GPUs.
//
// The DCT-II basis of length n: b_k[t] = c_k sqrt(2 / n) cos(pi k (2t + 1) / (2n)), c_0 =
// 1 / sqrt 2, else 1. The identity basis: b_k[t] = 1 where t = k.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ounce::optim {

enum class RankBasis { kDct2, kIdentity };

// What is added to a matrix on the way, and where the sum goes; all at multiples of 16 bytes.
struct RankAddend {
  const void* e = nullptr;        // [rows, columns]
  const float* scales = nullptr;  // of int8: [rows, columns / kInt8Block], of blocks of a row
  void* sum = nullptr;            // [rows, columns] bf16; may be e, or the gradient
  // Of bf16: the sum rounds stochastically, as in stochastic_rounding.h.
  const float* step = nullptr;  // a scalar: steps before this one
  uint64_t seed = 0;
};

// `count` matrices g_i [rows, columns], row-major without gaps. Projected are the rows' vectors
// (right: n = columns), or the columns' (left: n = rows). The arrays lie on the device.
struct RankBatch {
  int count = 0;
  int64_t rows = 0, columns = 0;
  bool right = true;
  // Read before the kernel in front has ended, which must not write it; the matrices it may.
  const void* const* gradient = nullptr;
  bool gradient_is_fp32 = false;  // else bf16
  // Every matrix begins at a multiple of 16 bytes. Where it is false, or a row is not a multiple of
  // 16 bytes, elements are read one by one.
  bool aligned = false;
  // What is ranked is sum = scale g + e, which is stored; null: g. Only where can_add().
  const RankAddend* addends = nullptr;
  bool addends_are_int8 = false;  // else bf16
  const float* scale = nullptr;   // a scalar, or null: 1
  const float* skip = nullptr;    // a scalar: nonzero stores nothing; null: 0

  constexpr int64_t length() const { return right ? columns : rows; }
  constexpr int64_t vectors() const { return right ? rows : columns; }
};

// Whether vectors of this length have a transform: products of 2, 3, 5, 7 and 11 from 2 to 8192.
// The identity takes any length.
bool can_rank(RankBasis basis, int64_t length);
// Whether addends of this batch have a kernel: rows of bf16 of some lengths.
bool can_add(RankBasis basis, const RankBatch& batch, bool absolutes);

// Bytes of `scratch` for rank(). `processors`: multiprocessors of the GPU.
int64_t rank_scratch(RankBasis basis, const RankBatch& batch, bool absolutes, int processors);

// squares [count, n]: the sum over a matrix's vectors of (vector . b_k)^2; absolutes [count, n], or
// null: of |vector . b_k|. fp32 arithmetic. Each matrix is read once, its transform is not stored.
// Two launches. cudaErrorInvalidValue where can_rank() or can_add() says no.
struct RankOutput {
  float *squares = nullptr, *absolutes = nullptr;
  void* scratch = nullptr;  // 16-byte aligned
};
cudaError_t rank(RankBasis basis, const RankBatch& batch, const RankOutput& out, int processors,
                 cudaStream_t stream);

// The `rank` largest of keys [count, n] for every matrix, at equal keys those of lower index; a NaN
// counts as the largest. n <= 65536.
struct Selection {
  int count = 0, n = 0, rank = 0;
  const float* keys = nullptr;     // squares or absolutes
  const float* squares = nullptr;  // [count, n]
  int* const* lists = nullptr;     // null, or each matrix's previous [rank] ascending, overwritten
  const float* skip = nullptr;     // a scalar, or null: 0
  int* indices = nullptr;          // [count, rank] ascending
  int* source = nullptr;           // [count, rank] or null: where the same index was, or -1
  float* energy = nullptr;  // [count] or null: the chosen share of the sum of squares; 0 of a sum 0
};
// Where *skip is not 0: indices = the previous (as they are without), source = 0 .. rank - 1,
// energy as it is.
cudaError_t select(const Selection& selection, cudaStream_t stream);

// out [rows, n] bf16 = rows of basis [n, n] bf16, both at multiples of 16 bytes, by indices [rows].
cudaError_t gather_rows(const void* basis, const int* indices, int64_t rows, int64_t n, void* out,
                        cudaStream_t stream);

}  // namespace ounce::optim
