// SPDX-License-Identifier: MIT
// `tokens`: shards, hostile headers, and GPT-2's vocabulary.
#include <gtest/gtest.h>
#include <ounce/core/data/gpt2_vocabulary.h>
#include <ounce/core/data/token_shards.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <numeric>

#include "data/make_dataset.h"
#include "support/expect_error.h"
#include "support/temp_dir.h"

namespace ounce::data {
namespace {

using test::expect_error;
using test::make_dataset;
using test::TempDir;

std::string header(int32_t magic, int32_t version, int32_t count) {
  std::vector<int32_t> words(256);
  words[0] = magic;
  words[1] = version;
  words[2] = count;
  return {reinterpret_cast<const char*>(words.data()), 1024};
}

template <class T>
std::string shard(const std::vector<T>& tokens) {
  const auto count = static_cast<int32_t>(tokens.size());
  return (sizeof(T) == 2 ? header(20240520, 1, count) : header(20240801, 7, count)) +
         std::string(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(T));
}

std::vector<uint16_t> count_up(uint16_t from, size_t count) {
  std::vector<uint16_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), from);
  return tokens;
}

TEST(Tokens, ReadsAcrossShardBoundaries) {
  const TempDir folder;
  folder.write_file("train_0.bin", shard(count_up(0, 10)));
  folder.write_file("train_1.bin", shard(count_up(10, 1)));
  folder.write_file("train_2.bin", shard(count_up(11, 89)));
  std::vector<std::shared_ptr<const TokenShard>> shards;
  for (const auto* name : {"train_0.bin", "train_1.bin", "train_2.bin"}) {
    shards.push_back(std::make_shared<const TokenShard>(folder / name));
  }
  const ShardSource whole(shards, 100);
  ASSERT_EQ(whole.size(), 100);
  for (int64_t begin = 0; begin < 100; ++begin) {
    for (int64_t count = 0; begin + count <= 100; ++count) {
      std::vector<int64_t> read(count + 1, -1);
      whole.read(begin, count, read.data());
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(read[i], begin + i);
      ASSERT_EQ(read[count], -1);
    }
  }
  const ShardSource part(shards, 100, 9, 12);
  int64_t read[3];
  part.read(0, 3, read);
  EXPECT_EQ(part.size(), 3);
  EXPECT_EQ(read[0], 9);
  EXPECT_EQ(read[2], 11);

  const auto dataset =
      make_dataset("tokens", {{"files", folder / "train_*.bin"}, {"valid_fraction", 0.2}},
                   {.sequence = 8, .batch = 9});
  EXPECT_EQ(dataset->vocab_size(), 50257);
  EXPECT_EQ(dataset->train_tokens(), 80);
  EXPECT_EQ(dataset->valid_tokens(), 20);
  const auto batch = dataset->train_batch(0);
  EXPECT_TRUE(at::equal(batch.targets, batch.tokens + 1));
  EXPECT_EQ(dataset->valid_batch(0).tokens[0][0].item<int64_t>(), 80);
}

TEST(Tokens, WideIdsValidationFilesAndPackedDocuments) {
  const TempDir folder;
  folder.write_file("t.bin", shard(std::vector<uint32_t>(64, 128000)));
  folder.write_file("v.bin", shard(std::vector<uint32_t>{128001, 5, 6, 128001, 7}));
  const auto dataset = make_dataset("tokens",
                                    {{"files", folder / "t.bin"},
                                     {"valid_files", folder / "v.bin"},
                                     {"vocab_size", 128256},
                                     {"eos", 128001}},
                                    {.sequence = 4, .batch = 2, .packed = true});
  EXPECT_EQ(dataset->document_end(), 128001);
  const auto batch = dataset->valid_batch(0);
  EXPECT_TRUE(at::equal(batch.cu_seqlens, at::tensor({0, 1, 4}, at::kInt)));
  EXPECT_TRUE(at::equal(
      batch.targets,
      at::tensor({kIgnoredTarget, int64_t{6}, int64_t{128001}, kIgnoredTarget}).view({1, 4})));
  EXPECT_EQ(batch.counted, 2);
  expect_error(Fault::kUsage, {"packed", "data.eos"}, [&] {
    make_dataset("tokens", {{"files", folder / "t.bin"}, {"vocab_size", 128256}, {"eos", -1}},
                 {.sequence = 4, .batch = 2, .packed = true});
  });
}

