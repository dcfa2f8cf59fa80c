// SPDX-License-Identifier: MIT
// The composed path, called by gla_ops.cpp with arguments it has checked. Not installed for users:
// gla.h is.
#pragma once

#include <ounce/kernels/gla/gla.h>

#include <tuple>

namespace ounce::gla {

using at::Tensor;

struct Inputs {
  Tensor q, k, v, g;
  Tensor initial_state;  // undefined = zeros
  Tensor cu_seqlens;     // undefined = one sequence a row
};

struct Gradients {
  Tensor q, k, v, g;
  Tensor initial_state;  // defined when Inputs::initial_state is
};

int64_t heads(const Inputs& in);      // of the output: max(Hq, Hv)
int64_t sequences(const Inputs& in);  // b, or what cu_seqlens holds
at::ScalarType compute_dtype(const Tensor& x);
// log a in fp32 or fp64.
Tensor log_decay(const Tensor& g, const GlaOptions& options);
double scale(const Inputs& in, const GlaOptions& options);

// (o, final state or undefined).
std::tuple<Tensor, Tensor> chunk_forward(const Inputs& in, const GlaOptions& options);
// `final_state` is the gradient of the final state, undefined = zeros.
Gradients chunk_backward(const Tensor& o, const Tensor& final_state, const Inputs& in,
                         const GlaOptions& options);
std::tuple<Tensor, Tensor> recurrent_forward(const Inputs& in, const GlaOptions& options);

}  // namespace ounce::gla
