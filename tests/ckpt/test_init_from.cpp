// SPDX-License-Identifier: MIT
#include "ckpt/sample_state.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/init_from.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/safetensors.h>
#include <ounce/ckpt/storage_error.h>
#include <ounce/core/check.h>

#include <fstream>

namespace ounce::ckpt {
namespace {

using ::testing::IsSubstring;

void write_safetensors(const std::string& path, const std::string& header,
                       const std::string& data) {
  std::string prefix(8, '\0');
  for (int i = 0; i < 8; ++i) prefix[i] = static_cast<char>(header.size() >> (8 * i));
  write_bytes(path, prefix + header + data);
}

struct Pair : torch::nn::Module {
  Pair() {
    a = register_parameter("a", at::zeros({2, 3}));
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
                    R"("net.a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
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
  Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(3, {{"", &state}});
  Pair module;
  EXPECT_TRUE(load_weights(folder.path(), module).good());
  EXPECT_TRUE(same_bits(module.a.detach(), a));
  EXPECT_EQ(module.count.item<int64_t>(), 7);
}

TEST(InitFrom, PassesOverDamagedStepsAndStopsAtALaterVersions) {
  const TemporaryFolder folder;
  Checkpointer writer({.levels = {{.path = folder.path(), .keep_last = 0}}});
  std::vector<std::string> paths;
  for (const int64_t step : {1, 2, 3}) {
    SampleState state;
    state.tensors = {{"model/a", at::full({2, 3}, static_cast<float>(step))},
                     {"model/b", at::zeros({2}, at::kBFloat16)},
                     {"model/count", at::full({}, step, at::kLong)}};
    paths.push_back(writer.save_and_wait(step, {{"", &state}}).info.path);
  }
  std::filesystem::resize_file(paths[2] + "/rank00000.h5", 5000);
  write_bytes(paths[1] + "/manifest.json", "{}");
  Pair module;
  const auto report = load_weights(folder.path(), module);
  EXPECT_EQ(report.source, paths[0]);
  EXPECT_EQ(report.rejected.size(), 2u);
  EXPECT_EQ(module.count.item<int64_t>(), 1);
  EXPECT_OUNCE_ERROR(load_weights(paths[2], module), kData, "rank00000.h5");
  EXPECT_EQ(resolve_step(*posix_file_system(), folder.path()), paths[2]) << "its manifest is whole";
  write_bytes(paths[1] + "/manifest.json", signed_text("\"format\":2}"));
  EXPECT_OUNCE_ERROR(load_weights(folder.path(), module), kNewerFormat, "got format 2");
}

TEST(InitFrom, ReportsEverythingThatDoesNotFit) {
  const TemporaryFolder folder;
  const auto path = folder.path() + "/w.safetensors";
  write_safetensors(path,
                    R"({"a":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},)"
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
    EXPECT_PRED_FORMAT2(IsSubstring, "1 missing: b", text);
    EXPECT_PRED_FORMAT2(IsSubstring, "1 unexpected: other", text);
    EXPECT_PRED_FORMAT2(IsSubstring, "a (expected float32[2, 3], got float32[3, 2])", text);
    EXPECT_PRED_FORMAT2(IsSubstring, "count (expected int64[], got float64[])", text);
  }
  EXPECT_EQ(module.a.abs().sum().item<double>(), 0);
  EXPECT_EQ(load_weights(path, module, {}, /*strict=*/false).missing.size(), 1u);
  for (const auto& rules : {std::vector<std::string>{"a"}, {"a=b=c"}, {"other=a"}}) {
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
