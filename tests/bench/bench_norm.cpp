// SPDX-License-Identifier: MIT
#include <ounce/kernels/norm/norm.h>
#include <torch/torch.h>

#include "bench.h"

namespace ounce::bench {

std::vector<Case> norm_cases(at::Device device) {
  const auto dtype = device.is_cuda() ? at::kBFloat16 : at::kFloat;
  const int64_t n = device.is_cuda() ? 16384 : 8192, d = device.is_cuda() ? 2048 : 512;
  std::vector<Case> cases;
  for (const bool add : {false, true}) {
    Case result;
    result.family = "norm";
    result.name = add ? "add_rms_norm" : "rms_norm";
    result.shape = "N" + std::to_string(n) + " D" + std::to_string(d);
    result.dtype = dtype;
    result.make = [=](at::Device place) {
      const auto x = random_leaf({n, d}, dtype, place);
      const auto delta = random_leaf({n, d}, dtype, place);
      const auto weight = random_leaf({d}, at::kFloat, place);
      Job job;
      const double one = bytes_of({x});
      if (add) {
        job.forward = [=] { return add_rms_norm(x, delta, weight).second; };
        job.inputs = {x, delta, weight};
        job.forward_work = {0, 4 * one};
        job.backward_work = {0, 3 * one};
      } else {
        job.forward = [=] { return rms_norm(x, weight); };
        job.inputs = {x, weight};
        job.forward_work = {0, 2 * one};
        job.backward_work = {0, 3 * one};
      }
      return job;
    };
    cases.push_back(std::move(result));
  }
  return cases;
}

}  // namespace ounce::bench