TEST(Tokens, DamagedShardsAreNamed) {
  const TempDir folder;
  const auto refuse = [&](const std::string& content, std::initializer_list<std::string> parts) {
    const auto path = folder.write_file("bad.bin", content);
    expect_error(Fault::kData, {"bad.bin"}, [&] { TokenShard{path}; });
    expect_error(Fault::kData, parts, [&] {
      make_dataset("tokens", {{"files", path}}, {.sequence = 4, .batch = 1});
    });
  };
  const auto good = shard(count_up(0, 100));
  refuse("", {"0 bytes", "1024"});
  refuse(good.substr(0, 1023), {"1023 bytes"});
  refuse(good.substr(0, 1024), {"100 tokens", "1224 bytes", "got 1024"});
  refuse(good.substr(0, 1223), {"1224 bytes", "got 1223"});
  refuse(good + "x", {"1224 bytes", "got 1225"});
  refuse(header(20240520, 1, 0), {"0 tokens"});
  refuse(header(20240520, 1, -4) + std::string(64, 'x'), {"-4 tokens"});
  refuse(header(20240520, 1, 0x7fffffff) + std::string(64, 'x'), {"2147483647 tokens"});
  refuse(header(20240520, 7, 2) + "xxxx", {"20240520 version 7"});
  refuse(header(20240520, 2, 2) + "xxxx", {"20240520 version 2"});
  refuse(header(0x04034b50, 1, 2) + "xxxx", {"magic 20240520"});
  expect_error(Fault::kData, {"'/"}, [&] { TokenShard{folder.path()}; });
  expect_error(Fault::kData, {"none.bin"}, [&] { TokenShard{folder / "none.bin"}; });
}

TEST(Tokens, IdsOutsideTheVocabularyAreFoundWhereTheyAre) {
  const TempDir folder;
  auto tokens = count_up(0, 50);
  tokens[17] = 50257;
  const auto path = folder.write_file("a.bin", shard(tokens));
  const auto dataset = make_dataset("tokens", {{"files", path}, {"valid_fraction", 0}},
                                    {.sequence = 4, .batch = 11});
  expect_error(Fault::kData, {"a.bin", "50257", "token 17", "byte 1058", "data.vocab_size"},
               [&] { dataset->train_batch(0); });
  expect_error(Fault::kUsage, {"eos", "40"}, [&] {
    make_dataset("tokens", {{"files", path}, {"vocab_size", 40}}, {.sequence = 4, .batch = 1});
  });
}

TEST(Tokens, IdentityFollowsContentAndOptions) {
  const TempDir folder;
  const auto identity = [&](const std::vector<Options::Item>& more) {
    std::vector<Options::Item> options = {{"files", folder / "*.bin"}};
    options.insert(options.end(), more.begin(), more.end());
    return make_dataset("tokens", options, {.sequence = 4, .batch = 1})->identity();
  };
  folder.write_file("a.bin", shard(count_up(0, 50)));
  const auto first = identity({});
  EXPECT_EQ(identity({}), first);
  EXPECT_NE(identity({{"vocab_size", 60000}}), first);
  EXPECT_NE(identity({{"eos", -1}}), first);
  EXPECT_NE(identity({{"valid_fraction", 0.5}}), first);
  folder.write_file("a.bin", shard(count_up(1, 50)));
  EXPECT_NE(identity({}), first);
  folder.write_file("a.bin", shard(count_up(0, 50)));
  EXPECT_EQ(identity({}), first);
  folder.write_file("b.bin", shard(count_up(0, 50)));
  EXPECT_NE(identity({}), first);
}

TEST(Tokens, LargeShardsAreToldApartByPieces) {
  const TempDir folder;
  const int32_t count = 40'000'000;  // 80 MB, a hole in the file system
  const auto path = folder.write_file("a.bin", header(20240520, 1, count));
  std::filesystem::resize_file(path, 1024 + int64_t{2} * count);
  const auto first = TokenShard(path).fingerprint();
  EXPECT_EQ(TokenShard(path).fingerprint(), first);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-1, std::ios::end);  // the last token
  file.put('\1').flush();
  const auto second = TokenShard(path).fingerprint();
  EXPECT_NE(second, first);
  file.seekp(1024);  // the first one
  file.put('\1').flush();
  EXPECT_NE(TokenShard(path).fingerprint(), second);
}

