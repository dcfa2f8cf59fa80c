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
cudaError_t add_slots(const Logits& logits, const Moments* slots, Moments* sums, const int* only,
                      cudaStream_t stream);
cudaError_t add_slots(const Logits& logits, const float* slots, float* sums, const int* only,
                      cudaStream_t stream);
cudaError_t add_slots(const Logits& logits, const AnchoredSum* slots, AnchoredSum* sums,
                      const int* only, cudaStream_t stream);

// --- tokens

struct TargetRows {
  const void* target = nullptr;  // [rows] int64 or int32
  bool is_int64 = true;
  int64_t ignore_index = 0, vocab = 0;
  const float* token_weight = nullptr;  // [rows] or null
  const float* class_weight = nullptr;  // [vocab] or null
};
// Of Tokens of cce_reference.h; `place` = target, -1 where a row has none in the vocabulary.
struct TokenRows {
  int* place = nullptr;
  bool* counted = nullptr;
  float *weight = nullptr, *hit_weight = nullptr;  // [rows]
  float* denominator = nullptr;                    // scalar
};
cudaError_t describe_tokens(int64_t rows, const TargetRows& targets, const TokenRows& tokens,
                            cudaStream_t stream);

// out [rows, out_dim] bf16: x [rows, dim] bf16 where `counted`, 0 elsewhere and behind dim.
cudaError_t copy_counted(int64_t rows, int64_t dim, const void* x, int64_t stride,
                         const bool* counted, void* out, int64_t out_dim, cudaStream_t stream);

// --- losses and their upstream

// The loss of a row, and what of it the row brings.
struct RowLoss {
  const bool* counted = nullptr;                         // [rows]
  const float *weight = nullptr, *hit_weight = nullptr;  // [rows]
  float smoothing = 0, z_loss = 0, softcap = 0, logit_scale = 1, vocab = 0;
  const float* class_sum = nullptr;  // sum of the class weights; null = vocab
};
// [rows], 0 where not counted; the last two, which only Moments give, may be null.
struct RowOutputs {
  float *lse = nullptr, *nll = nullptr, *loss = nullptr, *z_loss = nullptr;
  float* entropy = nullptr;
  bool* correct = nullptr;
};
// nll = lse - target's logit without cancellation.
cudaError_t finish_rows(int64_t rows, const RowLoss& loss, const Partial* sums,
                        const float* target_logit, const RowOutputs& out, cudaStream_t stream);
cudaError_t finish_rows(int64_t rows, const RowLoss& loss, const Moments* sums,
                        const float* target_logit, const RowOutputs& out, cudaStream_t stream);
cudaError_t finish_rows(int64_t rows, const RowLoss& loss, const float* anchor,
                        const AnchoredSum* sums, const float* target_logit, const RowOutputs& out,
                        cudaStream_t stream);

// Of the row's loss and, or null, of its lse and its entropy; stride 0 repeats a scalar.
struct RowUpstream {
  const float* loss = nullptr;
  int64_t loss_stride = 0;
  const float* lse = nullptr;
  int64_t lse_stride = 0;
  const float* entropy = nullptr;
  int64_t entropy_stride = 0;
};
// [rows], as forward gave them; entropy may be null where it has no upstream.
struct RowResults {
  const float *lse = nullptr, *nll = nullptr, *entropy = nullptr;
};
// What LogitGradient takes, [rows]. With `scale` [rows], for fp16: divided by it, so that entries
// are at most 2^14 and those of 2^-28 of that are normal numbers.
cudaError_t upstream_rows(int64_t rows, const RowLoss& loss, const RowUpstream& upstream,
                          const RowResults& results, RowFactors* factors, float* at_target,
                          float* scale, cudaStream_t stream);

// --- exponentials

// Everything as no logit has been seen; `anchored` may be null.
cudaError_t start_rows(int64_t rows, Partial* sums, AnchoredSum* anchored, float* target_logit,
                       cudaStream_t stream);
cudaError_t start_rows(int64_t rows, Moments* sums, float* target_logit, cudaStream_t stream);
// The largest logit of `sums`, +inf where not counted.
cudaError_t anchor_rows(int64_t rows, const Partial* sums, const bool* counted, float* anchor,
                        cudaStream_t stream);
// Where a row's exponentials are too large for their anchor: again [pairs of tiles] = 1, the
// anchor becomes its largest logit, and the pair's sums start anew.
cudaError_t find_overflow(int64_t rows, float* anchor, AnchoredSum* sums, const float* target_logit,
                          int* again, cudaStream_t stream);

// dloss/dlogits = scale_m e_mj, where e are the exponentials with the entry at the target put in:
// at_target_m / scale_m. The same gradient is e scaled from one side: for the classifier's the
// hidden state is scaled, for the hidden state's its sum, with the target's share in fp32.
struct Scaling {
  RowLoss loss;
  RowUpstream upstream;
  RowResults results;
  const float* target_logit = nullptr;
  const AnchoredSum* sums = nullptr;
};
// scaled [rows, dim] bf16, which may be x, = scale_m x_m; `exponentials` gets the target's entries;
// scale [rows]; entry [rows]: the target's entry, less what rounding added to the others.
cudaError_t scale_rows(const Logits& logits, const Scaling& scaling, const Exponentials& e,
                       void* scaled, float* scale, float* entry, cudaStream_t stream);

enum class Type { kBf16, kHalf, kFloat };
// out [rows, dim] = scale_m (sum_m + entry_m C_y); scale null = 1.
struct HiddenGradient {
  const float* sum = nullptr;  // [rows, dim], sum_stride elements between rows; may be out
  int64_t sum_stride = 0;
  const float* scale = nullptr;  // [rows] or null
  const float* entry = nullptr;  // [rows]
  const void* weight = nullptr;  // [V, dim], any alignment
  Type weight_type = Type::kBf16;
  int64_t weight_stride = 0, weight_column_stride = 1;
  const int* target = nullptr;  // [rows], -1 = none
  void* out = nullptr;
  Type out_type = Type::kBf16;
};
cudaError_t finish_hidden(int64_t rows, int64_t dim, const HiddenGradient& gradient,
                          cudaStream_t stream);

// x [count] *= *factor, bf16 or fp32. A factor of 1 costs a launch.
cudaError_t scale_in_place(void* x, bool is_fp32, int64_t count, const float* factor,
                           cudaStream_t stream);
// out [count] bf16 = *factor x, 16-byte aligned.
cudaError_t scale_to_bf16(const float* x, int64_t count, const float* factor, void* out,
                          cudaStream_t stream);

}  // namespace ounce::cce
