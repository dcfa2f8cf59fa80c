// SPDX-License-Identifier: MIT
// `embedded` and `text`, made through the registry as the program makes them.
#include <gtest/gtest.h>
#include <ounce/core/data/datasets.h>
#include <ounce/core/data/files.h>
#include <ounce/core/registry.h>
#include <torch/torch.h>

#include <filesystem>

#include "data/make_dataset.h"
#include "support/expect_error.h"
#include "support/temp_dir.h"

namespace ounce::data {
namespace {

using test::expect_error;
using test::make_dataset;
using test::TempDir;

std::string repeated(const std::string& text, int times) {
  std::string result;
  for (int i = 0; i < times; ++i) result += text;
  return result;
}

// The text of a split as the validation batches show it, but for its first byte.
std::string valid_text(const Dataset& dataset) {
  std::string text;
  for (int64_t k = 0; k < dataset.valid_batches(); ++k) {
    const auto targets = dataset.valid_batch(k).targets.flatten();
    for (int64_t i = 0; i < targets.numel(); ++i) {
      const auto token = targets[i].item<int64_t>();
      if (token != kIgnoredTarget) text += static_cast<char>(token);
    }
  }
  return text;
}

TEST(Text, SplitsTheEndOffAsNanoGptDoes) {
  const TempDir folder;
  const auto path = folder.write_file("a.txt", repeated("0123456789", 100) + "abc");
  const auto dataset = make_dataset("text", {{"files", path}}, {.sequence = 8, .batch = 4});
  EXPECT_EQ(dataset->vocab_size(), 256);
  EXPECT_EQ(dataset->document_end(), 0);
  EXPECT_EQ(dataset->train_tokens(), 902);  // int(1003 * 0.9)
  EXPECT_EQ(dataset->valid_tokens(), 101);
  EXPECT_EQ(valid_text(*dataset), repeated("3456789012", 10).substr(0, 97) + "abc");
  EXPECT_EQ(dataset->describe().size(), 2u);
  const auto losses = dataset->count_model_losses();
  ASSERT_EQ(losses.size(), 4u);
  EXPECT_EQ(losses[2].first, "order-2");
  EXPECT_LT(losses[1].second, losses[0].second);
}

TEST(Text, JoinsGlobsInOrderAndTakesValidationFiles) {
  const TempDir folder;
  folder.write_file("b.txt", "BBBB");
  folder.write_file("a.txt", "AAAA");
  folder.write_file("z/c.md", "CCCC");
  folder.write_file("v.txt", "validation");
  const auto dataset =
      make_dataset("text",
                   {{"files", Value::Array{folder / "z/*.md", folder / "[ab].txt"}},
                    {"valid_files", folder / "v*"}},
                   {.sequence = 1, .batch = 13});
  EXPECT_EQ(dataset->train_tokens(), 14);
  EXPECT_EQ(valid_text(*dataset), "alidation");
  const auto stream =
      make_dataset("text",
                   {{"files", folder / "v.txt"},
                    {"valid_files", Value::Array{folder / "z/*.md", folder / "[ab].txt"}}},
                   {.sequence = 1, .batch = 1});
  EXPECT_EQ(valid_text(*stream), std::string("CCC\0AAAA\0BBBB", 13));
}

TEST(Text, NeverCutsACharacter) {
  const TempDir folder;
  const auto path = folder.write_file("a.txt", repeated("\xe2\x82\xac", 50));
  for (const double fraction : {0.1, 0.11, 0.12, 0.13, 0.5}) {
    const auto dataset = make_dataset("text", {{"files", path}, {"valid_fraction", fraction}},
                                      {.sequence = 3, .batch = 1});
    EXPECT_EQ(dataset->train_tokens() % 3, 0) << fraction;
    EXPECT_EQ(dataset->train_tokens() + dataset->valid_tokens(), 150);
  }
  const auto all =
      make_dataset("text", {{"files", path}, {"valid_fraction", 0}}, {.sequence = 3, .batch = 1});
  EXPECT_EQ(all->train_tokens(), 150);
  EXPECT_EQ(all->valid_batches(), 0);
  EXPECT_TRUE(all->count_model_losses().empty());
}

TEST(Text, DocumentsEndAtFileEnds) {
  const TempDir folder;
  folder.write_file("1", repeated("x", 20));
  folder.write_file("2", repeated("y", 20));
  folder.write_file("v1", "ab");
  folder.write_file("v2", "cd");
  const auto dataset =
      make_dataset("text", {{"files", folder / "[12]"}, {"valid_files", folder / "v*"}},
                   {.sequence = 4, .batch = 1, .packed = true});
  // "ab\0cd": the target of the NUL, c, is the next document's.
  const auto batch = dataset->valid_batch(0);
  EXPECT_TRUE(at::equal(batch.cu_seqlens, at::tensor({0, 3, 4}, at::kInt)));
  EXPECT_EQ(batch.counted, 3);
}

TEST(Text, BytesRoundTripAndDocumentEndsReadAsLines) {
  const TempDir folder;
  const auto path = folder.write_file("a", repeated("x", 20));
  const auto dataset = make_dataset("text", {{"files", path}}, {.sequence = 1, .batch = 1});
  const std::string text = "na\xc3\xafve \xe2\x82\xac\n";
  EXPECT_EQ(dataset->decode(dataset->encode(text)), text);
  EXPECT_EQ(dataset->encode("\xff"), std::vector<int64_t>{255});
  EXPECT_EQ(dataset->decode({'a', 0, 'b'}), "a\nb");
  expect_error(Fault::kUsage, {"256"}, [&] { dataset->decode({256}); });
}

TEST(Text, IdentityIsTheDataAndNotItsPlace) {
  const TempDir folder;
  const auto identity = [&](const std::string& path, double fraction) {
    return make_dataset("text", {{"files", path}, {"valid_fraction", fraction}},
                        {.sequence = 2, .batch = 1})
        ->identity();
  };
  const auto path = folder.write_file("a.txt", repeated("abcdefgh", 20));
  const auto first = identity(path, 0.1);
  EXPECT_EQ(first.size(), 16u);
  EXPECT_EQ(identity(path, 0.1), first);
  EXPECT_EQ(identity(folder.write_file("b.txt", repeated("abcdefgh", 20)), 0.1), first);
  EXPECT_NE(identity(path, 0.2), first);
  folder.write_file("a.txt", repeated("abcdefgh", 19) + "abcdefgX");
  EXPECT_NE(identity(path, 0.1), first);
}

TEST(Text, BadFilesAreNamed) {
  const TempDir folder;
  const auto make = [&](const Value& files) {
    make_dataset("text", {{"files", files}}, {.sequence = 2, .batch = 1});
  };
  expect_error(Fault::kUsage, {"data.files"}, [&] { make(Value::Array{}); });
  expect_error(Fault::kData, {"none.txt", "no file matches"}, [&] { make(folder / "none.txt"); });
  folder.write_file("d/x", "x");
  expect_error(Fault::kData, {"regular file", "/d"}, [&] { make(folder / "d"); });
  const auto empty = folder.write_file("empty.txt", "");
  expect_error(Fault::kData, {"empty.txt", "is empty"}, [&] { make(empty); });
  const auto latin = folder.write_file("latin.txt", repeated("a", 1000) + "\xe9t\xe9");
  expect_error(Fault::kData, {"latin.txt", "byte 1000"}, [&] { make(latin); });
  const auto good = folder.write_file("good.txt", repeated("a", 100));
  expect_error(Fault::kData, {"latin.txt"}, [&] { make(Value::Array{good, latin}); });
  expect_error(Fault::kUsage, {"good.txt", "data.valid_files"}, [&] {
    make_dataset("text", {{"files", good}, {"valid_files", good}}, {.sequence = 2, .batch = 1});
  });
  expect_error(Fault::kUsage, {"90 tokens", "data.batch = 80"}, [&] {
    make_dataset("text", {{"files", good}}, {.sequence = 2, .batch = 80});
  });
  expect_error(Fault::kUsage, {"fiels", "files"}, [&] {
    make_dataset("text", {{"fiels", good}}, {.sequence = 2, .batch = 1});
  });
}

TEST(Utf8, FindsWhatIsNotWellFormed) {
  const auto at = [](std::string_view text) { return find_invalid_utf8(text); };
  EXPECT_EQ(at(""), std::nullopt);
  EXPECT_EQ(at("plain ascii, longer than a word"), std::nullopt);
  // The first and last character of each length, around the surrogates.
  EXPECT_EQ(at("\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf"), std::nullopt);
  EXPECT_EQ(at("\xf0\x90\x80\x80\xf4\x8f\xbf\xbf"), std::nullopt);
  for (const std::string bad : {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80",
                                "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff",
                                "\xe2\x82", "\xc3", "\xe2\x28\xa1", "\xf0\x90\x80"}) {
    EXPECT_EQ(at(bad), 0u);
    EXPECT_EQ(at("12345678\xc3\xa9" + bad + "12345678"), 10u);
  }
}

// A tree with the shape of LibTorch's include folder.
void write_headers(const TempDir& folder) {
  for (int i = 0; i < 60; ++i) {
    folder.write_file("c10/util/header" + std::to_string(i) + ".h",
                      "// c10 header " + std::to_string(i) + "\n" + repeated("int x;\n", 10));
  }
  folder.write_file("ATen/core/Tensor.h", "class Tensor;\n");
  folder.write_file("ATen/core/Gen.h", "#pragma once\n// @generated by torchgen\n");
  folder.write_file("ATen/ops/add.h", "generated operator\n");
  folder.write_file("ATen/RedispatchFunctions.h", "generated dispatch\n");
  folder.write_file("torch/csrc/autograd/generated/Functions.h", "generated functions\n");
  folder.write_file("torch/csrc/README.md", "not a header\n");
  folder.write_file("google/protobuf/message.h", "vendored\n");
}

TEST(Embedded, LeavesOutGeneratedAndVendoredAndSplitsByFile) {
  const TempDir folder;
  write_headers(folder);
  const Dataset::Context context = {.sequence = 16, .batch = 2};
  const Options::Item path = {"path", folder.path()};
  const auto dataset = make_dataset("embedded", {path, {"valid_every", 4}}, context);
  EXPECT_NE(dataset->describe()[0].find("61 C++ headers"), std::string::npos)
      << dataset->describe()[0];
  EXPECT_EQ(valid_text(*dataset).find("generated"), std::string::npos);
  const auto share = static_cast<double>(dataset->valid_tokens()) /
                     static_cast<double>(dataset->valid_tokens() + dataset->train_tokens());
  EXPECT_GT(share, 0.05);
  EXPECT_LT(share, 0.6);
  // Whole files: each begins with its comment.
  EXPECT_EQ(valid_text(*dataset).substr(0, 5), "/ c10");
  EXPECT_EQ(make_dataset("embedded", {path, {"valid_every", 4}}, context)->identity(),
            dataset->identity());
  EXPECT_NE(make_dataset("embedded", {path, {"valid_every", 5}}, context)->identity(),
            dataset->identity());
  folder.write_file("c10/util/header7.h", "changed\n");
  EXPECT_NE(make_dataset("embedded", {path, {"valid_every", 4}}, context)->identity(),
            dataset->identity());
}

TEST(Embedded, RefusesAFolderWithoutHeaders) {
  const TempDir folder;
  expect_error(Fault::kData, {folder.path(), "data.path"}, [&] {
    make_dataset("embedded", {{"path", folder.path()}}, {.sequence = 16, .batch = 2});
  });
}

TEST(Embedded, FindsTheHeadersOfTheLoadedLibTorch) {
  const auto dataset = make_dataset("embedded", {}, {.sequence = 1024, .batch = 8});
  for (const auto& line : dataset->describe()) std::printf("%s\n", line.c_str());
  EXPECT_GT(dataset->train_tokens(), 5'000'000);
  const auto share = static_cast<double>(dataset->valid_tokens()) /
                     static_cast<double>(dataset->train_tokens() + dataset->valid_tokens());
  EXPECT_GT(share, 0.03);
  EXPECT_LT(share, 0.12);
  const auto losses = dataset->count_model_losses();
  ASSERT_EQ(losses.size(), 4u);
  for (const auto& [name, loss] : losses) std::printf("%s: %.3f nats a byte\n", name.c_str(), loss);
  for (size_t order = 1; order < 4; ++order)
    EXPECT_LT(losses[order].second, losses[order - 1].second);
  // LibTorch 2.11's headers give 1.92; another version's are not far.
  EXPECT_NEAR(losses[2].second, 1.9, 0.2);
}

// Keeps what it is shown, and gives it back.
class Memory final : public StateVisitor {
 public:
  void tensor(std::string_view, at::Tensor&, StateClass) override { FAIL(); }
  void number(std::string_view, double&) override { FAIL(); }
  void integer(std::string_view name, int64_t& value) override {
    EXPECT_EQ(name, "cursor");
    (loads ? value : cursor) = loads ? cursor : value;
  }
  void text(std::string_view name, std::string& value) override {
    EXPECT_EQ(name, "identity");
    (loads ? value : identity) = loads ? identity : value;
  }
  bool loading() const override { return loads; }

