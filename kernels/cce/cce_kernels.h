// SPDX-License-Identifier: MIT
// The device code of the family: what its launches take. No Torch here. Pointers are of the device;
// all matrices have their rows contiguous.
#pragma once

#include <cuda_runtime_api.h>
#include <ounce/kernels/cce/cce_plan.h>

#include <cstdint>

namespace ounce::cce {

// What every pass over the logits z [N, V] of a classifier, or of a slab of it, needs:
// u = scale (x C^T + bias), z = softcap tanh(u / softcap).
struct Logits {
  const void* hidden = nullptr;  // [rows, dim] bf16, 16-byte aligned
  const void* weight = nullptr;  // [vocab, dim] bf16, 16-byte aligned
  bool is_half = false;          // both, and what a pass writes, are fp16; not for exponentials()
  int64_t rows = 0, vocab = 0, dim = 0;
  int64_t hidden_stride = 0, weight_stride = 0;  // elements, multiples of 8
  const float* bias = nullptr;                   // [vocab] or null
  float scale = 1, softcap = 0;
  const int* target = nullptr;  // [rows], counted from this slab's first entry; null: none here
  Schedule schedule;
};

// Largest logit and sum of exponentials relative to it, both in powers of two.
struct Partial {
  float largest, sum;
};
// What more can be asked of a row's entries but the target.
struct Moments {
  float largest, sum;  // as Partial
  float product;       // sum of 2^d d, d the distance from the largest logit in powers of two
  float linear;        // sum of w_j z_j, the target's too
  float top, before;   // the largest z; that of the entries before the target
};

// Adds every row's entries but the target to sums [rows], which start as {-inf, 0}; puts the
// target's logit into target_logit [rows] where this slab has it. Scratch: schedule.partials()
// elements. bf16 only.
cudaError_t add_exponentials(const Logits& logits, Partial* partials, Partial* sums,
                             float* target_logit, cudaStream_t stream);
// The same for sums that start as {-inf, 0, 0, 0, -inf, -inf}. class_weight: 8-byte aligned, [vocab
// and zeros up to a whole tile], or null, which leaves `linear` 0.
cudaError_t add_moments(const Logits& logits, const float* class_weight, Moments* partials,
                        Moments* sums, float* target_logit, cudaStream_t stream);

// Of a row: dloss/dz = 2^l (factor + log_factor l) - flat w at the entries but the target, where l
// = z - base in powers of two and w is the entry's class weight.
struct RowFactors {
  float base, factor, log_factor, flat;
};

// out [rows, vocab] bf16, `out_stride` elements (a multiple of 8) between rows, 16-byte aligned:
// at_target_m at the target, dloss/dz (1 - (z / softcap)^2) elsewhere. The hidden state of a row
// with factors 0 must be finite, its base large.
struct LogitGradient {
  const RowFactors* rows = nullptr;     // [rows]
  const float* at_target = nullptr;     // [rows]
  bool general = false;                 // false: log_factor and flat are 0; fp16 needs true
  const float* class_weight = nullptr;  // as above; null where flat is 0
  void* out = nullptr;
  int64_t out_stride = 0;
};
// rounding [rows] += what rounding changed the row's sum by: with it the gradient of the hidden
// state can be made right where the classifier's rows have much in common. Scratch as above.
cudaError_t logit_gradient(const Logits& logits, const LogitGradient& gradient, float* partials,
                           float* rounding, cudaStream_t stream);

// Of a row's exponentials 2^(z - anchor), z in powers of two, without the target's: their sum, and
// what rounding to bf16 changed of the sum of what is made of them; where the sum is very large
// (over 1e15 for every 48 entries), the largest logit, in powers of two.
struct AnchoredSum {
  float largest, sum, rounding;
};

// Of kBoxColumns entries of a row, the first at a multiple of that: the largest exponential and
// their sum in bf16, without a softcap's slope and without the target's.
struct BoxMass {
  uint16_t largest, sum;
};

// out [rows, vocab] bf16 as above: 2^(z - anchor_m) (1 - (z / softcap)^2), 0 at the target. A row
// with anchor +inf is 0; its hidden state must be finite.
struct Exponentials {
  const float* anchor = nullptr;  // [rows], z in powers of two
  void* out = nullptr;
  int64_t out_stride = 0;
  BoxMass* boxes = nullptr;  // [schedule.tiles * 3, rows] or null
  // [pairs of tiles] or null: 0 leaves a pair's rows alone. All 0 costs a launch.
  const int* only = nullptr;
};
// Adds to sums [rows], which start as {-inf, 0, 0}; target_logit as above. Scratch:
// schedule.partials() elements.
cudaError_t exponentials(const Logits& logits, const Exponentials& exponentials,
                         AnchoredSum* partials, AnchoredSum* sums, float* target_logit,
                         cudaStream_t stream);

// Clusters of two blocks that the current device runs at a time; 0 where it is not a Hopper GPU.
int clusters_of_device();

}  // namespace ounce::cce
