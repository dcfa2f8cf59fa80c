// SPDX-License-Identifier: MIT
// Tests that run on the CPU and on a GPU:
//
//   class Sum : public ounce::test::OnDevice {};
//   OUNCE_ON_EACH_DEVICE(Sum);
//   TEST_P(Sum, OfOnes) { EXPECT_EQ(torch::ones({3}, device()).sum().item<float>(), 3); }
//
// are Sum.OfOnes/cpu and Sum.OfOnes/cuda: the record of GPU tests counts them by that ending.
// Without a GPU the second is skipped, which OUNCE_REQUIRE_CUDA=1 makes a failure.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

namespace ounce::test {

class OnDevice : public testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override {
    if (on_gpu() && !torch::cuda::is_available()) GTEST_SKIP() << "there is no GPU";
    torch::manual_seed(7);
  }
  bool on_gpu() const { return GetParam() == at::kCUDA; }
  at::Device device() const { return GetParam(); }
};

}  // namespace ounce::test

#define OUNCE_ON_GPU(suite)                                       \
  INSTANTIATE_TEST_SUITE_P(, suite, ::testing::Values(at::kCUDA), \
                           [](const auto&) { return "cuda"; })

#define OUNCE_ON_EACH_DEVICE(suite)                                                        \
  INSTANTIATE_TEST_SUITE_P(, suite, ::testing::Values(at::kCPU, at::kCUDA),                \
                           [](const ::testing::TestParamInfo<at::DeviceType>& info) {      \
                             return std::string(info.param == at::kCUDA ? "cuda" : "cpu"); \
                           })
