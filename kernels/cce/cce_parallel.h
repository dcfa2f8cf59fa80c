// SPDX-License-Identifier: MIT
// linear_cross_entropy of a classifier whose rows lie on the ranks of a process group, for
// tensor-parallel training. Every rank brings the same hidden states and targets and its own rows.
//
// With lse_r over rank r's rows, L = log sum_r exp(lse_r), and a rank's share of what dloss/dlogits
// need of the others is exp(lse_r - L): forward gathers two numbers a token from each rank,
// backward sums hidden's gradient over the ranks, in fp32 (fp64 for fp64 inputs). All ranks get the
// same bits as far as the group's sums give them.
#pragma once

#include <ounce/kernels/cce/cce.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace ounce {

struct VocabShard {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  int64_t first = 0;  // of this rank's rows, counted over all ranks; every row is on one rank
};

// As linear_cross_entropy, but weight [rows of this rank, D] and bias are a shard, and targets
// count over all ranks. Hidden's gradient is the same on each rank; those of weight and bias are of
// its own rows. Each rank has one row at least, and calls forward and backward in the same order
// and for the same inputs' gradients, or the others wait for it. Without class weights, label
// smoothing, filter, return_correct, return_entropy, Recompute::kNever and create_graph: those
// throw Fault::kUsage.
LinearCrossEntropyOutput vocab_parallel_linear_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
    const VocabShard& shard, const std::optional<at::Tensor>& bias = {},
    const std::optional<at::Tensor>& token_weight = {},
    const LinearCrossEntropyOptions& options = {});

}  // namespace ounce
