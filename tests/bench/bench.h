// SPDX-License-Identifier: MIT
// The frame of the benchmarks: a case makes its tensors and says what it computes; the frame times
// it, and compares with what the same machine's memory and matrix units did in the same run.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace ounce::bench {

// Least work of one pass: what no implementation of the same function can avoid.
struct Work {
  double flops = 0;  // multiply-add = 2
  double bytes = 0;  // inputs read once, outputs written once
};

// A case with its tensors on a device.
struct Job {
  std::function<at::Tensor()> forward;
  std::vector<at::Tensor> inputs = {};  // differentiated; empty = forward only
  Work forward_work = {}, backward_work = {};
};

struct Case {
  std::string family, name, shape;
  at::ScalarType dtype = at::kFloat;
  std::function<Job(at::Device)> make;
};

// Cases sized for the device: bench_F.cpp defines one of these, main.cpp lists them.
std::vector<Case> cce_cases(at::Device device);
std::vector<Case> gla_cases(at::Device device);
std::vector<Case> norm_cases(at::Device device);
std::vector<Case> train_cases(at::Device device);

// A leaf of unit variance that requires a gradient.
at::Tensor random_leaf(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device,
                       double scale = 1);
double bytes_of(const std::vector<at::Tensor>& tensors);

// Rates of this machine, measured.
struct Rates {
  double copy_bytes = 0;    // read + written, bytes a second
  double matmul_flops = 0;  // of the dtype the cases use on this device
  double disk_bytes = 0;    // written and flushed
};
Rates measure_rates(at::Device device, at::ScalarType dtype);

struct Timing {
  double forward = 0, backward = 0, both = 0;  // seconds, medians; backward 0 without one
  int repeats = 0;
  int64_t peak_bytes = 0;  // over what was alive before the pass
};
// Warm-up, then rounds until `seconds` are over (3 at least, 100 at most); 0 = one round, only to
// see that a case runs.
Timing measure(const Job& job, at::Device device, double seconds);

// Seconds of `body`, by events on a GPU and by the clock on a CPU.
double seconds_of(const std::function<void()>& body, at::Device device);
double median(std::vector<double> values);

}  // namespace ounce::bench
