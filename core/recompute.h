// SPDX-License-Identifier: MIT
// Activation checkpointing (Chen et al. 2016): a part of the forward pass whose intermediate
// results are not kept, but computed again in the backward pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace ounce {

using RecomputeFunction = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

// Returns function(inputs) and keeps only `inputs` and `function` for the backward pass, which runs
// the function once more. Undefined inputs and outputs are passed on; outputs that are not floating
// point carry no gradient. Gradients of parameters that the function captures go to their .grad as
// in a plain backward pass, also where no input requires a gradient; then every floating-point
// output is marked as requiring one. Without grad mode it is a plain call.
//
// The second run sees what the first saw: the state of the CPU's generator and of the GPUs' that
// inputs are on (dropout takes the same mask; generators are afterwards as before), autocast, the
// deterministic flag, and nn::ForwardContext, which has to live until then. It runs on the stream
// of the first. So results and gradients are bit-identical to a plain call, with two exceptions of
// rounding: a gradient that several recomputed parts or earlier passes share is summed in .grad
// part by part, and autocast's cache of cast weights is not used within, so a weight used twice is
// cast twice.
//
// Calls may be nested. The function is called from a thread of autograd's on a GPU. It has to give
// the same number of outputs each time, must not write to its inputs, and what it captures must not
// change before the backward pass (parameters: the optimizer's step comes after). Throws
// Fault::kUsage: inputs changed in place, by the function or before the backward pass (named by
// their position); torch::autograd::grad, or backward with `inputs`, through it; double backward; a
// second backward pass without retain_graph.
std::vector<at::Tensor> recompute(RecomputeFunction function, std::vector<at::Tensor> inputs);

}  // namespace ounce
