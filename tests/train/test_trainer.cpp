// SPDX-License-Identifier: MIT
// Steps that go wrong: a loss of the test's own breaks down in the training pass it is told to.
#include <gtest/gtest.h>
#include <ounce/ckpt/checkpointer.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/session.h>
#include <ounce/core/train/trainer.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

#include "support/expect_error.h"
#include "train/tiny_run.h"

namespace ounce::test {
namespace {

enum class Trouble { kNanLoss, kNanGradient, kOutOfMemory };

// Passes in training mode, counted from 1; those in [first, last] break down.
struct Plan {
  Trouble trouble = Trouble::kNanLoss;
  int first = 0, last = -1;
  int passes = 0;
};
Plan plan;

class TroubledLoss final : public Loss {
 public:
  at::Tensor forward(const at::Tensor& hidden_nd, const at::Tensor& weight_vd,
                     const at::Tensor& targets_n) override {
    const auto loss = at::cross_entropy_loss(at::linear(hidden_nd, weight_vd), targets_n, {},
                                             at::Reduction::Sum, -100);
    if (!is_training()) return loss;
    ++plan.passes;
    if (plan.passes < plan.first || plan.passes > plan.last) return loss;
    TORCH_CHECK_WITH(OutOfMemoryError, plan.trouble != Trouble::kOutOfMemory,
                     "tried to allocate 3 GiB");
    if (plan.trouble == Trouble::kNanLoss) return loss * NAN;
    return loss + at::sqrt(hidden_nd.sum() * 0);  // 0, and its slope is infinite
  }
  double flops(int64_t) const override { return 0; }
};

// Clones of everything that a Stateful presents.
struct Collector : StateVisitor {
  std::vector<at::Tensor> tensors;

  void tensor(std::string_view, at::Tensor& value, StateClass) override {
    tensors.push_back(value.detach().clone());
  }
  void integer(std::string_view, int64_t& value) override {
    tensors.push_back(at::full({}, value));
  }
  void number(std::string_view, double& value) override {
    tensors.push_back(at::full({}, value, at::kDouble));
  }
  void text(std::string_view, std::string&) override {}
  bool loading() const override { return false; }
};

std::vector<at::Tensor> state_of(Stateful& object) {
  Collector collector;
  object.visit_state(collector);
  return collector.tensors;
}

bool same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const auto& x, const auto& y) { return at::equal(x, y); });
}

int count(const std::string& text, const std::string& part) {
  int found = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

class Troubled : public testing::Test {
 protected:
  void SetUp() override {
    if (!registry<Loss>().store().contains("troubled")) {
      registry<Loss>().add(
          {.name = "troubled", .doc = "breaks down when told to"},
          [](const Options&, const Loss::Context&) { return std::make_shared<TroubledLoss>(); });
    }
  }
  Options config(const std::string& plan_memory = "false") {
    return tiny_config(dir, {"model.loss=troubled", "checkpoint.every=2", "run.steps=20",
                             "run.plan=" + plan_memory});
  }
  TrainResult train(int64_t steps, const std::string& resume = "none",
                    const std::string& plan_memory = "false") {
    TrainerOptions options;
    options.config = config(plan_memory);
    options.out = dir / "R";
    options.device = "cpu";
    options.resume = resume;
    options.stop_after = steps;
    out.str("");
    return Trainer(std::move(options), out).run();
  }

  TempDir dir;
  std::ostringstream out;
};

TEST_F(Troubled, AStepThatIsNotFiniteChangesNothing) {
  Session session(config(), at::kCPU);
  StepControl control;
  control.lr = at::full({}, 1e-2);
  const auto step = [&] {
    return session.learner->step({session.dataset->next_train_batch()}, control);
  };
  for (const auto trouble : {Trouble::kNanLoss, Trouble::kNanGradient}) {
    plan = {trouble, 2, 2};
    EXPECT_EQ(step().skipped.item<float>(), 0);
    const auto before = state_of(*session.learner);
    const auto report = step();
    EXPECT_NE(report.skipped.item<float>(), 0);
    EXPECT_EQ(std::isnan(report.loss.item<float>()), trouble == Trouble::kNanLoss);
    EXPECT_TRUE(same(state_of(*session.learner), before));
    EXPECT_EQ(step().skipped.item<float>(), 0);
    EXPECT_FALSE(same(state_of(*session.learner), before));
  }
}

TEST_F(Troubled, NineStepsInARowAreReportedAndPassedOver) {
  plan = {Trouble::kNanLoss, 3, 11};
  const auto result = train(13);
  EXPECT_EQ(result.step, 13);
  EXPECT_TRUE(std::isfinite(result.valid_loss));
  EXPECT_EQ(count(out.str(), "WARNING: step "), 9) << out.str();
  EXPECT_EQ(count(out.str(), "WARNING: step 3 was not finite (loss nan"), 1) << out.str();
}

TEST_F(Troubled, TenStepsInARowStopTheRun) {
  plan = {Trouble::kNanLoss, 4, 1000};
  expect_error(Fault::kProblem,
               {"10 steps in a row were not finite, up to step 13", "lower optimizer.lr",
                "the last checkpoint is step 12"},
               [&] { train(20); });
  EXPECT_EQ(ckpt::list_checkpoints(dir / "R/ckpt").at(0).step, 12);
  plan = {};
  EXPECT_EQ(train(15, "auto").step, 15);
}

TEST_F(Troubled, OutOfMemoryPrintsThePlanAndRemedies) {
  // The memory plan takes three passes, and step 1 one.
  plan = {Trouble::kOutOfMemory, 5, 1000};
  expect_error(Fault::kProblem, {"out of memory at step 1", "tried to allocate 3 GiB"},
               [&] { train(20, "none", "true"); });
  const auto report = out.str().substr(out.str().find("step 1/20"));
  EXPECT_EQ(count(report, "\n  weights "), 1) << report;
  EXPECT_EQ(count(report, "\n  activations "), 1) << report;
  EXPECT_EQ(count(report, "\n  try "), 3) << report;
  EXPECT_EQ(count(report, "--set data.accumulate=2 saves about "), 1) << report;
}

}  // namespace
}  // namespace ounce::test
