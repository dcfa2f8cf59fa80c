// SPDX-License-Identifier: MIT
// Damaged and hostile files: nothing is loaded from them, nothing crashes.
#include "ckpt/sample_state.h"
#include "support/count_from.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/scan.h>

#include <iostream>
#include <random>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;
using ::testing::IsSubstring;

std::string manifest_with(const std::string& tensors, const std::string& format = "1",
                          const std::string& file = "rank00000.h5", const std::string& step = "1",
                          const std::string& sequence = "0") {
  return signed_text("\"format\":" + format + ",\"uuid\":\"u\",\"step\":" + step +
                     ",\"sequence\":" + sequence +
                     ",\"block_bytes\":4194304,"
                     "\"metrics\":{},\"notes\":{},\"scalars\":[],\"files\":[{\"name\":\"" +
                     file + "\",\"size\":100000,\"rest_xxh3\":\"\"}],\"tensors\":" + tensors + "}");
}

std::string tensor_with(const std::string& name, const std::string& shape,
                        const std::string& offset, const std::string& bytes,
                        const std::string& sums = "\"0123456789abcdef\"") {
  return "{\"name\":\"" + name + "\",\"dtype\":\"float32\",\"class\":\"step\",\"shape\":" + shape +
         ",\"file\":0,\"offset\":" + offset + ",\"bytes\":" + bytes + ",\"sums\":" + sums + "}";
}

StorageError::Kind kind_of(const std::string& text) {
  try {
    parse_manifest(text);
  } catch (const StorageError& error) {
    return error.kind();
  }
  return static_cast<StorageError::Kind>(-1);
}

TEST(Manifest, RefusesWhatItCannotTrust) {
  const auto good = manifest_with("[" + tensor_with("a", "[10]", "4096", "40") + "]");
  ASSERT_EQ(parse_manifest(good).tensors.at(0).bytes, 40);
  const std::string deep = std::string(1000000, '[') + std::string(1000000, ']');
  const std::string bad[] = {
      "",
      "{",
      good.substr(1),
      good + " ",
      signed_text(deep),
      signed_text("\"a\":" + deep + "}"),
      signed_text("\"format\":1}"),
      manifest_with(deep),
      manifest_with("{}"),
      manifest_with("[1]"),
      manifest_with("[" + tensor_with("../a", "[10]", "4096", "40") + "]"),
      manifest_with("[" + tensor_with("a\\u0000b", "[10]", "4096", "40") + "]"),
      manifest_with("[" + tensor_with("", "[10]", "4096", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[-1]", "4096", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[1e1]", "4096", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[18446744073709551615]", "4096", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[4611686018427387904,4]", "0", "0", "\"\"") + "]"),
      manifest_with("[" + tensor_with("a", "[4294967296,4294967296]", "0", "0", "\"\"") + "]"),
      manifest_with("[" + tensor_with("a", "[0,4294967296,4294967296]", "0", "4") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "9223372036854775807", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "99961", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "-1", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "4096", "44") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "4096", "40", "\"\"") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "4096", "40", "\"0123456789abcdeF\"") + "]"),
      manifest_with("[" + tensor_with("a", "[1" + std::string(100, '0') + "]", "0", "4") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "4096", "40") + "," +
                    tensor_with("a", "[10]", "8192", "40") + "]"),
      manifest_with("[" + tensor_with("a", "[10]", "4096", "40") + "," +
                    tensor_with("b", "[10]", "4100", "40") + "]"),
      manifest_with("[]", "1", "x", "1000000000000000000"),
      manifest_with("[]", "1", "x", "1", "1000000000000000000"),
      manifest_with("[]", "1", "x", "1", "9223372036854775807"),
      manifest_with("[]", "1", "../x"),
      manifest_with("[]", "1", ""),
      manifest_with("[]", "1", ".x"),
      manifest_with("[]", "1", "/etc/passwd"),
      manifest_with("[]", "0"),
      manifest_with("[]", "\"1\""),
      manifest_with("[]", "1", R"(f","size":0,"rest_xxh3":""},{"name":"f)"),
      manifest_with("[{\"name\":\"a\",\"dtype\":\"float32\",\"class\":\"\",\"shape\":[],"
                    "\"tied_to\":\"a\"}]"),
      manifest_with("[{\"name\":\"a\",\"dtype\":\"float32\",\"class\":\"\",\"shape\":[10],"
                    "\"tied_to\":\"\"}]")};
  for (const auto& text : bad) {
    EXPECT_EQ(kind_of(text), StorageError::Kind::kDamaged) << text.substr(0, 400);
  }
  EXPECT_EQ(kind_of(manifest_with("[]", "2")), StorageError::Kind::kNewerFormat);
}

