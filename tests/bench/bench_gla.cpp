// SPDX-License-Identifier: MIT
#include <ounce/kernels/gla/gla.h>
#include <torch/torch.h>

#include "bench.h"

namespace ounce::bench {

std::vector<Case> gla_cases(at::Device device) {
  struct Shape {
    int64_t b, t, h, k, v;
  };
  const auto dtype = device.is_cuda() ? at::kBFloat16 : at::kFloat;
  const auto shapes = device.is_cuda()
                          ? std::vector<Shape>{{8, 2048, 4, 256, 512}, {4, 8192, 4, 128, 256}}
                          : std::vector<Shape>{{2, 1024, 4, 32, 64}, {1, 2048, 4, 64, 128}};
  std::vector<Case> cases;
  for (const auto& s : shapes) {
    Case result;
    result.family = "gla";
    result.name = "chunk_gla";
    result.shape = "B" + std::to_string(s.b) + " T" + std::to_string(s.t) + " H" +
                   std::to_string(s.h) + " K" + std::to_string(s.k) + " V" + std::to_string(s.v);
    result.dtype = dtype;
    result.make = [s, dtype](at::Device place) {
      const auto q = random_leaf({s.b, s.t, s.h, s.k}, dtype, place);
      const auto k = random_leaf({s.b, s.t, s.h, s.k}, dtype, place);
      const auto v = random_leaf({s.b, s.t, s.h, s.v}, dtype, place);
      const auto gate =
          torch::log_sigmoid(torch::randn({s.b, s.t, s.h, s.k}, at::TensorOptions(place)));
      const auto g = (gate / 16).detach().requires_grad_();
      Job job;
      job.forward = [=] { return std::get<0>(chunk_gla(q, k, v, g)); };
      job.inputs = {q, k, v, g};
      // State update and read-out of the recurrence: the form with the fewest operations.
      const double flops = 4.0 * double(s.b * s.t * s.h) * double(s.k) * double(s.v);
      const double bytes = bytes_of({q, k, v, g});
      job.forward_work = {flops, bytes + bytes_of({v})};
      job.backward_work = {2 * flops, 2 * bytes + bytes_of({v})};
      return job;
    };
    cases.push_back(std::move(result));
  }
  return cases;
}

}  // namespace ounce::bench
