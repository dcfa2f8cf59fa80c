// SPDX-License-Identifier: MIT
// What export writes, read back: bits, names, shards, conversions; failures leave nothing.
#include "ckpt/faulty_file_system.h"
#include "ckpt/sample_state.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/export.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/safetensors.h>

#include <iostream>
#include <nlohmann/json.hpp>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;

constexpr at::ScalarType kDtypes[] = {at::kFloat,
                                      at::kDouble,
                                      at::kHalf,
                                      at::kBFloat16,
                                      at::kByte,
                                      at::kChar,
                                      at::kShort,
                                      at::kInt,
                                      at::kLong,
                                      at::kUInt16,
                                      at::kUInt32,
                                      at::kUInt64,
                                      at::kBool,
                                      at::kComplexFloat,
                                      at::kFloat8_e4m3fn,
                                      at::kFloat8_e5m2,
                                      at::kFloat8_e4m3fnuz,
                                      at::kFloat8_e5m2fnuz};

using Values = std::map<std::string, at::Tensor>;

Values values_of(const std::string& path) {
  Values values;
  const SafetensorsReader reader(posix_file_system(), path);
  for (const auto& tensor : reader.tensors()) {
    auto value = at::empty(tensor.shape, at::dtype(dtype_of_name(tensor.dtype)));
    reader.read(tensor, value.data_ptr());
    values.emplace(tensor.name, value);
  }
  return values;
}

class Export : public ::testing::Test {
 protected:
  // A step of these tensors under model/, and a moment that is not the model's.
  std::string save(const std::vector<NamedTensor>& tensors, int64_t step = 7) {
    SampleState state, moment;
    state.tensors = tensors;
    moment.tensors = {{"w/exp_avg", at::ones({3})}};
    Checkpointer writer({.levels = {{.path = root_, .keep_last = 0}}});
    return writer.save_and_wait(step, {{"model", &state}, {"optim", &moment}}).info.path;
  }

  void expect_nothing_at(const std::string& path) {
    EXPECT_FALSE(fs::exists(path)) << path;
    for (const auto& entry : fs::directory_iterator(folder_.path())) {
      EXPECT_FALSE(entry.path().string().ends_with(".tmp")) << entry.path();
    }
  }

  const TemporaryFolder folder_;
  const std::string root_ = folder_.path() + "/ckpt", out_ = folder_.path() + "/out";
  at::Generator generator_ = at::detail::createCPUGenerator(5);
};

TEST_F(Export, KeepsEveryBitOfEveryDtype) {
  std::vector<NamedTensor> tensors;
  for (const auto dtype : kDtypes) {
    const auto name = dtype_name(dtype);
    tensors.push_back({name, random_bits({3, 5}, dtype, generator_)});
    tensors.push_back({name + ".scalar", random_bits({}, dtype, generator_)});
    tensors.push_back({name + ".empty", at::empty({0, 4}, dtype)});
  }
  tensors.push_back({"tied", tensors[0].value});
  const auto path = save(tensors);
  const auto report = export_safetensors(root_, out_);
  EXPECT_EQ(report.files, std::vector<std::string>{out_ + "/model.safetensors"});
  EXPECT_EQ(report.info.path, path);
  EXPECT_EQ(report.tensors, static_cast<int64_t>(tensors.size()));
  const auto values = values_of(report.files[0]);
  ASSERT_EQ(values.size(), tensors.size());
  for (const auto& tensor : tensors) {
    EXPECT_TRUE(same_bits(values.at(tensor.name), tensor.value)) << tensor.name;
  }
  const SafetensorsReader reader(posix_file_system(), report.files[0]);
  for (const auto& tensor : reader.tensors()) {
    EXPECT_EQ(tensor.offset % dtype_bytes(tensor.dtype), 0) << tensor.name;
  }
  EXPECT_EQ(reader.metadata().at("format"), "pt");
  EXPECT_EQ(reader.metadata().at("step"), "7");
  EXPECT_EQ(reader.metadata().at("uuid"), report.info.uuid);
  EXPECT_EQ(reader.metadata().at("prefix"), "model/");
  EXPECT_EQ(bytes_of(report.files[0])[0] % 8, 0) << "the header's length";
  // Everything, into a file of its own name.
  const auto all = export_safetensors(path, folder_.path() + "/all.safetensors", {.all = true});
  const auto every = values_of(folder_.path() + "/all.safetensors");
  EXPECT_EQ(every.size(), tensors.size() + 1);
  EXPECT_TRUE(same_bits(every.at("optim/w/exp_avg"), at::ones({3})));
  EXPECT_TRUE(same_bits(every.at("model/tied"), tensors[0].value));
}

