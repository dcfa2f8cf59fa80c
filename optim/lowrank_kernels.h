// SPDX-License-Identifier: MIT
// Low-rank optimizers on Hopper: the product that takes a gradient into the subspace of r chosen
// vectors, Adam there, and the product that brings the update back out, with the step of the
// parameters.
//
// A batch is `count` matrices [rows, columns] of one shape, each anywhere in memory, bf16,
// row-major and contiguous; data at multiples of 16 bytes, columns and n multiples of 8, fewer than
// 2^32 elements, the rank a multiple of 16 up to 256. With `right` the columns are projected: n =
// columns, longer = rows; otherwise n = rows, longer = columns, and a matrix is used transposed.
//
// What a kernel needs of each matrix, pointers and tensor maps, is an array in device memory, as
// cudaMalloc aligns it. The caller fills it on the host and copies it:
//   std::vector<ProjectMatrix> host(count);  // in pinned memory where the copy shall be async
//   for (i) fill(shape, tensors[i], &host[i]);
//   cudaMemcpyAsync(device, host.data(), ...);
//   project({.shape = shape, .matrices = device, ...}, stream);
//   adam({...}, stream);
//   backproject({...}, stream);
//
// Every launch takes its stream, allocates nothing, waits for nothing and can be captured in a
// graph. The tensor maps hold addresses: fill and copy again when a tensor moves.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace ounce::optim {

struct LowRankShape {
  int64_t rows, columns;
  bool right;
  int rank;
  int count;

  int64_t n() const { return right ? columns : rows; }
  int64_t longer() const { return right ? rows : columns; }
};

enum class Element { kBf16, kFp32, kInt8 };

// ---- a = x q^T, [longer, rank]; x a gradient or its transpose

// With `rest`, what a leaves of x, x - a q, in 8 bits: each kInt8Block neighbours of a row share a
// scale, their largest magnitude / 127; what is not finite makes that so. Where can_keep_rest().

// The pointers of one matrix, all to device memory.
struct ProjectTensors {
  const void* gradient = nullptr;  // [rows, columns] bf16
  const void* q = nullptr;         // [rank, n] bf16: the chosen vectors, one a row
  void* out = nullptr;             // [longer, rank] bf16: a
  void* rest = nullptr;            // [rows, columns] int8, or null
  float* scales = nullptr;         // of it, [rows, blocks]
};

struct ProjectMatrix {
  CUtensorMap gradient, q, out, rest;
  float* scales;
};

inline bool can_keep_rest(const LowRankShape& shape) { return shape.columns % 16 == 0; }

// On the host. cudaErrorInvalidValue where the tensors or the shape are none of the above.
cudaError_t fill(const LowRankShape& shape, const ProjectTensors& tensors, ProjectMatrix* matrix);

struct Project {
  LowRankShape shape;
  const ProjectMatrix* matrices = nullptr;  // device, [count]
  bool rest = false;                        // exactly where fill() was given one, for all of them
  const float* skip = nullptr;              // device, a scalar: nonzero changes nothing
};
cudaError_t project(const Project& project, cudaStream_t stream);

// ---- Adam on a, whose moments move with their columns first

// Of one matrix, all in device memory.
struct ProjectedAdamMatrix {
  const void* a = nullptr;  // [longer, rank] bf16
  void* u = nullptr;        // [longer, rank] bf16: the direction; may be a
  void* m = nullptr;        // [longer, rank], in place
  void* v = nullptr;
  const float* step = nullptr;  // a scalar: steps before this one
  uint64_t seed = 0;            // of what rounds m and v, as in rounding_streams.h
  // [rank]: where column j was in the previous choice, -1 = it was not. Null: where it is now.
  const int32_t* source = nullptr;
  // The sums of squares of x's products with the chosen vectors, [rank], or with `chosen` with all
  // n, and the numbers of the chosen ones. A new column's second moment begins with their mean,
  // weighed as if it had been there with that from the first step on. Null: with 0.
  const float* squares = nullptr;
  const int32_t* chosen = nullptr;
};

// With t = step + 1:
//   m = beta1 m + (1 - beta1) scale a;  v = beta2 v + (1 - beta2) (scale a)^2
//   u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
// with m and v as they are kept; of 16 bits these round stochastically.
struct ProjectedAdam {
  int count = 0, rank = 0;
  int64_t longer = 0;
  bool moments_are_fp32 = false;                  // else bf16
  const ProjectedAdamMatrix* matrices = nullptr;  // device, [count]
  const float* scale = nullptr;                   // device, a scalar; null = 1
  const float* skip = nullptr;                    // device, a scalar: nonzero changes nothing
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
};
// All at multiples of 16 bytes, the rank a multiple of 16 up to 256, fewer than 2^32 elements.
cudaError_t adam(const ProjectedAdam& adam, cudaStream_t stream);

// ---- p = keep p - lr factor (u q), with keep = decay - lr weight_decay; p [rows, columns]

struct BackprojectTensors {
  void* p = nullptr;            // [rows, columns]
  const void* u = nullptr;      // [longer, rank] bf16
  const void* q = nullptr;      // [rank, n] bf16
  const float* step = nullptr;  // with stochastic rounding: steps before this one
  uint64_t seed = 0;            // of that, as in stochastic_rounding.h
};

struct BackprojectMatrix {
  CUtensorMap p, u, q;
  const float* step;
  uint64_t seed;
};

// `p`: its elements, kBf16 or kFp32.
cudaError_t fill(const LowRankShape& shape, Element p, const BackprojectTensors& tensors,
                 BackprojectMatrix* matrix);

enum class Rounding {
  kNearest,
  kStochastic,  // the bits of round_stochastically() at step + 1
};

struct Backproject {
  LowRankShape shape;
  Element p = Element::kBf16;
  Rounding rounding = Rounding::kNearest;       // of bf16
  const BackprojectMatrix* matrices = nullptr;  // device, [count]
  const float* lr = nullptr;                    // device, a scalar; null = 1
  const float* skip = nullptr;                  // device, a scalar: nonzero leaves p
  float decay = 1, weight_decay = 0, factor = 1;
};
cudaError_t backproject(const Backproject& backproject, cudaStream_t stream);

}  // namespace ounce::optim
