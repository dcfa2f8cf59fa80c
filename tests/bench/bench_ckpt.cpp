// SPDX-License-Identifier: MIT
#include <c10/core/impl/VirtualGuardImpl.h>
#include <ounce/ckpt/checkpointer.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/optim/fused_adamw.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <thread>

#include "bench.h"
#include "bench_ckpt.h"

namespace ounce::bench {

namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

struct Cell {
  const char* name;
  int64_t matrices;  // fp32, with AdamW moments
  double pass_ms;    // of forward and backward
  int64_t every;     // steps from save to save
  int saves;
};
constexpr Cell kCells[] = {{"50ms-every1", 24, 50, 1, 5},
                           {"150ms-every10", 24, 150, 10, 5},
                           {"700ms-every50", 24, 700, 50, 3},
                           {"large-700ms-every50", 90, 700, 50, 3}};
constexpr int kBaseSteps = 15;
constexpr int64_t kLeastSteps = 3;  // behind a save, also where it is durable at once

// The compute stream alone: copies of a save run beside it.
void finish(at::Device device) {
  if (!device.is_cuda()) return;
  const c10::impl::VirtualGuardImpl gpu(device.type());
  gpu.synchronizeStream(gpu.getStream(device));
}

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double rate_of_dd(const std::string& ends, int64_t blocks) {
  const auto line = "dd " + ends + " bs=32M count=" + std::to_string(blocks) + " 2>/dev/null";
  const auto start = Clock::now();
  if (std::system(line.c_str()) != 0) return 0;
  return static_cast<double>(blocks * (32 << 20)) / since(start) / 1e9;
}

double rate_of_copies(at::Device device, bool to_host) {
  const int64_t block = 32 << 20, copies = 128;
  const auto on_device = at::empty({block}, at::TensorOptions(device).dtype(at::kByte));
  const auto on_host = at::empty({block}, at::TensorOptions(at::kByte).pinned_memory(true));
  const auto& from = to_host ? on_device : on_host;
  const auto& to = to_host ? on_host : on_device;
  const auto run = [&](int64_t count) {
    synchronize(device);
    const auto start = Clock::now();
    for (int64_t i = 0; i < count; ++i) to.copy_(from, /*non_blocking=*/true);
    synchronize(device);
    return since(start);
  };
  run(copies);
  return static_cast<double>(copies * block) / std::min(run(copies), run(copies)) / 1e9;
}

Json limits_here(at::Device device, bool tiny) {
  Json limits;
  if (device.is_cuda()) {
    limits["d2h_gb_s"] = rate_of_copies(device, true);
    limits["h2d_gb_s"] = rate_of_copies(device, false);
  }
  const int64_t blocks = tiny ? 2 : 128;
  limits["disk_write_gb_s"] = rate_of_dd("if=/dev/zero of=bench-dd oflag=direct", blocks);
  limits["disk_read_gb_s"] = rate_of_dd("if=bench-dd of=/dev/null iflag=direct", blocks);
  ::unlink("bench-dd");
  return limits;
}

// Peak of VmRSS while it lives, above what it was.
class PeakMemory {
 public:
  PeakMemory() : before_(now()), peak_(before_) {
    thread_ = std::thread([this] {
      for (; !over_; std::this_thread::sleep_for(std::chrono::milliseconds(20))) {
        peak_ = std::max<int64_t>(peak_, now());
      }
    });
  }
  ~PeakMemory() {
    over_ = true;
    thread_.join();
  }
  double extra_mb() const { return static_cast<double>(peak_ - before_) / 1e6; }

 private:
  static int64_t now() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
      if (line.starts_with("VmRSS:")) return std::stoll(line.substr(6)) * 1024;
    }
    return 0;
  }
  const int64_t before_;
  std::atomic<int64_t> peak_;
  std::atomic<bool> over_{false};
  std::thread thread_;
};

struct Step {
  Clock::time_point start;
  double whole = 0, pass = 0, item = 0;  // seconds
};

double middle(const std::vector<Step>& steps, double Step::*part) {
  std::vector<double> values;
  for (const auto& step : steps) values.push_back(step.*part);
  return median(values);
}

