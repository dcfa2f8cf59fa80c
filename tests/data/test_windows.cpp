// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/data/windows.h>
#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "support/expect_error.h"

namespace ounce::data {
namespace {

using test::expect_error;

// Token i of the stream is i, so that a row says where it is from.
class Counting final : public TokenSource {
 public:
  explicit Counting(int64_t size) : size_(size) {}
  int64_t size() const override { return size_; }
  void read(int64_t begin, int64_t count, int64_t* out) const override {
    ASSERT_GE(begin, 0);
    ASSERT_LE(begin + count, size_);
    std::iota(out, out + count, begin);
  }

 private:
  int64_t size_;
};

Windows counting(int64_t train, int64_t valid, Dataset::Context context) {
  return {"test", std::make_shared<Counting>(train), std::make_shared<Counting>(valid), context,
          -1};
}

std::vector<int64_t> values(const at::Tensor& tensor) {
  const auto flat = tensor.to(at::kLong).flatten().contiguous();
  return {flat.data_ptr<int64_t>(), flat.data_ptr<int64_t>() + flat.numel()};
}

TEST(Windows, RowsAreConsecutiveTokensWithTheNextAsTarget) {
  const auto windows = counting(1000, 0, {.sequence = 7, .batch = 3, .seed = 5});
  const auto batch = windows.train_batch(4);
  EXPECT_EQ(batch.tokens.sizes(), (std::vector<int64_t>{3, 7}));
  EXPECT_EQ(batch.tokens.scalar_type(), at::kLong);
  EXPECT_TRUE(at::equal(batch.targets, batch.tokens + 1));
  EXPECT_TRUE(at::equal(batch.tokens - batch.tokens.slice(1, 0, 1),
                        at::arange(7, at::kLong).expand({3, 7})));
  EXPECT_EQ(batch.counted, 21);
  EXPECT_FALSE(batch.cu_seqlens.defined());
  EXPECT_FALSE(batch.positions.defined());
}

TEST(Windows, NoTokenTwiceWithinAnEpochAndCutsMove) {
  for (const int64_t tokens : {64, 101, 997, 1000}) {
    for (const int64_t sequence : {1, 8, 13}) {
      const auto windows = counting(tokens, 0, {.sequence = sequence, .batch = 3, .seed = 11});
      std::set<int64_t> offsets;
      const int64_t epochs = 6;
      for (int64_t epoch = 0; epoch < epochs; ++epoch) {
        std::set<int64_t> seen;
        for (int64_t k = 0; k < windows.batches_per_epoch(); ++k) {
          const auto batch = windows.train_batch(epoch * windows.batches_per_epoch() + k);
          for (const auto token : values(batch.tokens)) EXPECT_TRUE(seen.insert(token).second);
        }
        EXPECT_EQ(static_cast<int64_t>(seen.size()), windows.batches_per_epoch() * 3 * sequence);
        // Less than one batch, the offset and what the offset needs are left out.
        EXPECT_GT(static_cast<int64_t>(seen.size()), tokens - (3 + 2) * sequence);
        offsets.insert(*seen.begin() % sequence);
      }
      EXPECT_TRUE(sequence == 1 || offsets.size() > 1) << tokens << " " << sequence;
    }
  }
}

TEST(Windows, BatchDependsOnSeedAndIndexAlone) {
  const Dataset::Context context = {.sequence = 16, .batch = 4, .seed = 3};
  const auto one = counting(5000, 0, context);
  std::map<int64_t, at::Tensor> forward;
  for (int64_t k = 0; k < 200; ++k) forward[k] = one.train_batch(k).tokens;
  const auto two = counting(5000, 0, context);
  for (int64_t k = 199; k >= 0; --k) {
    EXPECT_TRUE(at::equal(two.train_batch(k).tokens, forward[k])) << k;
    EXPECT_EQ(forward[k][2][0].item<int64_t>(), two.train_window(k, 2));
  }
  auto other = context;
  other.seed = 4;
  EXPECT_FALSE(at::equal(counting(5000, 0, other).train_batch(0).tokens, forward[0]));
  // Epochs differ.
  EXPECT_FALSE(at::equal(one.train_batch(one.batches_per_epoch()).tokens, forward[0]));
}

TEST(Windows, ValidationCountsEveryTokenButTheFirstOnce) {
  for (int64_t tokens = 2; tokens < 60; ++tokens) {
    const auto windows = counting(100, tokens, {.sequence = 5, .batch = 3, .seed = 0});
    EXPECT_EQ(windows.valid_tokens(), tokens);
    std::vector<int64_t> targets;
    int64_t counted = 0;
    for (int64_t k = 0; k < windows.valid_batches(); ++k) {
      const auto batch = windows.valid_batch(k);
      EXPECT_LE(batch.tokens.size(0), 3);
      EXPECT_GE(batch.tokens.size(0), 1);
      counted += batch.counted;
      for (const auto target : values(batch.targets)) {
        if (target != kIgnoredTarget) targets.push_back(target);
      }
    }
    std::vector<int64_t> wanted(tokens - 1);
    std::iota(wanted.begin(), wanted.end(), 1);
    EXPECT_EQ(targets, wanted) << tokens;
    EXPECT_EQ(counted, tokens - 1);
  }
  for (const int64_t tokens : {0, 1}) {
    const auto none = counting(100, tokens, {.sequence = 5, .batch = 3});
    EXPECT_EQ(none.valid_batches(), 0);
    EXPECT_EQ(none.valid_tokens(), 0);
    expect_error(Fault::kUsage, {"validation"}, [&] { none.valid_batch(0); });
  }
}

std::shared_ptr<ByteSource> bytes(const std::string& text) {
  return std::make_shared<ByteSource>(text);
}

TEST(Windows, PackedDocumentsEndAfterTheEndToken) {
  // Rows "ab|cd" and "ef||g", where | ends documents.
  const Windows windows("test", bytes("xxxxxxxxxxxxxxxx"), bytes("ab|cdef||gh"),
                        {.sequence = 5, .batch = 2, .packed = true}, '|');
  const auto batch = windows.valid_batch(0);
  EXPECT_EQ(batch.cu_seqlens.scalar_type(), at::kInt);
  EXPECT_EQ(values(batch.cu_seqlens), (std::vector<int64_t>{0, 3, 5, 8, 9, 10}));
  EXPECT_EQ(values(batch.positions), (std::vector<int64_t>{0, 1, 2, 0, 1, 0, 1, 2, 0, 0}));
  const auto ignored = kIgnoredTarget;
  EXPECT_EQ(values(batch.targets), (std::vector<int64_t>{'b', '|', ignored, 'd', 'e',  //
                                                         'f', '|', ignored, ignored, 'h'}));
  EXPECT_EQ(batch.counted, 7);
  EXPECT_EQ(windows.valid_batches(), 1);
}

TEST(Windows, PackedBoundariesAtRowEndsAndFilling) {
  // Ends at the last token of a row: one boundary. The filling of the last row is token 0, which is
  // the end token here, and no documents.
  const std::string text("abc\0de\0", 7);
  const Windows windows("test", bytes("xxxxxxxxxxxx"), bytes(text),
                        {.sequence = 4, .batch = 2, .packed = true}, 0);
  const auto batch = windows.valid_batch(0);
  EXPECT_EQ(values(batch.cu_seqlens), (std::vector<int64_t>{0, 4, 8}));
  const auto ignored = kIgnoredTarget;
  EXPECT_EQ(values(batch.targets),
            (std::vector<int64_t>{'b', 'c', 0, ignored, 'e', 0, ignored, ignored}));
  EXPECT_EQ(values(batch.positions), (std::vector<int64_t>{0, 1, 2, 3, 0, 1, 2, 3}));
  EXPECT_EQ(batch.counted, 5);
}

TEST(Windows, PackedAndStreamedBatchesHoldTheSameTokens) {
  std::string text;
  for (int i = 0; i < 2000; ++i) text += static_cast<char>(i % 17 == 0 ? 0 : 'a' + i % 7);
  const Dataset::Context stream = {.sequence = 32, .batch = 4, .seed = 9};
  auto context = stream;
  context.packed = true;
  const auto streamed = Windows("test", bytes(text), nullptr, stream, 0).train_batch(5);
  const auto packed = Windows("test", bytes(text), nullptr, context, 0).train_batch(5);
  EXPECT_TRUE(at::equal(streamed.tokens, packed.tokens));
  EXPECT_EQ(packed.counted, 4 * 32 - streamed.tokens.eq(0).sum().item<int64_t>());
  EXPECT_EQ(packed.counted, packed.targets.ne(kIgnoredTarget).sum().item<int64_t>());
  // Every row starts a document, and positions are the distance from a boundary.
  const auto boundaries = values(packed.cu_seqlens);
  for (const int64_t row : {0, 32, 64, 96, 128}) {
    EXPECT_EQ(std::count(boundaries.begin(), boundaries.end(), row), 1);
  }
  const auto positions = values(packed.positions);
  for (size_t i = 0; i + 1 < boundaries.size(); ++i) {
    for (auto at = boundaries[i]; at < boundaries[i + 1]; ++at) {
      EXPECT_EQ(positions[at], at - boundaries[i]);
    }
  }
}

TEST(Windows, RefusesWhatDoesNotFit) {
  expect_error(Fault::kUsage, {"100 tokens", "1 windows", "data.batch = 3", "data.sequence = 50"},
               [] { counting(100, 0, {.sequence = 50, .batch = 3}); });
  expect_error(Fault::kUsage, {"0 windows"}, [] { counting(7, 0, {.sequence = 50, .batch = 1}); });
  expect_error(Fault::kUsage, {"data.sequence"}, [] { counting(7, 0, {.batch = 1}); });
  expect_error(Fault::kUsage, {"data.batch"}, [] { counting(7, 0, {.sequence = 1}); });
  expect_error(Fault::kUsage, {"2^31"},
               [] { counting(100, 0, {.sequence = int64_t{1} << 40, .batch = int64_t{1} << 40}); });
  expect_error(Fault::kUsage, {"packed"},
               [] { counting(100, 0, {.sequence = 5, .batch = 1, .packed = true}); });
  const auto windows = counting(100, 0, {.sequence = 5, .batch = 1});
  expect_error(Fault::kUsage, {"-1"}, [&] { windows.train_batch(-1); });
}

}  // namespace
}  // namespace ounce::data
