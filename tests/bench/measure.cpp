// SPDX-License-Identifier: MIT
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fcntl.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "bench.h"

namespace ounce::bench {

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A point in time of a device's current stream.
class Mark {
 public:
  explicit Mark(at::Device device) : device_(device), event_(device.type(), kTimed) {}
  void set() {
    if (device_.is_cuda()) {
      event_.record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    } else {
      time_ = Clock::now();
    }
  }
  double since(Mark& start) {
    if (!device_.is_cuda()) return std::chrono::duration<double>(time_ - start.time_).count();
    event_.synchronize();
    return start.event_.elapsedTime(event_) / 1e3;
  }

 private:
  static constexpr auto kTimed = c10::EventFlag::BACKEND_DEFAULT;
  at::Device device_;
  c10::Event event_;
  Clock::time_point time_;
};

double disk_rate() {
  constexpr size_t kBlock = size_t{8} << 20, kBlocks = 32;
  char name[] = "bench-disk-XXXXXX";
  const int file = mkstemp(name);
  if (file < 0) return 0;
  unlink(name);
  std::vector<char> block(kBlock);
  for (size_t i = 0; i < kBlock; ++i) block[i] = static_cast<char>(i * 2654435761u >> 13);
  const auto start = Clock::now();
  bool good = true;
  for (size_t i = 0; i < kBlocks && good; ++i)
    good = write(file, block.data(), kBlock) == ssize_t(kBlock);
  good = good && fsync(file) == 0;
  const double seconds = since(start);
  close(file);
  return good ? kBlock * kBlocks / seconds : 0;
}

}  // namespace

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double seconds_of(const std::function<void()>& body, at::Device device) {
  Mark start(device), end(device);
  start.set();
  body();
  end.set();
  return end.since(start);
}

at::Tensor random_leaf(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device,
                       double scale) {
  return (torch::randn(sizes, at::TensorOptions().device(device)) * scale)
      .to(dtype)
      .detach()
      .requires_grad_();
}

double bytes_of(const std::vector<at::Tensor>& tensors) {
  double bytes = 0;
  for (const auto& tensor : tensors) bytes += static_cast<double>(tensor.nbytes());
  return bytes;
}

Rates measure_rates(at::Device device, at::ScalarType dtype) {
  const torch::NoGradGuard no_grad;
  const auto options = at::TensorOptions().device(device).dtype(dtype);
  const auto best_of = [&](int repeats, const std::function<void()>& body) {
    body();
    double best = 1e30;
    for (int i = 0; i < repeats; ++i) best = std::min(best, seconds_of(body, device));
    return best;
  };
  Rates rates;
  // Far past every cache.
  const int64_t elements =
      (device.is_cuda() ? int64_t{1} << 30 : int64_t{1} << 27) / elementSize(dtype);
  const auto from = torch::randn({elements}, options);
  auto to = torch::empty_like(from);
  rates.copy_bytes = 2.0 * static_cast<double>(from.nbytes()) / best_of(5, [&] { to.copy_(from); });
  const int64_t n = device.is_cuda() ? 8192 : 1024;
  const auto a = torch::randn({n, n}, options), b = torch::randn({n, n}, options);
  auto c = torch::empty_like(a);
  rates.matmul_flops =
      2.0 * double(n) * double(n) * double(n) / best_of(5, [&] { at::mm_out(c, a, b); });
  rates.disk_bytes = disk_rate();
  return rates;
}

Timing measure(const Job& job, at::Device device, double seconds) {
  std::vector<double> forward, backward, both;
  Timing timing;
  Mark start(device), middle(device), end(device);
  at::Tensor gradient;
  const auto pass = [&](bool count) {
    start.set();
    const auto result = job.forward();
    middle.set();
    if (!job.inputs.empty()) {
      if (!gradient.defined()) gradient = torch::randn_like(result);
      torch::autograd::grad({result}, job.inputs, {gradient}, /*retain_graph=*/false,
                            /*create_graph=*/false, /*allow_unused=*/true);
    }
    end.set();
    const double whole = end.since(start);
    if (!count) return;
    forward.push_back(middle.since(start));
    backward.push_back(job.inputs.empty() ? 0 : end.since(middle));
    both.push_back(whole);
  };
  const bool once = seconds == 0;
  if (!once) pass(false);
  synchronize(device);
  const auto before = memory_use(device).current;
  reset_peak_memory(device);
  pass(once);
  synchronize(device);
  timing.peak_bytes = memory_use(device).peak - before;
  for (const auto begin = Clock::now();
       !once && (both.size() < 3 || (since(begin) < seconds && both.size() < 100));) {
    pass(true);
  }
  timing.forward = median(forward);
  timing.backward = median(backward);
  timing.both = median(both);
  timing.repeats = static_cast<int>(both.size());
  return timing;
}

}  // namespace ounce::bench