TEST_F(Export, FillsShardsInTheOrderOfNames) {
  std::vector<NamedTensor> tensors;
  for (int i = 0; i < 10; ++i) {
    tensors.push_back({"layer." + std::to_string(9 - i), at::randn({25}, generator_)});
  }
  tensors.push_back({"layer.4x", at::randn({100}, generator_)});  // more than a shard of its own
  save(tensors);
  const auto report = export_safetensors(root_, out_, {.shard_bytes = 250});
  ASSERT_EQ(report.files.size(), 8u);
  EXPECT_EQ(report.files[0], out_ + "/model-00001-of-00007.safetensors");
  const auto index = nlohmann::json::parse(bytes_of(out_ + "/model.safetensors.index.json"));
  EXPECT_EQ(index.at("metadata").at("total_size"), 10 * 100 + 400);
  EXPECT_EQ(index.at("weight_map").size(), tensors.size());
  size_t found = 0;
  for (size_t i = 0; i < 7; ++i) {
    const auto values = values_of(report.files[i]);
    found += values.size();
    size_t bytes = 0;
    for (const auto& [name, value] : values) {
      bytes += value.nbytes();
      EXPECT_EQ(out_ + "/" + index.at("weight_map").at(name).get<std::string>(), report.files[i]);
      const auto original = std::find_if(tensors.begin(), tensors.end(),
                                         [&](const auto& tensor) { return tensor.name == name; });
      EXPECT_TRUE(same_bits(value, original->value)) << name;
    }
    EXPECT_TRUE(bytes <= 250 || values.size() == 1) << report.files[i];
  }
  EXPECT_EQ(found, tensors.size());
  // Another export in its place, here through a link, leaves no shard of this one.
  fs::create_directory_symlink(out_, folder_.path() + "/link");
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_), kUsage, "is there already");
  export_safetensors(root_, folder_.path() + "/link", {.replace = true});
  EXPECT_EQ(std::distance(fs::directory_iterator(out_), {}), 1);
  EXPECT_EQ(values_of(out_ + "/model.safetensors").size(), tensors.size());
}

TEST_F(Export, ConvertsAsTorchDoes) {
  std::vector<NamedTensor> tensors;
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16, at::kFloat8_e4m3fn,
                           at::kFloat8_e5m2, at::kFloat8_e4m3fnuz}) {
    tensors.push_back({dtype_name(dtype), random_bits({4000}, dtype, generator_)});
  }
  tensors.push_back({"float64", at::randn({4000}, generator_).to(at::kDouble)});
  tensors.push_back({"large", at::randn({(1 << 20) + 3}, generator_)});
  tensors.push_back({"int64", random_bits({40}, at::kLong, generator_)});
  tensors.push_back({"bool", random_bits({40}, at::kBool, generator_)});
  save(tensors);
  for (const auto to : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const auto file = out_ + "-" + dtype_name(to) + ".safetensors";
    export_safetensors(root_, file, {.dtype = dtype_name(to)});
    const auto values = values_of(file);
    for (const auto& [name, value, cls] : tensors) {
      const auto expected = value.is_floating_point() ? value.to(to) : value;
      EXPECT_TRUE(same_bits(values.at(name), expected)) << name << " to " << to;
    }
  }
}

