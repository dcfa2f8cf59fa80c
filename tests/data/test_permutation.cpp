// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/data/permutation.h>

#include <cmath>
#include <vector>

namespace ounce::data {
namespace {

constexpr bool is_bijection(uint64_t n, uint64_t key) {
  const KeyedPermutation permutation(n, key);
  std::vector<bool> seen(n);
  for (uint64_t i = 0; i < n; ++i) {
    const auto image = permutation(i);
    if (image >= n || seen[image]) return false;
    seen[image] = true;
  }
  return true;
}

// It can be evaluated at compile time.
static_assert(KeyedPermutation(1, 7)(0) == 0);
static_assert(KeyedPermutation(10, 7)(3) < 10);

TEST(Permutation, IsABijectionOfEverySize) {
  for (uint64_t n = 1; n <= 300; ++n) {
    for (uint64_t key = 0; key < 4; ++key) EXPECT_TRUE(is_bijection(n, key)) << n << " " << key;
  }
  for (const uint64_t n : {1023, 1024, 1025, 4095, 4096, 4097, 65535, 65537, 100003}) {
    EXPECT_TRUE(is_bijection(n, n * 31)) << n;
  }
}

TEST(Permutation, LargeDomainsStayInside) {
  const uint64_t n = (uint64_t{1} << 61) + 12345;
  const KeyedPermutation permutation(n, 5);
  for (uint64_t i = 0; i < 1000; ++i) EXPECT_LT(permutation(n - 1 - i), n);
}

// Pearson's statistic of where each index goes over many keys: n^2 cells, (n - 1)^2 degrees of
// freedom, standard deviation sqrt(2 (n - 1)^2).
TEST(Permutation, SpreadsEveryIndexEvenlyOverKeys) {
  for (const uint64_t n : {3, 7, 12, 40}) {
    constexpr int kKeys = 20000;
    std::vector<double> cells(n * n);
    for (int key = 0; key < kKeys; ++key) {
      const KeyedPermutation permutation(n, mix64(3, key));
      for (uint64_t i = 0; i < n; ++i) ++cells[i * n + permutation(i)];
    }
    const double expected = static_cast<double>(kKeys) / static_cast<double>(n);
    double statistic = 0;
    for (const double cell : cells) statistic += (cell - expected) * (cell - expected) / expected;
    const double freedom = static_cast<double>((n - 1) * (n - 1));
    const double deviations = (statistic - freedom) / std::sqrt(2 * freedom);
    std::printf("n %2d: chi^2 %.1f for %.0f degrees of freedom\n", static_cast<int>(n), statistic,
                freedom);
    EXPECT_LT(std::abs(deviations), 5) << n;
  }
}

TEST(Permutation, NeighboursPartAndKeysDiffer) {
  constexpr uint64_t n = 100000;
  const KeyedPermutation a(n, 1);
  const KeyedPermutation b(n, 2);
  int adjacent = 0;
  int same = 0;
  int fixed = 0;
  for (uint64_t i = 0; i + 1 < n; ++i) {
    adjacent += a(i + 1) == a(i) + 1;
    same += a(i) == b(i);
    fixed += a(i) == i;
  }
  // Each is one on average in a random order.
  EXPECT_LT(adjacent, 10);
  EXPECT_LT(same, 10);
  EXPECT_LT(fixed, 10);
}

}  // namespace
}  // namespace ounce::data