TEST(Tokens, WithoutAVocabularyTextIsIds) {
  const TempDir folder;
  const auto path = folder.write_file("a.bin", shard(count_up(0, 50)));
  const auto dataset = make_dataset("tokens", {{"files", path}}, {.sequence = 4, .batch = 1});
  EXPECT_EQ(dataset->decode({5, 50256, 0}), "5 50256 0");
  EXPECT_EQ(dataset->encode(" 5 50256\n0 "), (std::vector<int64_t>{5, 50256, 0}));
  EXPECT_TRUE(dataset->encode("\n").empty());
  for (const auto* text : {"hello", "5x", "-1", "50257", "99999999999999999999", "5,6"}) {
    expect_error(Fault::kUsage, {text, "data.vocabulary"}, [&] { dataset->encode(text); });
  }
}

// "Ġ" is the space, "Ċ" the line end, "Ã" the byte 0xc3, "©" 0xa9, "Ń" 0xad.
constexpr const char* kVocabulary = R"({"h": 0, "e": 1, "l": 2, "o": 3, "hell": 4, "\u0120": 5,
  "\u0120o": 6, "\u010a": 7, "\u00c3": 8, "\u00a9": 9, "<|endoftext|>": 11, "\u0143": 12,
  "\u00ff": 13})";

TEST(Gpt2Vocabulary, DecodesBytesAndEncodesTheLongestMatch) {
  const TempDir folder;
  const Gpt2Vocabulary vocabulary(folder.write_file("encoder.json", kVocabulary), 14);
  EXPECT_EQ(vocabulary.decode({4, 3, 6, 7}), "hello o\n");
  EXPECT_EQ(vocabulary.decode({8, 9}), "\xc3\xa9");
  EXPECT_EQ(vocabulary.decode({12, 13}), "\xad\xff");
  EXPECT_EQ(vocabulary.decode({11}), "<|endoftext|>");
  EXPECT_EQ(vocabulary.decode({0, 10, 0}), "h\xef\xbf\xbdh");  // no entry has 10
  EXPECT_EQ(vocabulary.encode("hello o he\n\xc3\xa9"),
            (std::vector<int64_t>{4, 3, 6, 5, 0, 1, 7, 8, 9}));
  EXPECT_TRUE(vocabulary.encode("").empty());
  expect_error(Fault::kUsage, {"byte 2", "encoder.json"}, [&] { vocabulary.encode("hez"); });
  expect_error(Fault::kUsage, {"14"}, [&] { vocabulary.decode({14}); });
}

TEST(Gpt2Vocabulary, EveryByteHasItsCharacter) {
  // The table as openai/gpt-2 builds it, against a vocabulary of the 256 single bytes.
  std::string json = "{";
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    char entry[32];
    std::snprintf(entry, sizeof entry, "%s\"\\u%04x\": %d", byte ? ", " : "",
                  printable ? byte : next++, byte);
    json += entry;
  }
  const TempDir folder;
  const Gpt2Vocabulary vocabulary(folder.write_file("vocab.json", json + "}"), 256);
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(vocabulary.decode({byte}), std::string(1, static_cast<char>(byte)));
    EXPECT_EQ(vocabulary.encode(std::string(1, static_cast<char>(byte))),
              std::vector<int64_t>{byte});
  }
}

TEST(Gpt2Vocabulary, RefusesOtherFiles) {
  const TempDir folder;
  const auto refuse = [&](const std::string& json, const std::string& part) {
    const auto path = folder.write_file("v.json", json);
    expect_error(Fault::kData, {"v.json", part}, [&] { Gpt2Vocabulary(path, 100); });
  };
  refuse("", "is empty");
  refuse("{", "JSON");
  refuse("[1, 2]", "JSON");
  refuse("{}", "JSON");
  refuse(R"({"a": "b"})", "id below 100");
  refuse(R"({"a": -1})", "id below 100");
  refuse(R"({"a": 100})", "id below 100");
  refuse(R"({"a": 1, "b": 1})", "twice");
  refuse(R"({"": 1})", "is empty");
  refuse(R"({"\u4e2d": 1})", "byte table");
  refuse(R"({"a b": 1})", "byte table");
  refuse("{\"\xff\": 1}", "JSON");
}

TEST(Tokens, DecodesWithAVocabulary) {
  const TempDir folder;
  const auto path = folder.write_file("a.bin", shard(count_up(0, 14)));
  const auto dataset = make_dataset("tokens",
                                    {{"files", path},
                                     {"vocabulary", folder.write_file("encoder.json", kVocabulary)},
                                     {"vocab_size", 14},
                                     {"eos", 11}},
                                    {.sequence = 2, .batch = 1});
  EXPECT_EQ(dataset->decode({4, 3}), "hello");
  EXPECT_EQ(dataset->encode("hello"), (std::vector<int64_t>{4, 3}));
}

}  // namespace
}  // namespace ounce::data