TEST_F(Export, RoundsDoublesOnce) {
  // Just above the middle of two neighbours of bfloat16 and of float16: through float32 it would
  // become the middle, and go down to even.
  const double above_bf16 = 1 + std::ldexp(1, -8) + std::ldexp(1, -40);
  const double above_half = 1 + std::ldexp(1, -11) + std::ldexp(1, -40);
  const double most = std::numeric_limits<double>::max();
  const auto values = at::tensor({above_bf16, -above_bf16, above_half, most, -most, 5e-324,
                                  INFINITY, -INFINITY, 0.1, -0.0, 65519.999, 65520.0},
                                 at::kDouble);
  save({{"x", values}, {"nan", at::full({2}, NAN, at::kDouble)}});
  const auto bf16 = export_safetensors(root_, out_ + "/b", {.dtype = "bfloat16"});
  const auto x = values_of(bf16.files[0]).at("x").to(at::kDouble);
  EXPECT_TRUE(values_of(bf16.files[0]).at("nan").isnan().all().item<bool>());
  const auto expect = [](const at::Tensor& found, std::vector<double> wanted) {
    EXPECT_TRUE(at::equal(found, at::tensor(wanted, at::kDouble))) << found;
  };
  expect(x, {1 + std::ldexp(1, -7), -1 - std::ldexp(1, -7), 1, INFINITY, -INFINITY, 0, INFINITY,
             -INFINITY, 0.10009765625, 0, 65536, 65536});
  EXPECT_EQ(bf16.overflowed, 2);
  const auto half = export_safetensors(root_, out_ + "/h", {.dtype = "float16"});
  expect(values_of(half.files[0]).at("x").to(at::kDouble),
         {1 + std::ldexp(1, -8), -1 - std::ldexp(1, -8), 1 + std::ldexp(1, -10), INFINITY,
          -INFINITY, 0, INFINITY, -INFINITY, 0.0999755859375, 0, 65504, INFINITY});
  EXPECT_EQ(half.overflowed, 3);
}

TEST_F(Export, HostileNamesStayNames) {
  const std::vector<std::string> names = {"\"quoted\"", "back\\slash",  "line\nbreak", "größe",
                                          "{\"a\":[",   "tab\tand\x01", "a/b/c",       " "};
  std::vector<NamedTensor> tensors;
  for (const auto& name : names) tensors.push_back({name, at::randn({3}, generator_)});
  save(tensors);
  const auto values = values_of(export_safetensors(root_, out_).files[0]);
  for (const auto& tensor : tensors) {
    EXPECT_TRUE(same_bits(values.at(tensor.name), tensor.value)) << tensor.name;
  }
  save({{"__metadata__", at::ones({1})}}, 8);
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_ + "2"), kUsage, "'__metadata__'");
  expect_nothing_at(out_ + "2");
}

TEST_F(Export, RefusesBeforeItWrites) {
  const auto path = save({{"a", at::ones({2})}, {"z", at::ones({2}, at::kComplexDouble)}});
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_), kUsage, "'model/z' of complex128");
  const auto good = save({{"a", at::ones({2})}, {"b", at::ones({2})}}, 8);
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_, {.dtype = "int8"}), kUsage, "'int8'");
  EXPECT_OUNCE_ERROR(export_safetensors(root_, ""), kUsage, "--out");
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_ + ".safetensors", {.shard_bytes = 8}), kUsage,
                     "2 shards need a folder");
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_, {.step = 9}), kNotFound, "no step 9");
  EXPECT_OUNCE_ERROR(export_safetensors(out_, out_), kNotFound, "no checkpoint");
  expect_nothing_at(out_);
  expect_nothing_at(out_ + ".safetensors");
  write_bytes(out_, "a file");
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_), kUsage, "to be a folder, got a file");
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_ + "/below"), kData, "");
  EXPECT_EQ(bytes_of(out_), "a file");
  write_bytes(out_ + ".safetensors", "mine");
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_ + ".safetensors"), kUsage, "--force");
  EXPECT_EQ(bytes_of(out_ + ".safetensors"), "mine");
  SampleState other;
  other.tensors = {{"x", at::ones({1})}};
  Checkpointer({.levels = {{.path = root_}}}).save_and_wait(9, {{"optim", &other}});
  EXPECT_OUNCE_ERROR(export_safetensors(root_, out_ + "3"), kNotFound, "--all");
}

