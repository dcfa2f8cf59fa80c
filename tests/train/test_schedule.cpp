// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/schedule.h>

#include <cmath>
#include <numbers>

namespace {

using ounce::Options;
using ounce::Schedule;

std::shared_ptr<Schedule> make(const std::string& toml, int64_t steps) {
  if (!ounce::registry<Schedule>().store().contains("wsd")) ounce::register_schedules();
  return ounce::registry<Schedule>().make(Options::parse(toml, "test"), {.steps = steps});
}

TEST(Schedule, ConstantWarmsUp) {
  const auto schedule = make("name = 'constant'\nwarmup = 4", 10);
  EXPECT_EQ(schedule->factor(0), 0.25);
  EXPECT_EQ(schedule->factor(3), 1);
  EXPECT_EQ(schedule->factor(9), 1);
  EXPECT_EQ(schedule->factor(1000), 1);
  EXPECT_EQ(make("name = 'constant'", 1)->factor(0), 1);
}

TEST(Schedule, LinearFallsFromOneToFinal) {
  const auto schedule = make("name = 'linear'\nwarmup = 2\nfinal = 0.2", 11);
  EXPECT_EQ(schedule->factor(0), 0.5);
  EXPECT_EQ(schedule->factor(1), 1);
  EXPECT_EQ(schedule->factor(2), 1);
  for (int64_t step = 2; step < 11; ++step) {
    EXPECT_NEAR(schedule->factor(step), 1 - 0.8 * static_cast<double>(step - 2) / 8, 1e-15);
  }
  EXPECT_DOUBLE_EQ(schedule->factor(10), 0.2);
  EXPECT_EQ(schedule->factor(500), schedule->factor(10));
}

TEST(Schedule, CosineFollowsItsFormula) {
  const auto schedule = make("name = 'cosine'\nwarmup = 10\nfinal = 0.1", 111);
  for (int64_t step = 10; step < 111; ++step) {
    const double x = static_cast<double>(step - 10) / 100;
    EXPECT_NEAR(schedule->factor(step), 0.1 + 0.45 * (1 + std::cos(std::numbers::pi * x)), 1e-14);
  }
  EXPECT_NEAR(schedule->factor(60), 0.55, 1e-14);
}

TEST(Schedule, WsdCoolsDownAtTheEnd) {
  const auto linear = make("name = 'wsd'\nwarmup = 5\ncooldown = 10\nshape = 'linear'", 100);
  EXPECT_EQ(linear->factor(5), 1);
  EXPECT_EQ(linear->factor(89), 1);
  EXPECT_NEAR(linear->factor(90), 0.9, 1e-15);
  EXPECT_NEAR(linear->factor(99), 0, 1e-15);
  const auto root = make("name = 'wsd'\ncooldown = 0.25\nfinal = 0.1", 100);
  EXPECT_EQ(root->factor(74), 1);
  EXPECT_NEAR(root->factor(79), 1 - 0.9 * std::sqrt(5.0 / 25), 1e-15);
  EXPECT_NEAR(root->factor(99), 0.1, 1e-15);
}

TEST(Schedule, NeverRisesAfterTheWarmup) {
  for (const std::string name : {"constant", "linear", "cosine", "wsd"}) {
    for (const int64_t steps : {1, 2, 3, 17}) {
      for (int64_t warmup = 0; warmup <= steps; ++warmup) {
        const auto cooldown = name == "wsd" ? "\ncooldown = 0.0" : "";
        const auto schedule =
            make("name = '" + name + "'\nwarmup = " + std::to_string(warmup) + cooldown, steps);
        for (int64_t step = 0; step + 1 < steps; ++step) {
          const auto now = schedule->factor(step), next = schedule->factor(step + 1);
          EXPECT_TRUE(step + 1 >= warmup || next > now) << name;
          EXPECT_TRUE(step < warmup || next <= now) << name;
          EXPECT_LE(next, 1);
          EXPECT_GE(next, 0);
        }
      }
    }
  }
}

TEST(Schedule, BadSettingsAreNamed) {
  EXPECT_THROW(make("name = 'cosine'\nwarmup = 11", 10), ounce::Error);
  EXPECT_THROW(make("name = 'cosine'\nwarmup = -1", 10), ounce::Error);
  EXPECT_THROW(make("name = 'cosine'\nfinal = 1.5", 10), ounce::Error);
  EXPECT_THROW(make("name = 'wsd'\nwarmup = 6\ncooldown = 0.5", 10), ounce::Error);
  EXPECT_THROW(make("name = 'wsd'\nshape = 'cubic'", 10), ounce::Error);
  EXPECT_THROW(make("name = 'cosin'", 10), ounce::Error);
  EXPECT_THROW(make("name = 'linear'", 0), ounce::Error);
  EXPECT_THROW(make("name = 'linear'", 5)->factor(-1), ounce::Error);
}

}  // namespace
