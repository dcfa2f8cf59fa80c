// SPDX-License-Identifier: MIT
#include <ounce/kernels/cce/cce.h>
#include <torch/torch.h>

#include "bench.h"

namespace ounce::bench {

namespace {

// Linear layer and cross-entropy over n tokens, width d, vocabulary v.
Case cce_case(const std::string& name, int64_t n, int64_t d, int64_t v, at::ScalarType dtype) {
  Case result;
  result.family = "cce";
  result.name = name;
  result.shape = "N" + std::to_string(n) + " D" + std::to_string(d) + " V" + std::to_string(v);
  result.dtype = dtype;
  result.make = [=](at::Device device) {
    const auto hidden = random_leaf({n, d}, dtype, device);
    const auto weight = random_leaf({v, d}, dtype, device, 1 / std::sqrt(double(d)));
    const auto target = torch::randint(v, {n}, at::TensorOptions(device).dtype(at::kLong));
    Job job;
    if (name == "eager") {
      job.forward = [=] {
        return at::cross_entropy_loss(at::linear(hidden, weight).to(at::kFloat), target);
      };
    } else {
      job.forward = [=] { return linear_cross_entropy(hidden, weight, target).loss; };
    }
    job.inputs = {hidden, weight};
    const double product = 2.0 * double(n) * double(d) * double(v);
    job.forward_work = {product, bytes_of({hidden, weight, target})};
    // One that keeps no logits has a third product to make.
    job.backward_work = {2 * product, 2 * bytes_of({hidden, weight})};
    return job;
  };
  return result;
}

}  // namespace

std::vector<Case> cce_cases(at::Device device) {
  std::vector<Case> cases;
  const auto dtype = device.is_cuda() ? at::kBFloat16 : at::kFloat;
  const std::vector<std::vector<int64_t>> shapes =
      device.is_cuda()
          ? std::vector<std::vector<int64_t>>{{8192, 2304, 256000}, {8192, 2048, 32768}}
          : std::vector<std::vector<int64_t>>{{2048, 256, 8192}, {8192, 256, 256}};
  for (const auto& s : shapes) {
    for (const char* name : {"linear_cross_entropy", "eager"}) {
      cases.push_back(cce_case(name, s[0], s[1], s[2], dtype));
    }
  }
  return cases;
}

}  // namespace ounce::bench
