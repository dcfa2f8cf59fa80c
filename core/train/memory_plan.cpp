// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/train/format.h>
#include <ounce/core/train/memory_plan.h>
#include <torch/torch.h>

#include <algorithm>

namespace ounce {

namespace {

struct Probe {
  int64_t rows, activations, extra;
};

Probe probe(Learner& learner, const data::Batch& batch, int64_t rows, bool keep_gradients,
            at::Device device) {
  synchronize(device);
  reset_peak_memory(device);
  const auto before = memory_use(device).current;
  const auto activations = learner.probe(slice_rows(batch, 0, rows), keep_gradients);
  return {rows, activations, memory_use(device).peak - before};
}

int64_t extrapolate(int64_t a, int64_t b, const Probe& first, const Probe& second, int64_t rows) {
  if (first.rows == second.rows) return b;
  const double slope = static_cast<double>(b - a) / static_cast<double>(second.rows - first.rows);
  return b + static_cast<int64_t>(slope * static_cast<double>(rows - second.rows));
}

}  // namespace

int64_t MemoryPlan::loss_and_workspace() const {
  return std::max<int64_t>(0,
                           peak - state.weights - state.gradients - state.optimizer - activations);
}

std::vector<std::string> MemoryPlan::table() const {
  const auto line = [](const char* purpose, int64_t bytes) {
    auto text = std::string(purpose);
    text.resize(20, ' ');
    const auto amount = format_bytes(bytes);
    return "  " + text + std::string(amount.size() < 10 ? 10 - amount.size() : 0, ' ') + amount;
  };
  std::vector<std::string> lines = {line("weights", state.weights),
                                    line("gradients", state.gradients),
                                    line("optimizer", state.optimizer)};
  if (peak == 0) return lines;
  lines.push_back(line("activations", activations));
  lines.push_back(line("loss, workspace", loss_and_workspace()));
  lines.push_back(line("peak (predicted)", peak));
  lines.push_back(free >= 0 ? line("free beyond it", free) : line("MORE THAN FREE BY", -free));
  return lines;
}

std::vector<std::string> MemoryPlan::remedies(int64_t accumulate) const {
  const auto more = std::to_string(accumulate * 2);
  return {"--set data.accumulate=" + more + " saves about " + format_bytes(activations / 2) +
              ", the result is the same",
          "--set model.recompute=block keeps block boundaries instead of " +
              format_bytes(activations) + " of activations, for a third more compute",
          "--set data.batch=... or data.sequence=... : activations shrink in proportion"};
}

MemoryPlan measure_memory_plan(Learner& learner, const data::Batch& batch, bool accumulates,
                               at::Device device) {
  const auto rows = batch.tokens.size(0);
  // The first pass allocates what stays (library workspaces); it is not a measurement.
  probe(learner, batch, 1, accumulates, device);
  const auto base = memory_use(device).current;
  const auto first = probe(learner, batch, std::max<int64_t>(1, rows / 4), accumulates, device);
  auto second = first;
  try {
    second = probe(learner, batch, rows < 4 ? rows : rows / 2, false, device);
  } catch (const c10::Error& error) {
    // Too much already: one point and the origin say about how much.
    if (!is_out_of_memory(error)) throw;
    second = {first.rows * 2, first.activations * 2, first.extra * 2};
  }
  MemoryPlan plan;
  plan.state = learner.state_bytes();
  plan.activations = extrapolate(first.activations, second.activations, first, second, rows);
  plan.peak = base + std::max(extrapolate(first.extra, second.extra, first, second, rows),
                              accumulates ? 0 : plan.state.gradients);
  plan.free = device_facts(device).free_bytes + memory_use(device).current - plan.peak;
  reset_peak_memory(device);
  return plan;
}

void check_fits(int64_t bytes, const char* what, at::Device device) {
  const auto free = device_facts(device).free_bytes;
  OUNCE_CHECK_AS(Fault::kProblem, bytes <= free, "[train] out of memory: ", what, " need ",
                 format_bytes(bytes), ", ", format_bytes(free), " are free on ", device.str(),
                 "; make model.dim or model.layers smaller");
}

bool is_out_of_memory(const c10::Error& error) {
  if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) return true;
  return std::string(error.what_without_backtrace()).find("can't allocate memory") !=
         std::string::npos;
}

}  // namespace ounce
