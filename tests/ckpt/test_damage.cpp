// SPDX-License-Identifier: MIT
// Damaged and hostile files: nothing is loaded from them, nothing crashes.
#include "ckpt/sample_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <ounce/ckpt/init_from.h>
#include <ounce/ckpt/reader.h>
#include <ounce/ckpt/safetensors.h>
#include <ounce/ckpt/storage_error.h>
#include <ounce/ckpt/sums.h>
#include <ounce/core/check.h>

#include <fstream>
#include <iostream>
#include <random>
#include <sstream>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string bytes_of(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

// A manifest with the right sum for whatever it says.
std::string signed_text(std::string body) {
  const std::string start = "{\"self_xxh3\":\"";
  auto text = start + std::string(32, '0') + "\"," + body;
  RunningSum sum;
  sum.add(text.data(), text.size());
  return text.replace(start.size(), 32, sum.digits());
}

std::string manifest_with(const std::string& tensors, const std::string& format = "1",
                          const std::string& file = "rank00000.h5") {
  return signed_text("\"format\":" + format +
                     ",\"uuid\":\"u\",\"step\":1,\"sequence\":0,\"block_bytes\":4194304,"
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
      manifest_with("[]", "1", "../x"),
      manifest_with("[]", "1", ""),
      manifest_with("[]", "1", ".x"),
      manifest_with("[]", "1", "/etc/passwd"),
      manifest_with("[]", "0"),
      manifest_with("[]", "\"1\""),
      manifest_with("[{\"name\":\"a\",\"dtype\":\"float32\",\"class\":\"\",\"shape\":[],"
                    "\"tied_to\":\"a\"}]")};
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
  }
  for (const auto* name : {"step_", "step_1", "step_000000000a", "step_00000000010", "x",
                           "step_99999999999999999999999", ".tmp-step_0000000001-ab"}) {
    EXPECT_EQ(parse_step_name(name), -1) << name;
  }
}

class Damage : public ::testing::Test {
 protected:
  void SetUp() override {
    Checkpointer writer({.root = folder_.path(), .keep_last = 0});
    for (const int step : {1, 2}) {
      auto state = small_state(step, 20000);
      paths_.push_back(writer.save(step, {{"s", &state}}).info.path);
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
  for (int sample = 0; sample < 300; ++sample) {
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
  EXPECT_THAT(problems[0], HasSubstr("bytes " + std::to_string(offset) + " to " +
                                     std::to_string(offset + 80000)));
  EXPECT_THAT(problems[0], HasSubstr("in tensor 's/w'"));
}

TEST_F(Damage, ANewerFormatIsNotPassedOver) {
  write_bytes(paths_[1] + "/manifest.json", manifest_with("[]", "2"));
  auto loaded = small_state(9, 20000);
  for (const auto& path : {folder_.path(), paths_[1]}) {
    try {
      load_checkpoint(path, std::nullopt, {{"s", &loaded}});
      FAIL() << "expected an error";
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kNewerFormat);
      EXPECT_THAT(error.what_without_backtrace(), HasSubstr("got format 2"));
    }
  }
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

// ---- safetensors

void write_safetensors(const std::string& path, const std::string& header,
                       const std::string& data) {
  std::string prefix(8, '\0');
  for (int i = 0; i < 8; ++i) prefix[i] = static_cast<char>(header.size() >> (8 * i));
  write_bytes(path, prefix + header + data);
}

struct Pair : torch::nn::Module {
  Pair() {
    a = register_parameter("a.weight", at::zeros({2, 3}));
    b = register_parameter("b", at::zeros({2}, at::kBFloat16));
    register_parameter("tied", a);
    count = register_buffer("count", at::zeros({}, at::kLong));
  }
  at::Tensor a, b, count;
};

std::string data_of(const at::Tensor& tensor) {
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()};
}

TEST(InitFrom, ReadsSafetensorsWithANameMap) {
  const TemporaryFolder folder;
  const auto path = folder.path() + "/w.safetensors";
  const auto a = at::randn({2, 3}), b = at::randn({2});
  const auto count = at::full({}, 42, at::kLong);
  write_safetensors(path,
                    R"({"__metadata__":{"format":"pt"},)"
                    R"("net.a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                    R"("net.b":{"dtype":"F32","shape":[2],"data_offsets":[24,32]},)"
                    R"("count":{"dtype":"I64","shape":[],"data_offsets":[32,40]}})",
                    data_of(a) + data_of(b) + data_of(count));
  Pair module;
  const auto report = load_weights(path, module, {"net.=", "x=y"});
  EXPECT_EQ(report.loaded.size(), 3u);
  EXPECT_TRUE(same_bits(module.a.detach(), a));
  EXPECT_TRUE(same_bits(module.b.detach(), b.to(at::kBFloat16)));
  EXPECT_EQ(module.count.item<int64_t>(), 42);
}

TEST(InitFrom, ReadsTheWeightsOfACheckpointOnly) {
  const TemporaryFolder folder;
  SampleState state;
  const auto a = at::randn({2, 3});
  state.tensors = {{"model/tied", a},  // under its other name
                   {"model/b", at::randn({2}, at::kBFloat16)},
                   {"model/count", at::full({}, 7, at::kLong)},
                   {"optim/a.weight/exp_avg", at::randn({2, 3})}};
  state.integers = {{"step", 3}};
  Checkpointer({.root = folder.path()}).save(3, {{"", &state}});
  Pair module;
  EXPECT_TRUE(load_weights(folder.path(), module).good());
  EXPECT_TRUE(same_bits(module.a.detach(), a));
  EXPECT_EQ(module.count.item<int64_t>(), 7);
}

TEST(InitFrom, ReportsEverythingThatDoesNotFit) {
  const TemporaryFolder folder;
  const auto path = folder.path() + "/w.safetensors";
  write_safetensors(path,
                    R"({"a.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},)"
                    R"("other":{"dtype":"F32","shape":[2],"data_offsets":[24,32]},)"
                    R"("count":{"dtype":"F64","shape":[],"data_offsets":[32,40]}})",
                    std::string(40, '\1'));
  Pair module;
  try {
    load_weights(path, module);
    FAIL() << "expected an error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kUsage);
    const std::string text = error.what_without_backtrace();
    EXPECT_THAT(text, HasSubstr("1 missing: b"));
    EXPECT_THAT(text, HasSubstr("1 unexpected: other"));
    EXPECT_THAT(text, HasSubstr("a.weight (expected float32[2, 3], got float32[3, 2])"));
    EXPECT_THAT(text, HasSubstr("count (expected int64[], got float64[])"));
  }
  EXPECT_EQ(module.a.abs().sum().item<double>(), 0);
  EXPECT_EQ(load_weights(path, module, {}, /*strict=*/false).missing.size(), 1u);
  for (const auto& rules : {std::vector<std::string>{"a"}, {"a=b=c"}, {"other=a", "a.weight=a"}}) {
    EXPECT_THROW(load_weights(path, module, rules), Error);
  }
}

