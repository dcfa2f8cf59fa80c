// SPDX-License-Identifier: MIT
// Gradients of the exponentials that a filter keeps. A filter's tiles are kFilterTile tokens by as
// many entries of the vocabulary; the products walk along lists of those that are kept, and spend
// nothing on the others. No Torch here. Pointers are of the device.
#pragma once

#include <ounce/kernels/cce/cce_kernels.h>

namespace ounce::cce {

constexpr int kFilterTile = 128;
constexpr int kStripTiles = 64;  // tiles along the vocabulary that one block of find_kept looks at

constexpr int64_t filter_tiles(int64_t n) { return (n + kFilterTile - 1) / kFilterTile; }

// What the exponentials of rows [rows] relative to their anchors are probabilities with.
struct FilterRows {
  const BoxMass* boxes = nullptr;  // [>= ceil(vocab / kBoxColumns), rows]
  const float *anchor = nullptr, *lse = nullptr;
  const bool* counted = nullptr;
  const int* target = nullptr;  // -1 = none
};
// kept [filter_tiles(rows), filter_tiles(vocab)]: false where a tile holds no counted row's target
// and every counted row's probabilities are under eps; a counted row without a target keeps all.
// dropped [ceil(filter_tiles(vocab) / kStripTiles), rows]: the sum of a row's probabilities in the
// dropped tiles of each strip.
cudaError_t find_kept(int64_t rows, int64_t vocab, const FilterRows& filter, float eps, bool* kept,
                      float* dropped, cudaStream_t stream);

// The columns that are set in each row of a matrix, ascending, in list [rows, columns]; how many in
// count [rows]. Strides in elements.
struct KeptMatrix {
  const bool* kept = nullptr;
  int rows = 0, columns = 0;
  int row_stride = 0, column_stride = 0;
};
cudaError_t list_kept(const KeptMatrix& matrix, int* list, int* count, cudaStream_t stream);

// out [m, n] = left right, or + left right, over the kept tiles of the inner dimension: row m /
// kFilterTile of a list names them. bf16 matrices whose strides are multiples of 8; they and out
// 16-byte aligned, n a multiple of 8; summed in fp32. With parts > 1 each sums an equal share of
// every list, into out [parts, m, n].
struct KeptProduct {
  const void* left = nullptr;  // [m, inner], or [inner, m]
  bool left_is_transposed = false;
  const void* right = nullptr;  // [inner, n]
  int64_t left_stride = 0, right_stride = 0;
  int64_t m = 0, n = 0, inner = 0;
  const int *list = nullptr, *count = nullptr;
  int list_stride = 0;
  void* out = nullptr;
  bool out_is_fp32 = true;  // else bf16
  bool add = false;
  int parts = 1;
};
cudaError_t multiply_kept(const KeptProduct& product, int clusters, cudaStream_t stream);

// So many parts that no cluster idles long behind the others.
int parts_of(int64_t m, int64_t n, int clusters);

}  // namespace ounce::cce