// Matmuls, then AdamW over `matrices` parameters; its state is what is saved.
class Loop : public Stateful {
 public:
  Loop(int64_t matrices, double pass_ms, at::Device device, bool tiny) : device_(device) {
    const int64_t n = tiny ? 64 : 4096, m = tiny ? 128 : 8192;
    const auto fp32 = at::TensorOptions(device).dtype(at::kFloat);
    for (int64_t i = 0; i < matrices; ++i) {
      parameters_.push_back(at::randn({n, n}, fp32).requires_grad_());
      parameters_.back().mutable_grad() = at::randn({n, n}, fp32) * 1e-3;
    }
    optimizer_.emplace(parameters_, optim::AdamWOptions{.lr = 1e-4});
    factor_ = at::randn({m, m}, fp32).to(at::kBFloat16);
    optimizer_->step();
    forward_backward();  // libraries load
    std::vector<double> taken;
    for (const auto start = Clock::now(); taken.empty() || since(start) < (tiny ? 0 : 2);) {
      taken.push_back(forward_backward());
    }
    matmuls_ = tiny ? 1 : std::max<int64_t>(1, std::llround(pass_ms / 1e3 / median(taken)));
  }

  void visit_state(StateVisitor& visitor) override {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      visitor.tensor("model/w" + std::to_string(i), parameters_[i], StateClass::kStep);
    }
    const auto scope = visitor.scope("optim");
    optimizer_->visit_state(visitor);
  }

  double bytes() const {
    return bytes_of(parameters_) + static_cast<double>(optimizer_->state_bytes());
  }
  void gate_with(ckpt::Checkpointer& checkpoints) {
    optimizer_->before_update([&](at::TensorList bucket) { checkpoints.before_mutation(bucket); });
  }
  void ungate() { optimizer_->before_update(nullptr); }
  at::Tensor first() const { return parameters_[0].detach().clone(); }

  double forward_backward() {
    finish(device_);
    const auto start = Clock::now();
    for (int64_t i = 0; i < matmuls_; ++i) product_ = at::mm(factor_, factor_);
    finish(device_);
    return since(start);
  }

  Step step() {
    Step taken{.start = Clock::now()};
    taken.pass = forward_backward();
    const auto item = Clock::now();
    product_.view({-1})[0].item<float>();
    taken.item = since(item);
    optimizer_->step();
    finish(device_);
    taken.whole = since(taken.start);
    return taken;
  }

 private:
  at::Device device_;
  std::vector<at::Tensor> parameters_;
  std::optional<optim::FusedAdamW> optimizer_;
  at::Tensor factor_, product_;
  int64_t matmuls_ = 1;
};

// Percent by which steps are slower than without a save; null where there were none.
Json slowdown(const std::vector<Step>& steps, double Step::*part, double base) {
  if (steps.empty()) return nullptr;
  return (middle(steps, part) / base - 1) * 100;
}

Json middle_of(const std::vector<Json>& rows, const char* key) {
  std::vector<double> values;
  for (const auto& row : rows) {
    if (row.at(key).is_number()) values.push_back(row.at(key));
  }
  return values.empty() ? Json() : Json(median(values));
}

Json one_save(Loop& loop, ckpt::Checkpointer& checkpoints, int64_t number, int64_t every,
              const Step& base) {
  const auto start = Clock::now();
  const auto ticket = checkpoints.save(number, {{"", &loop}});
  const double call = since(start);
  std::vector<Step> copying, flushing;
  double extra = 0;
  for (int64_t i = 0; i < every && (i < kLeastSteps || !ticket.finished()); ++i) {
    const bool captured = ticket.captured(), durable = ticket.durable(0);
    const auto step = loop.step();
    if (durable) continue;
    extra += step.whole - base.whole;
    (captured ? flushing : copying).push_back(step);
  }
  const auto waiting = Clock::now();
  const auto report = ticket.wait();
  const double wait = since(waiting);
  double item = 0;
  for (const auto& step : copying) item = std::max(item, step.item);
  return {{"blocked_ms", (call + extra) * 1e3},
          {"wait_ms", wait * 1e3},
          {"inside_ms", (report.blocked + report.stalled) * 1e3},
          {"call_ms", call * 1e3},
          {"captured_s", report.captured},
          {"durable_s", report.seconds},
          {"pool_mb", static_cast<double>(report.pool_bytes) / 1e6},
          {"cloned_gb", static_cast<double>(report.cloned_bytes) / 1e9},
          {"retries", report.retries},
          {"slowdown_copy_pct", slowdown(copying, &Step::pass, base.pass)},
          {"slowdown_flush_pct", slowdown(flushing, &Step::whole, base.whole)},
          {"item_copy_us", copying.empty() ? Json() : Json(item * 1e6)}};
}