TEST(Safetensors, RefusesHostileHeaders) {
  const TemporaryFolder folder;
  const auto path = folder.path() + "/w.safetensors";
  const std::string deep = std::string(1000000, '[') + std::string(1000000, ']');
  const auto entry = [](const std::string& shape, const std::string& offsets) {
    return "{\"a\":{\"dtype\":\"F32\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
  };
  const std::string bad[] = {"",
                             "[]",
                             deep,
                             "{\"a\":" + deep + "}",
                             "{\"a\":1}",
                             entry("[10]", "[0,44]"),
                             entry("[10]", "[4,40]"),
                             entry("[10]", "[40,0]"),
                             entry("[11]", "[0,44]"),
                             entry("[-10]", "[0,40]"),
                             entry("[4611686018427387904,4]", "[0,0]"),
                             entry("[10]", "[18446744073709551576,0]"),
                             entry("[10]", "[0]"),
                             entry("10", "[0,40]"),
                             "{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]},"
                             "\"b\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[16,36]}}",
                             "{\"../a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]}}",
                             "{\"a\":{\"dtype\":\"Q4\",\"shape\":[5],\"data_offsets\":[0,20]}}"};
  for (const auto& header : bad) {
    write_safetensors(path, header, std::string(40, 'x'));
    EXPECT_THROW(SafetensorsReader(posix_file_system(), path), StorageError)
        << header.substr(0, 200);
  }
  for (const auto& bytes : {std::string(), std::string(7, '\0'), std::string(8, '\xff'),
                            std::string(8, '\xff') + "{}"}) {
    write_bytes(path, bytes);
    EXPECT_THROW(SafetensorsReader(posix_file_system(), path), StorageError);
  }
  write_safetensors(path, entry("[10]", "[0,40]"), std::string(40, 'x'));
  EXPECT_EQ(SafetensorsReader(posix_file_system(), path).tensors().size(), 1u);
  EXPECT_THROW(SafetensorsReader(posix_file_system(), folder.path()), StorageError);
  EXPECT_THROW(SafetensorsReader(posix_file_system(), path + ".absent"), StorageError);
}

}  // namespace
}  // namespace ounce::ckpt
