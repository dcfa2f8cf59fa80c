// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/schedule.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numbers>

namespace ounce {

namespace {

// How far the way from 1 down to `final` has been gone, for x in [0, 1].
using Shape = double (*)(double x);

double flat(double) { return 0; }
double straight(double x) { return x; }
double half_cosine(double x) { return 0.5 * (1 - std::cos(std::numbers::pi * x)); }
double root(double x) { return std::sqrt(x); }

// Warm-up, a plateau, and a descent of `descent` steps that ends in the last step.
class WarmupPlateauDescent final : public Schedule {
 public:
  WarmupPlateauDescent(int64_t steps, int64_t warmup, int64_t descent, double last, Shape shape)
      : steps_(steps), warmup_(warmup), descent_(descent), last_(last), shape_(shape) {}

  double factor(int64_t step) const override {
    OUNCE_CHECK(step >= 0, "[schedule] expected step >= 0, got ", step);
    if (step < warmup_) return static_cast<double>(step + 1) / static_cast<double>(warmup_);
    const int64_t gone = std::min(step, steps_ - 1) - (steps_ - descent_) + 1;
    if (gone <= 0) return 1;
    const double x = static_cast<double>(gone) / static_cast<double>(descent_);
    return 1 - (1 - last_) * shape_(x);
  }

 private:
  int64_t steps_, warmup_, descent_;
  double last_;
  Shape shape_;
};

int64_t warmup_of(const Options& options, const Schedule::Context& context) {
  OUNCE_CHECK(context.steps >= 1, "[schedule] expected at least one step, got ", context.steps);
  const auto warmup = options.non_negative("warmup");
  OUNCE_CHECK(warmup <= context.steps, "[schedule] warmup = ", warmup,
              " is longer than the run of ", context.steps, " steps");
  return warmup;
}

// From the first step after the warm-up, which still has factor 1, to the last.
std::shared_ptr<Schedule> descending(const Options& options, const Schedule::Context& context,
                                     Shape shape) {
  const auto warmup = warmup_of(options, context);
  return std::make_shared<WarmupPlateauDescent>(context.steps, warmup,
                                                std::max<int64_t>(context.steps - warmup - 1, 0),
                                                options.number_in("final", 0, 1), shape);
}

}  // namespace

void register_schedules() {
  auto schedules = registry<Schedule>();
  schedules.add({.name = "constant",
                 .doc = "the base rate throughout",
                 .defaults = "warmup = 0           # steps of linear warm-up\n"},
                [](const Options& options, const Schedule::Context& context) {
                  return std::make_shared<WarmupPlateauDescent>(
                      context.steps, warmup_of(options, context), 0, 1.0, flat);
                });
  const std::string descent_defaults =
      "warmup = 0           # steps of linear warm-up\n"
      "final = 0.1          # fraction of the base rate left in the last step\n";
  schedules.add({.name = "linear",
                 .doc = "straight down to a fraction of the base rate",
                 .defaults = descent_defaults},
                [](const Options& options, const Schedule::Context& context) {
                  return descending(options, context, straight);
                });
  schedules.add({.name = "cosine",
                 .doc = "half a cosine down to a fraction of the base rate",
                 .defaults = descent_defaults},
                [](const Options& options, const Schedule::Context& context) {
                  return descending(options, context, half_cosine);
                });
  schedules.add(
      {.name = "wsd",
       .doc = "warm-up, stable, decay: the base rate until a cooldown at the end",
       .defaults = "warmup = 0           # steps of linear warm-up\n"
                   "cooldown = 0.2       # share of the run, or, above 1, steps\n"
                   "shape = \"sqrt\"       # of the cooldown: linear | sqrt (1 - sqrt)\n"
                   "final = 0.0          # fraction of the base rate left in the last step\n"},
      [](const Options& options, const Schedule::Context& context) {
        const auto warmup = warmup_of(options, context);
        const auto given = options.number_in("cooldown", 0, 1e15);
        const auto cooldown = static_cast<int64_t>(
            std::llround(given > 1 ? given : given * static_cast<double>(context.steps)));
        OUNCE_CHECK(warmup + cooldown <= context.steps, "[schedule] warmup = ", warmup,
                    " and cooldown = ", cooldown, " steps are longer than the run of ",
                    context.steps, " steps");
        const auto& shape = options.choice("shape", {"linear", "sqrt"});
        return std::make_shared<WarmupPlateauDescent>(context.steps, warmup, cooldown,
                                                      options.number_in("final", 0, 1),
                                                      shape == "sqrt" ? root : straight);
      });
}

}  // namespace ounce