TEST(Manifest, SurvivesItsOwnText) {
  Manifest manifest;
  manifest.uuid = "u";
  manifest.step = 12;
  manifest.notes = {{"config", "a = \"b\"\n# \xff µ"}};
  manifest.files = {{"rank00000.h5", 1 << 20, "sum"}};
  manifest.tensors.push_back({"a/b", "bfloat16", "step", {0, 3}, "", 0, 0, 0, {}});
  const auto text = manifest_text(manifest);
  EXPECT_EQ(manifest_text(parse_manifest(text)),
            manifest_text(parse_manifest(manifest_text(parse_manifest(text)))));
  // Any single flip is seen.
  for (size_t i = 0; i < text.size(); ++i) {
    auto flipped = text;
    flipped[i] = static_cast<char>(flipped[i] ^ (1 << (i % 8)));
    EXPECT_EQ(kind_of(flipped), StorageError::Kind::kDamaged) << i;
  }
}

TEST(Manifest, NamesStepsBothWays) {
  EXPECT_EQ(step_name(1000), "step_0000001000");
  for (const int64_t step :
       {int64_t{0}, int64_t{7}, int64_t{9999999999}, int64_t{123456789012345}}) {
    EXPECT_EQ(parse_step_name(step_name(step)), step);
    EXPECT_EQ(parse_replaced_name(".old-" + step_name(step) + "-ab"), step);
  }
  for (const auto* name : {"step_", "step_1", "step_000000000a", "step_00000000010", "x",
                           "step_99999999999999999999999", ".tmp-step_0000000001-ab"}) {
    EXPECT_EQ(parse_step_name(name), -1) << name;
    EXPECT_EQ(parse_replaced_name(name), -1) << name;
  }
}

class Damage : public ::testing::Test {
 protected:
  void SetUp() override {
    Checkpointer writer({.levels = {{.path = folder_.path(), .keep_last = 0}}});
    for (const int step : {1, 2}) {
      auto state = small_state(step, 20000);
      paths_.push_back(writer.save_and_wait(step, {{"s", &state}}).info.path);
    }
  }

  bool verifies() { return verify_step(posix_file_system(), paths_[1], false).problems.empty(); }

  // The damaged second step is passed over for the first, which is whole.
  void expect_fallback(const std::string& what) {
    EXPECT_FALSE(verifies()) << what;
    auto loaded = small_state(9, 20000);
    const auto report = load_checkpoint(folder_.path(), std::nullopt, {{"s", &loaded}});
    EXPECT_EQ(report.info.step, 1) << what;
    EXPECT_TRUE(same_state(loaded, small_state(1, 20000))) << what;
    EXPECT_EQ(report.rejected.size(), 1u) << what;
  }

  const TemporaryFolder folder_;
  std::vector<std::string> paths_;
};

TEST_F(Damage, EveryFlippedBitIsSeen) {
  const auto data = paths_[1] + "/rank00000.h5", manifest = paths_[1] + "/manifest.json";
  std::mt19937_64 random(7);
  ASSERT_TRUE(verifies());
  const auto reader = StepReader(posix_file_system(), paths_[1]);
  std::map<std::string, int> counts;
  const int flips = test::count_from("OUNCE_FLIPS", 300);
  for (int sample = 0; sample < flips; ++sample) {
    const std::string part = sample % 3 == 0 ? "data" : sample % 3 == 1 ? "hdf5" : "manifest";
    const auto path = part == "manifest" ? manifest : data;
    const auto whole = bytes_of(path);
    size_t place = random() % whole.size();
    if (part == "data") {
      const auto& tensor = *reader.find("s/w");
      place = tensor.offset + random() % tensor.bytes;
    } else if (part == "hdf5") {
      place = random() % 4096 + (sample % 2 == 0 ? 0 : 2048);  // where its structure begins
    }
    auto spoiled = whole;
    spoiled[place] = static_cast<char>(spoiled[place] ^ (1 << random() % 8));
    write_bytes(path, spoiled);
    expect_fallback(part + " byte " + std::to_string(place));
    write_bytes(path, whole);
    ++counts[part];
  }
  EXPECT_TRUE(verifies());
  for (const auto& [part, count] : counts) std::cout << part << ": " << count << " flips seen\n";
}

TEST_F(Damage, EveryTruncationIsSeen) {
  std::mt19937_64 random(8);
  for (const auto* name : {"/rank00000.h5", "/manifest.json"}) {
    const auto path = paths_[1] + name;
    const auto whole = bytes_of(path);
    for (int sample = 0; sample < 20; ++sample) {
      const size_t size = sample == 0   ? 0
                          : sample == 1 ? whole.size() - 1
                                        : random() % whole.size();
      write_bytes(path, whole.substr(0, size));
      expect_fallback(name + std::to_string(size));
    }
    write_bytes(path, whole + "x");
    expect_fallback("longer");
    fs::remove(path);
    if (name == std::string("/rank00000.h5")) {
      expect_fallback("missing");
      fs::create_symlink(paths_[0] + name, path);
      expect_fallback("a link to the other step's file");
      fs::remove(path);
    }
    write_bytes(path, whole);
  }
}

