// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/device.h>
#include <ounce/core/train/memory_plan.h>
#include <ounce/core/train/session.h>
#include <torch/torch.h>

#include <iostream>

#include "train/tiny_run.h"

namespace ounce::test {
namespace {

TEST(MemoryPlan, PredictsWhatStepsThenTake) {
  count_cpu_memory();
  const TempDir dir;
  const std::vector<std::string> cases[] = {
      {"model.mixer=gla"},
      {"model.mixer=gla", "precision.compute=bf16"},
      {"model.mixer=attention"},
      {"model.mixer=[\"gla\", \"attention\"]", "model.recompute=block"},
      {"model.mixer=attention", "model.loss=cross_entropy", "data.batch=3"},
      {"model.mixer=gla", "data.accumulate=2"},
      {"model.mixer=gla", "model.dim=256", "data.sequence=16", "data.accumulate=4"},
  };
  for (auto settings : cases) {
    std::string name;
    for (const auto& setting : settings) name += setting + " ";
    for (const char* size : {"model.dim=64", "model.layers=2", "data.sequence=64"}) {
      settings.insert(settings.begin(), size);
    }
    if (settings.back() != "data.batch=3") settings.push_back("data.batch=8");
    const auto before = memory_use(at::kCPU).current;
    Session session(tiny_config(dir, settings), at::kCPU);
    const auto batch = session.dataset->train_batch(0);
    const auto parts = session.config.integer("data.accumulate");
    const auto rows = batch.tokens.size(0) / parts;
    std::vector<data::Batch> micro_batches;
    for (int64_t i = 0; i < parts; ++i) {
      micro_batches.push_back(slice_rows(batch, i * rows, (i + 1) * rows));
    }
    const auto plan = measure_memory_plan(*session.learner, micro_batches[0], parts > 1, at::kCPU);
    int64_t parameters = 0;
    for (const auto& parameter : session.model->parameters()) parameters += parameter.numel();
    EXPECT_EQ(plan.state.weights, 4 * parameters);
    EXPECT_EQ(plan.state.gradients, 4 * parameters);
    EXPECT_GE(plan.state.optimizer, 8 * parameters);  // two moments
    EXPECT_GT(plan.activations, 0);
    reset_peak_memory(at::kCPU);
    StepControl control;
    control.lr = at::full({}, 1e-3);
    for (int step = 0; step < 2; ++step) session.learner->step(micro_batches, control);
    const auto measured = static_cast<double>(memory_use(at::kCPU).peak - before);
    const auto predicted = static_cast<double>(plan.peak - before);
    std::cout << name << "predicted " << predicted / 1048576 << " MiB, measured "
              << measured / 1048576 << " MiB\n";
    EXPECT_NEAR(predicted / measured, 1, 0.1) << name;
  }
}

}  // namespace
}  // namespace ounce::test
