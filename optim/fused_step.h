// SPDX-License-Identifier: MIT
// Steps of many parameters in a few launches, on a GPU that this build knows: AdamW of anything,
// and AdamW in the subspace of chosen basis vectors (adamw_kernels.h, dct_rank_kernels.h,
// lowrank_kernels.h). Between those and the optimizers, whose composed steps define what is
// computed. fused_*_cuda.cpp hold it, fused_step_none.cpp stands in where it is not built.
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/optim/dct.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ounce::optim {

// A parameter and what its step needs, all on one device.
struct FusedTensor {
  at::Tensor parameter, gradient;  // of one shape and dtype, fp32 or bf16
  at::Tensor exp_avg, exp_avg_sq;  // fp32 or bf16, both alike
  at::Tensor step;                 // fp32 scalar
  uint64_t seed = 0;               // of stochastic rounding
  at::Tensor indices;              // [rank] int32, of low_rank() alone
  // Error feedback, of low_rank() alone: fp32, bf16, or int8 with scales as in int8_blocks.h.
  at::Tensor residual, residual_scales;
};

struct FusedSettings {
  at::Tensor lr;                // fp32 scalar
  at::Tensor grad_scale, skip;  // fp32 scalars, or undefined
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
  bool stochastic_rounding = true;  // of bf16 parameters; bf16 moments always are
  bool consume_gradients = false;   // as in StepControl
};

// As in DctAdamWOptions.
struct FusedLowRank {
  Basis basis = Basis::kDct2;
  int64_t norm = 2;
  bool transposed = false;  // the rows are projected
  bool chooses = true;      // this step chooses the columns
  bool rotate = true, estimate_fresh_columns = true;
  bool measures = false;
};

// A matrix [rows, columns] that Trion or Muon moves, contiguous; of a split, one of its parts.
struct FusedMomentum {
  at::Tensor parameter, gradient;  // fp32 or bf16
  at::Tensor momentum;             // fp32, or bf16, rounded stochastically
  at::Tensor step;                 // fp32 scalar, not counted by the step
  uint64_t seed = 0;
};
// As in TrionOptions.
struct FusedTrion {
  int64_t rank = 0;  // 0 = full
  Basis basis = Basis::kDct2;
  int64_t norm = 2;
  bool transposed = false;  // the rows are projected
  double momentum = 0.95;
  bool nesterov = false;  // of full rank
  int64_t ns_steps = 5;
  Iteration iteration = Iteration::kQuintic;
  double factor = 1;  // of the step
  bool measures = false;
};

class FusedSteps {
 public:
  FusedSteps();
  ~FusedSteps();

  // What keeps it from adamw() and, of a matrix that is projected, from low_rank(), and from
  // trion(); "" = nothing. An undefined gradient counts as one that has not come yet.
  static std::string why_not(const FusedTensor& tensor);
  static std::string why_not(const FusedTensor& tensor, const FusedLowRank& how);
  static std::string why_not(const FusedMomentum& matrix, const FusedTrion& how);

  // Tensors of the same dtypes, whose steps it counts.
  void adamw(const std::vector<FusedTensor>& tensors, const FusedSettings& settings);
  // Matrices of the same shape, rank and dtypes; count() their steps afterwards. Products take bf16
  // operands: fp32 gradients are rounded first, and so are the sums of gradients and residuals;
  // with int8 residuals these take the memory of bf16 gradients that may be consumed. Scratch: up
  // to 512 MiB, or one matrix's; a basis of each size stays. Where it chooses and measures: fp32
  // [matrices, 3], the square sums of what the columns hold of the gradient and of the gradient,
  // and how many columns are new. Else undefined.
  at::Tensor low_rank(std::vector<FusedTensor> tensors, const FusedLowRank& how,
                      const FusedSettings& settings);

  // Matrices of the same shape and dtypes; orthonormalised in fp16. Where a rank is measured: fp32
  // [matrices, 2], the square sums of what the columns hold of the momentum and of the momentum,
  // else undefined.
  at::Tensor trion(std::vector<FusedMomentum> matrices, const FusedTrion& how,
                   const FusedSettings& settings);
  // step += 1 of each, all on one device.
  void count(const std::vector<at::Tensor>& steps, const FusedSettings& settings);

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace ounce::optim
