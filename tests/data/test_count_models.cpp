// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/data/count_models.h>
#include <torch/torch.h>

#include <cmath>
#include <map>
#include <set>
#include <string>

#include "support/expect_error.h"

namespace ounce::data {
namespace {

// The definition, by scanning the text for every single probability.
double witten_bell(const std::string& padded, const std::string& context, char next) {
  double lower = 1.0 / 256;
  if (!context.empty()) lower = witten_bell(padded, context.substr(1), next);
  double total = 0;
  double hits = 0;
  std::set<char> distinct;
  for (size_t i = 3; i < padded.size(); ++i) {
    if (padded.compare(i - context.size(), context.size(), context) != 0) continue;
    ++total;
    hits += padded[i] == next;
    distinct.insert(padded[i]);
  }
  if (total == 0) return lower;
  const auto kinds = static_cast<double>(distinct.size());
  return (hits + kinds * lower) / (total + kinds);
}

std::string random_text(int64_t size, int64_t letters, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  // Skewed, so that some runs are frequent and others unseen.
  const auto draws = at::rand({size}, generator, at::kDouble).pow(2).mul(letters).to(at::kLong);
  std::string text;
  for (int64_t i = 0; i < size; ++i) text += static_cast<char>(200 + draws[i].item<int64_t>());
  return text;
}

TEST(CountModels, EqualTheirDefinition) {
  const auto train = random_text(400, 6, 1);
  const auto valid = random_text(60, 8, 2);
  const auto losses = count_model_losses(train, valid);
  ASSERT_EQ(losses.size(), 4u);
  const std::string zeros(3, '\0');
  const auto padded = zeros + valid;
  for (size_t order = 0; order < losses.size(); ++order) {
    double sum = 0;
    for (size_t i = 1; i < valid.size(); ++i) {
      sum -= std::log(witten_bell(zeros + train, padded.substr(i + 3 - order, order), valid[i]));
    }
    const double wanted = sum / static_cast<double>(valid.size() - 1);
    std::printf("order %d: %.6f nats, difference %.1e\n", static_cast<int>(order), losses[order],
                losses[order] - wanted);
    EXPECT_NEAR(losses[order], wanted, 1e-12);
  }
}

TEST(CountModels, ProbabilitiesSumToOne) {
  const auto train = random_text(300, 5, 3);
  // The loss of "a" + x has one term, so that exp(-loss) is the probability of x.
  std::vector<double> sums(kCountModelOrders);
  for (int next = 0; next < 256; ++next) {
    const auto losses = count_model_losses(train, train.substr(7, 1) + static_cast<char>(next));
    for (int order = 0; order < kCountModelOrders; ++order) sums[order] += std::exp(-losses[order]);
  }
  for (const double sum : sums) EXPECT_NEAR(sum, 1, 1e-12);
}

TEST(CountModels, KnownEntropies) {
  // Nothing was seen: the uniform model.
  for (const double loss : count_model_losses("", "abcdef"))
    EXPECT_NEAR(loss, std::log(256), 1e-12);
  // A cycle of three letters: log 3 without context, next to nothing with one.
  std::string cycle;
  for (int i = 0; i < 30000; ++i) cycle += "abc"[i % 3];
  const auto losses = count_model_losses(cycle, cycle);
  EXPECT_NEAR(losses[0], std::log(3), 1e-3);
  for (int order = 1; order < kCountModelOrders; ++order) EXPECT_LT(losses[order], 1e-3);
  // A long text grows the tables far past their first size.
  const auto text = random_text(200000, 40, 4);
  const auto random = count_model_losses(text.substr(0, 180000), text.substr(180000));
  EXPECT_LT(random[0], std::log(40));
  EXPECT_GT(random[3], random[0]);  // independent draws: context only costs
}

TEST(CountModels, NeedSomethingToPredict) {
  test::expect_error(Fault::kUsage, {"at least 2"}, [] { count_model_losses("abc", "a"); });
}

}  // namespace
}  // namespace ounce::data