Json restore(Loop& loop, const std::string& folder, const at::Tensor& saved, at::Device device) {
  {
    const torch::NoGradGuard guard;
    auto first = loop.first();
    struct Zero : StateVisitor {
      void tensor(std::string_view, at::Tensor& value, StateClass) override { value.zero_(); }
      void integer(std::string_view, int64_t&) override {}
      void number(std::string_view, double&) override {}
      void text(std::string_view, std::string&) override {}
      bool loading() const override { return false; }
    } zero;
    loop.visit_state(zero);
  }
  ::sync();
  std::ofstream drop("/proc/sys/vm/drop_caches");
  drop << "3\n" << std::flush;
  const bool cold = drop.good();
  synchronize(device);
  const auto start = Clock::now();
  const auto report = ckpt::load_checkpoint({folder}, {{"", &loop}});
  synchronize(device);
  const double seconds = since(start);
  return {{"restore_s", seconds},
          {"restore_gb_s", static_cast<double>(report.bytes) / seconds / 1e9},
          {"restore_cache", cold ? "cold" : "direct"},
          {"restored_what_was_saved", at::equal(loop.first(), saved)}};
}

Json run_cell(const Cell& cell, at::Device device, bool tiny) {
  const std::string folder = "bench-ckpt";
  std::filesystem::remove_all(folder);
  Loop loop(cell.matrices, cell.pass_ms, device, tiny);
  Json row{{"t", "ckpt"},
           {"peer", "ounce"},
           {"cell", cell.name},
           {"state_gb", loop.bytes() / 1e9},
           {"fb_ms", static_cast<int64_t>(cell.pass_ms)},
           {"every", cell.every}};
  std::vector<Step> steps;
  for (int i = 0; i < (tiny ? 3 : kBaseSteps); ++i) steps.push_back(loop.step());
  const Step base{.whole = middle(steps, &Step::whole),
                  .pass = middle(steps, &Step::pass),
                  .item = middle(steps, &Step::item)};
  at::Tensor saved;
  {
    const PeakMemory memory;
    ckpt::Checkpointer checkpoints({.levels = {{.path = folder, .keep_last = 1}}});
    loop.gate_with(checkpoints);
    const auto pinning = Clock::now();
    checkpoints.prepare({{"", &loop}});
    row["prepare_ms"] = since(pinning) * 1e3;
    for (int i = 0; i < (tiny ? 2 : 5); ++i) loop.step();  // the pool gets ready beside them
    std::vector<Json> rows;
    for (int save = 0; save < (tiny ? 2 : cell.saves); ++save) {
      saved = loop.first();
      rows.push_back(one_save(loop, checkpoints, save, cell.every, base));
    }
    for (const auto& item : rows[0].items()) row[item.key()] = middle_of(rows, item.key().c_str());
    row["saves"] = rows.size();
    row["step_ms"] = base.whole * 1e3;
    row["item_us"] = base.item * 1e6;
    row["extra_rss_mb"] = memory.extra_mb();
    loop.ungate();
  }
  row.update(restore(loop, folder, saved, device));
  std::filesystem::remove_all(folder);
  return row;
}

void show(const Json& row) {
  const auto number = [&](const char* key) {
    return row.at(key).is_number() ? row.at(key).get<double>() : NAN;
  };
  std::printf(
      "ckpt     %-20s %6.2f GB | step %7.1f ms | blocked %8.2f ms (inside %7.2f) | captured "
      "%.3f s | durable %6.2f s | copy %+.1f%% flush %+.1f%% | RSS %+.0f MB | restore %.2f s "
      "%.2f GB/s | item %.0f us, in the copy %.0f\n",
      row.at("cell").get<std::string>().c_str(), number("state_gb"), number("step_ms"),
      number("blocked_ms"), number("inside_ms"), number("captured_s"), number("durable_s"),
      number("slowdown_copy_pct"), number("slowdown_flush_pct"), number("extra_rss_mb"),
      number("restore_s"), number("restore_gb_s"), number("item_us"), number("item_copy_us"));
  std::fflush(stdout);
}

}  // namespace

void run_ckpt(at::Device device, bool tiny, const std::function<void(const Json&)>& emit) {
  // On a CPU the matmuls alone would take minutes.
  const bool small = tiny || device.is_cpu();
  for (const auto& cell : kCells) {
    // Beside each cell: what a disk and a bus give changes within minutes.
    const auto limits = limits_here(device, tiny);
    auto row = run_cell(cell, device, small);
    show(row);
    std::printf("         limits:");
    for (const auto& [key, value] : limits.items()) {
      std::printf(" %s %.2f", key.c_str(), value.get<double>());
    }
    std::printf("\n");
    row.update(limits);
    emit(row);
  }
}

}  // namespace ounce::bench
