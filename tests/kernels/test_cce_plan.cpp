// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/kernels/cce/cce_plan.h>

#include <vector>

namespace ounce::cce {

namespace {

constexpr int64_t kCache = int64_t{50} << 20;

// How often each tile (of 256 tokens by 192 entries) is made.
std::vector<int> times_made(const Schedule& s, int64_t rows) {
  const auto pairs = (rows + kPairRows - 1) / kPairRows;
  std::vector<int> times(pairs * s.tiles);
  int first = 0;
  for (const auto& form : s.forms) {
    for (int sweep = 0; sweep < form.count; ++sweep, first += form.pairs) {
      for (int cluster = 0; cluster < s.clusters; ++cluster) {
        const int column = cluster / form.pairs, pair = first + cluster % form.pairs;
        if (column >= form.columns) continue;
        for (int tile = column; tile < s.tiles; tile += form.columns) {
          ++times.at(int64_t{pair} * s.tiles + tile);
        }
      }
    }
  }
  return times;
}

struct Shape {
  int64_t rows, vocab, dim;
};
const std::vector<Shape> kShapes = {{8192, 256000, 2304},
                                    {8192, 128256, 4096},
                                    {16384, 50304, 768},
                                    {8191, 256003, 2304},
                                    {1, 1, 8},
                                    {129, 7, 72},
                                    {300, 193, 64},
                                    {65536, 262144, 128},
                                    {1000, 50257, 7168}};

TEST(CcePlan, MakesEachTileOnceForAnyNumberOfClusters) {
  for (const auto& shape : kShapes) {
    for (const int clusters : {1, 2, 57, 66, 67}) {
      SCOPED_TRACE(testing::Message() << shape.rows << " " << shape.vocab << " " << clusters);
      const auto s = schedule(shape.rows, shape.vocab, shape.dim, clusters, kCache);
      for (const int times : times_made(s, shape.rows)) ASSERT_EQ(times, 1);
      for (const auto& form : s.forms) {
        EXPECT_LE(form.pairs * form.columns, clusters);
      }
    }
  }
}

TEST(CcePlan, KeepsTheClustersOfAnH100Busy) {
  for (const auto& shape : kShapes) {
    if (shape.rows < 8000) continue;
    EXPECT_GT(schedule(shape.rows, shape.vocab, shape.dim, 66, kCache).use(shape.rows), 0.96)
        << shape.rows << " " << shape.vocab;
  }
}

TEST(CcePlan, PartialSumsStaySmall) {
  for (const auto& shape : kShapes) {
    const auto s = schedule(shape.rows, shape.vocab, shape.dim, 66, kCache);
    EXPECT_LE(s.partials() * 8, int64_t{16} << 20) << shape.rows;
  }
}

TEST(CcePlan, SlabsFitAndAreUsedWell) {
  for (const auto& shape : kShapes) {
    const int64_t most = 40;
    const auto slab = best_slab(shape.rows, shape.vocab, shape.dim, most, 66, kCache);
    EXPECT_LE(slab, most * kTileColumns);
    EXPECT_LE(slab, shape.vocab);
    EXPECT_TRUE(slab == shape.vocab || slab % kTileColumns == 0) << slab;
    if (shape.rows < 8000) continue;
    EXPECT_GT(schedule(shape.rows, slab, shape.dim, 66, kCache).use(shape.rows), 0.95) << slab;
  }
}

}  // namespace

}  // namespace ounce::cce