TEST_F(Export, PassesOverADamagedStepUnlessItWasAskedFor) {
  const auto first = save({{"a", at::ones({2000})}}, 1),
             second = save({{"a", at::zeros({2000})}}, 2);
  auto spoiled = bytes_of(second + "/rank00000.h5");
  spoiled[StepReader(posix_file_system(), second).find("model/a")->offset + 9] ^= 1;
  write_bytes(second + "/rank00000.h5", spoiled);
  for (const auto& path : {second, root_}) {
    const auto step = path == root_ ? std::optional<int64_t>(2) : std::nullopt;
    EXPECT_OUNCE_ERROR(export_safetensors(path, out_, {.step = step}), kData, "'model/a'");
    expect_nothing_at(out_);
  }
  const auto report = export_safetensors(root_, out_);
  EXPECT_EQ(report.info.path, first);
  EXPECT_EQ(report.rejected.size(), 1u);
  EXPECT_TRUE(same_bits(values_of(report.files[0]).at("a"), at::ones({2000})));
}

struct SmallDisk : FaultyFileSystem {
  int free_bytes(const std::string&, int64_t& bytes) override {
    bytes = 1000;
    return 0;
  }
};

TEST_F(Export, AFullDiskIsToldBeforeAnythingIsWritten) {
  save({{"a", at::ones({2000})}});
  const auto disk = std::make_shared<SmallDisk>();
  test::expect_error(Fault::kData, {"needs 8", "1000 bytes free"},
                     [&] { export_safetensors(root_, out_ + "/deep/er", {.file_system = disk}); });
  expect_nothing_at(out_);
}

TEST_F(Export, AnyFailedCallLeavesNothing) {
  save({{"a", at::ones({200})}, {"b", at::ones({200})}, {"c", at::ones({20}, at::kByte)}});
  int failures = 0;
  for (const int error : {EIO, ENOSPC}) {
    for (int64_t call = 0;; ++call) {
      const auto files = std::make_shared<FaultyFileSystem>();
      files->error = error;
      files->fail_at = call;
      const ExportOptions options{.shard_bytes = 800, .file_system = files};
      try {
        const auto report = export_safetensors(root_, out_ + "/deep", options);
        EXPECT_EQ(report.files.size(), 4u);
        fs::remove_all(out_);
        if (files->failed.empty()) break;  // no call was left to fail
      } catch (const Error& failure) {
        const std::string what = failure.what_without_backtrace();
        EXPECT_EQ(what.find('\n'), std::string::npos) << what;
        const bool writing = files->failed == "pwrite" || files->failed == "allocate";
        if (error == ENOSPC && writing) {
          EXPECT_NE(what.find("bytes free"), std::string::npos) << what;
        }
        EXPECT_FALSE(fs::exists(out_)) << files->failed << " " << call << ": " << what;
        fs::remove_all(out_);
        ++failures;
      }
      ASSERT_LT(call, 1000);
    }
  }
  EXPECT_GT(failures, 40);
  std::cout << failures << " failed calls left nothing\n";
}

TEST_F(Export, AFailureBeforeTheLastLeavesWhatWasThere) {
  save({{"a", at::ones({200})}});
  export_safetensors(root_, out_);
  const auto before = bytes_of(out_ + "/model.safetensors");
  save({{"a", at::zeros({200})}}, 8);
  for (const auto* kind : {"open", "allocate", "pwrite", "sync", "close", "rename"}) {
    const auto files = std::make_shared<FaultyFileSystem>();
    files->error = ENOSPC;
    files->only = kind;
    // Reading opens and closes files too: the last call of a kind is a writing one.
    for (files->fail_at = -1; files->fail_at < 0;) {
      files->calls = 0;
      export_safetensors(root_, out_ + "-count", {.replace = true, .file_system = files});
      files->fail_at = files->calls - 1;
      if (std::string(kind) == "close") --files->fail_at;  // the reader's own comes last
    }
    files->calls = 0;
    EXPECT_THROW(export_safetensors(root_, out_, {.replace = true, .file_system = files}), Error)
        << kind;
    EXPECT_EQ(bytes_of(out_ + "/model.safetensors"), before) << kind;
    EXPECT_EQ(std::distance(fs::directory_iterator(out_), {}), 1) << kind;
  }
}

TEST_F(Export, ShortTransfersAreNoFailures) {
  save({{"a", at::arange(3000)}});
  const auto files = std::make_shared<FaultyFileSystem>();
  files->short_transfers = true;
  files->no_allocate = true;
  export_safetensors(root_, out_, {.file_system = files});
  EXPECT_TRUE(same_bits(values_of(out_ + "/model.safetensors").at("a"), at::arange(3000)));
}

}  // namespace
}  // namespace ounce::ckpt