  bool loads = false;
  int64_t cursor = 0;
  std::string identity;
};

TEST(Dataset, ResumesFromItsCursorAndRefusesOtherData) {
  const TempDir folder;
  const auto path = folder.write_file("a.txt", repeated("abcdefg", 100));
  const Dataset::Context context = {.sequence = 4, .batch = 2, .seed = 1};
  const auto first = make_dataset("text", {{"files", path}}, context);
  for (int i = 0; i < 5; ++i) first->next_train_batch();
  Memory memory;
  first->visit_state(memory);
  EXPECT_EQ(memory.cursor, 5);

  memory.loads = true;
  const auto second = make_dataset("text", {{"files", path}}, context);
  second->visit_state(memory);
  EXPECT_EQ(second->cursor(), 5);
  EXPECT_TRUE(at::equal(second->next_train_batch().tokens, first->next_train_batch().tokens));

  folder.write_file("a.txt", repeated("abcdefg", 101));
  const auto other = make_dataset("text", {{"files", path}}, context);
  expect_error(Fault::kUsage, {first->identity(), other->identity()},
               [&] { other->visit_state(memory); });
  EXPECT_EQ(other->cursor(), 0);
  memory.cursor = -1;
  expect_error(Fault::kData, {"cursor"}, [&] { second->visit_state(memory); });
  EXPECT_EQ(second->cursor(), 6);
}

TEST(Dataset, EveryEntryIsDocumented) {
  make_dataset("embedded", {}, {.sequence = 8, .batch = 1});
  EXPECT_EQ(registry<Dataset>().store().names(),
            (std::vector<std::string>{"embedded", "text", "tokens"}));
}

}  // namespace
}  // namespace ounce::data
