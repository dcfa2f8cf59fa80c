// SPDX-License-Identifier: MIT
// Whole steps in a CUDA graph against the same steps outside of one.
#include <gtest/gtest.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/fused_adamw.h>
#include <ounce/optim/trion.h>
#include <torch/torch.h>

#ifdef OUNCE_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#include "support/devices.h"
#include "support/state_tensors.h"

namespace ounce::optim {

namespace {

using at::Tensor;

class StepGraph : public ounce::test::OnDevice {};
OUNCE_ON_GPU(StepGraph);

#ifdef OUNCE_WITH_CUDA

// Parameters and state after a step, and then some whose gradients, rate and skip change.
template <class O, class Options>
std::vector<Tensor> trained(const Options& options, const at::Device& device, bool in_graph) {
  torch::manual_seed(1);
  std::vector<Tensor> parameters;
  for (const auto& sizes : std::vector<std::vector<int64_t>>{
           {256, 128}, {256, 128}, {128, 320}, {1041, 1024}, {256, 704}, {40}}) {
    parameters.push_back(
        torch::randn(sizes, torch::device(device)).to(at::kBFloat16).requires_grad_());
    parameters.back().mutable_grad() = torch::empty_like(parameters.back());
  }
  const auto scalar = [&] { return torch::zeros({}, torch::device(device)); };
  const StepControl control = {.lr = scalar(), .grad_scale = scalar(), .skip = scalar()};
  const auto prepare = [&](int64_t step) {
    control.lr.fill_(0.01 * static_cast<double>(step + 1));
    control.grad_scale.fill_(0.5);
    control.skip.fill_(step == 3);
    for (const auto& p : parameters) p.mutable_grad().normal_();
  };
  O optimizer(parameters, options);
  prepare(0);
  optimizer.step(control);
  at::cuda::CUDAGraph graph;
  if (in_graph) {
    c10::cuda::device_synchronize();
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
    graph.capture_begin();
    optimizer.step(control);
    graph.capture_end();
  }
  for (int64_t step = 1; step < 6; ++step) {
    prepare(step);
    in_graph ? graph.replay() : optimizer.step(control);
  }
  for (const auto& [name, tensor] : ounce::test::state_tensors(optimizer)) {
    parameters.push_back(tensor);
  }
  return parameters;
}

template <class O, class Options>
void expect_same(const Options& options, const at::Device& device) {
  const auto plain = trained<O>(options, device, false), graph = trained<O>(options, device, true);
  ASSERT_EQ(plain.size(), graph.size());
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(at::equal(plain[i], graph[i])) << i;
}

#endif

TEST_P(StepGraph, IsTheSameStepBitForBit) {
#ifdef OUNCE_WITH_CUDA
  for (const auto residual : {Residual::kNone, Residual::kErrorFeedback}) {
    DctAdamWOptions o;
    o.rank = 32;
    o.residual = residual;
    o.residual_type = ResidualType::kInt8;
    o.state_dtype = at::kBFloat16;
    o.implementation = "fused";
    expect_same<DctAdamW>(o, device());
  }
  TrionOptions trion;
  trion.rank = 32;
  trion.implementation = "fused";
  expect_same<Trion>(trion, device());
  MuonOptions muon;
  muon.implementation = "fused";
  expect_same<Muon>(muon, device());
  AdamWOptions adamw;
  adamw.state_dtype = at::kBFloat16;
  expect_same<FusedAdamW>(adamw, device());
#endif
}

}  // namespace

}  // namespace ounce::optim
