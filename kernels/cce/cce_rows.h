// SPDX-License-Identifier: MIT
// Between the passes over the logits and the products: work on rows. No Torch here. Pointers are of
// the device.
#pragma once

#include <ounce/kernels/cce/cce_kernels.h>

namespace ounce::cce {

constexpr float kLog2e = 1.4426950408889634f;

// sums [rows] += the slots that a pass has left of each row; only the pairs of tiles that `only`
// names, where it is given.
cudaError_t add_slots(const Logits& logits, const Partial* slots, Partial* sums, const int* only,
                      cudaStream_t stream);
cudaError_t add_slots(const Logits& logits, const float* slots, float* sums, const int* only,
                      cudaStream_t stream);
cudaError_t add_slots(const Logits& logits, const AnchoredSum* slots, AnchoredSum* sums,
                      const int* only, cudaStream_t stream);

// lse, and nll = lse - target's logit without cancellation; [rows].
cudaError_t finish_rows(int64_t rows, const Partial* sums, const float* target_logit, float* lse,
                        float* nll, cudaStream_t stream);
cudaError_t finish_rows(int64_t rows, const float* anchor, const AnchoredSum* sums,
                        const float* target_logit, float* lse, float* nll, cudaStream_t stream);

// Where a row's exponentials are too large for their anchor: again [pairs of tiles] = 1, the
// anchor becomes its largest logit, and the pair's sums start anew.
cudaError_t find_overflow(int64_t rows, float* anchor, AnchoredSum* sums, const float* target_logit,
                          int* again, cudaStream_t stream);

// dloss/dlogits = scale_m e_mj, where e are the exponentials with the entry at the target put in:
// at_target_m / scale_m. The same gradient is e scaled from one side: for the classifier's the
// hidden state is scaled, for the hidden state's its sum, with the target's share in fp32.
struct Scaling {
  const float* factor = nullptr;     // [rows] as LogitGradient's
  const float* at_target = nullptr;  // [rows]
  const float* anchor = nullptr;
  const AnchoredSum* sums = nullptr;
  const float* target_logit = nullptr;
};
// scaled [rows, dim] bf16 = scale_m x_m; `exponentials` gets the target's entries; scale [rows];
// entry [rows]: the target's entry, less what rounding added to the others.
cudaError_t scale_rows(const Logits& logits, const Scaling& scaling, const Exponentials& e,
                       void* scaled, float* scale, float* entry, cudaStream_t stream);

// out [rows, dim] = scale_m (sum_m + entry_m C_y); scale null = 1.
struct HiddenGradient {
  const float* sum = nullptr;  // [rows, dim], sum_stride elements between rows; may be out
  int64_t sum_stride = 0;
  const float* scale = nullptr;  // [rows] or null
  const float* entry = nullptr;  // [rows]
  const void* weight = nullptr;  // [V, dim], rows contiguous, any alignment
  bool weight_is_fp32 = false;   // else bf16
  int64_t weight_stride = 0;
  const int* target = nullptr;  // [rows], -1 = none
  void* out = nullptr;
  bool out_is_fp32 = false;  // else bf16
};
cudaError_t finish_hidden(int64_t rows, int64_t dim, const HiddenGradient& gradient,
                          cudaStream_t stream);

// x [count] *= *factor, bf16 or fp32. A factor of 1 costs a launch.
cudaError_t scale_in_place(void* x, bool is_fp32, int64_t count, const float* factor,
                           cudaStream_t stream);

}  // namespace ounce::cce