TEST_F(Damage, FilesOfAnotherStepAreRefused) {
  const std::string name = "/rank00000.h5";
  const auto own = bytes_of(paths_[1] + name);
  write_bytes(paths_[1] + name, bytes_of(paths_[0] + name));
  expect_fallback("data of step 1");
  write_bytes(paths_[1] + name, own);
  write_bytes(paths_[1] + "/manifest.json", bytes_of(paths_[0] + "/manifest.json"));
  expect_fallback("manifest of step 1");
}

TEST_F(Damage, VerifyNamesTensorAndBytes) {
  const auto path = paths_[1] + "/rank00000.h5";
  const auto offset = StepReader(posix_file_system(), paths_[1]).find("s/w")->offset;
  auto spoiled = bytes_of(path);
  spoiled[offset + 5] ^= 1;
  write_bytes(path, spoiled);
  const auto problems = verify_step(posix_file_system(), paths_[1], false).problems;
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_PRED_FORMAT2(IsSubstring,
                      "bytes " + std::to_string(offset) + " to " + std::to_string(offset + 80000),
                      problems[0]);
  EXPECT_PRED_FORMAT2(IsSubstring, "in tensor 's/w'", problems[0]);
}

TEST_F(Damage, ANewerFormatIsNotPassedOver) {
  write_bytes(paths_[1] + "/manifest.json", manifest_with("[]", "2"));
  auto loaded = small_state(9, 20000);
  const std::string text = "got format 2";
  const auto files = posix_file_system();
  for (const auto& path : {folder_.path(), paths_[1]}) {
    EXPECT_OUNCE_ERROR(load_checkpoint(path, std::nullopt, {{"s", &loaded}}), kNewerFormat, text);
  }
  EXPECT_OUNCE_ERROR(resolve_step(*files, folder_.path()), kNewerFormat, text);
  EXPECT_OUNCE_ERROR(list_checkpoints(folder_.path()), kNewerFormat, text);
  EXPECT_OUNCE_ERROR(with_faults([&] { verify_step(files, paths_[1], false); }), kNewerFormat,
                     text);
  // Whoever asks for an older one by its number has decided.
  EXPECT_EQ(load_checkpoint(folder_.path(), 1, {{"s", &loaded}}).info.step, 1);
}

TEST_F(Damage, AManifestOfMoreFilesThanRanksIsRefused) {
  std::string list;
  for (size_t i = 0; i <= kMostFiles; ++i) {
    list += "{\"name\":\"f" + std::to_string(i) + "\",\"size\":0,\"rest_xxh3\":\"\"},";
  }
  list.back() = ']';
  const auto text = bytes_of(paths_[1] + "/manifest.json");
  const auto start = text.find("\"format\""), files = text.find('[', text.find("\"files\""));
  const auto hostile = signed_text(text.substr(start, files + 1 - start) + list +
                                   text.substr(text.find(']', files) + 1));
  EXPECT_EQ(kind_of(hostile), StorageError::Kind::kDamaged);
}

TEST_F(Damage, TheContainerIsComparedWithTheManifest) {
  const auto path = paths_[1] + "/rank00000.h5";
  const auto files = posix_file_system();
  const auto manifest = read_manifest(*files, paths_[1]);
  EXPECT_TRUE(compare_container(path, manifest).empty());
  const auto problem_of = [&](const auto& change) {
    auto changed = manifest;
    change(changed.tensors[0]);
    const auto problems = compare_container(path, changed);
    return problems.size() == 1 ? problems[0] : std::to_string(problems.size()) + " problems";
  };
  EXPECT_EQ(problem_of([](auto& tensor) { tensor.dtype = "int32"; }),
            "libhdf5 finds another type of 's/w'");
  EXPECT_EQ(problem_of([](auto& tensor) {
              tensor.shape = {2, 10000};
            }),
            "libhdf5 finds another shape of 's/w'");
  EXPECT_EQ(problem_of([](auto& tensor) { tensor.offset += 4096; }),
            "libhdf5 finds 's/w' at another offset");
  EXPECT_PRED_FORMAT2(IsSubstring, "no dataset 's/v'",
                      problem_of([](auto& tensor) { tensor.name = "s/v"; }));
  write_bytes(path, "garbage");
  const auto problems = compare_container(path, manifest);
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_PRED_FORMAT2(IsSubstring, "cannot open", problems[0]);
}

TEST_F(Damage, ADamagedContainerDoesNotReachUsThroughLibhdf5) {
  const auto path = paths_[1] + "/rank00000.h5";
  const auto whole = bytes_of(path);
  std::mt19937_64 random(9);
  for (int sample = 0; sample < 20; ++sample) {
    auto spoiled = whole;
    for (int i = 0; i < 200; ++i) spoiled[random() % 8192] = static_cast<char>(random());
    write_bytes(path, spoiled);
    EXPECT_FALSE(verify_step(posix_file_system(), paths_[1], true).problems.empty());
  }
}

}  // namespace
}  // namespace ounce::ckpt
