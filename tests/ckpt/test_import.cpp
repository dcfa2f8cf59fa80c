// SPDX-License-Identifier: MIT
// Other programs' files, and ours, as a step again; hostile ones crash nothing. tests/python reads
// what h5py wrote.
#include "ckpt/sample_state.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/child_process.h>
#include <ounce/ckpt/export.h>
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/import.h>
#include <ounce/ckpt/restore.h>

#include <iostream>
#include <random>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;

class Import : public ::testing::Test {
 protected:
  void SetUp() override {
    SampleState state = small_state(3);
    state.tensors.push_back({"tied", state.tensors[0].value});
    state.tensors.push_back({"complex", at::ones({2, 2}, at::kComplexFloat)});
    state.tensors.push_back({"flag", at::ones({3}, at::kBool)});
    state.tensors.push_back({"eight", random_bits({7}, at::kFloat8_e4m3fn, generator_)});
    model_ = state;
    Checkpointer writer({.levels = {{.path = root_}}});
    step_ = writer.save_and_wait(5, {{"model", &state}}).info.path;
  }

  // Every tensor of the first step, under `prefix`, with the same bits, and none besides.
  void expect_same(const std::string& path, const std::string& prefix) {
    const StepReader reader(posix_file_system(), path);
    EXPECT_EQ(reader.manifest().tensors.size(), model_.tensors.size());
    for (const auto& tensor : model_.tensors) {
      const auto* record = reader.find(prefix + tensor.name);
      ASSERT_NE(record, nullptr) << tensor.name;
      EXPECT_TRUE(same_bits(read_tensor(reader, *record), tensor.value)) << tensor.name;
    }
    EXPECT_TRUE(verify_step(posix_file_system(), path, true).problems.empty());
  }

  at::Generator generator_ = at::detail::createCPUGenerator(6);
  const TemporaryFolder folder_;
  const std::string root_ = folder_.path() + "/ckpt", out_ = folder_.path() + "/imported";
  SampleState model_;
  std::string step_;
};

TEST_F(Import, ReadsWhatExportWrote) {
  const auto single = export_safetensors(root_, folder_.path() + "/single").files[0];
  auto report = import_step(single, out_, 1);
  EXPECT_EQ(report.prefix, "model/");
  EXPECT_EQ(report.info.step, 1);
  EXPECT_EQ(report.tensors, static_cast<int64_t>(model_.tensors.size()));
  expect_same(report.info.path, "model/");
  const auto shards = export_safetensors(root_, folder_.path() + "/shards", {.shard_bytes = 300});
  ASSERT_GT(shards.files.size(), 3u);
  expect_same(import_step(shards.files.back(), out_, 2).info.path, "model/");
  const auto all = export_safetensors(root_, folder_.path() + "/all.safetensors", {.all = true});
  report = import_step(all.files[0], out_, 3);
  EXPECT_EQ(report.prefix, "");
  expect_same(report.info.path, "model/");
  expect_same(import_step(single, out_, 4, {.prefix = "net/"}).info.path, "net/");
  EXPECT_EQ(list_checkpoints(out_).size(), 4u) << "no step goes";
  // A model cache is a folder of links.
  fs::create_directory(folder_.path() + "/cache");
  for (const auto& file : shards.files) {
    fs::create_symlink(file, folder_.path() + "/cache/" + fs::path(file).filename().string());
  }
  const auto index = folder_.path() + "/cache/model.safetensors.index.json";
  expect_same(import_step(index, out_, 5).info.path, "model/");
}

TEST_F(Import, ReadsTheDataFileOfAStep) {
  const auto report = import_step(step_ + "/rank00000.h5", out_, 6);
  EXPECT_EQ(report.prefix, "");
  expect_same(report.info.path, "model/");
  EXPECT_EQ(StepReader(posix_file_system(), report.info.path).find("model/w")->tied_to,
            "model/tied")
      << "ties are kept, held by the first by name";
  expect_same(import_step(step_ + "/rank00000.h5", out_, 7, {.prefix = "again/"}).info.path,
              "again/model/");
}

TEST_F(Import, RefusesWithoutWriting) {
  const auto single = export_safetensors(root_, folder_.path() + "/single").files[0];
  EXPECT_OUNCE_ERROR(import_step(single + "/x.bin", out_, 1), kUsage, "x.bin");
  EXPECT_OUNCE_ERROR(import_step(single, step_, 1), kUsage, "a step or a run");
  EXPECT_OUNCE_ERROR(import_step(single, folder_.path(), 1), kUsage, "a step or a run");
  EXPECT_OUNCE_ERROR(import_step(single, "", 1), kUsage, "a folder of its own");
  EXPECT_OUNCE_ERROR(import_step(single, out_, -1), kUsage, "got -1");
  EXPECT_OUNCE_ERROR(import_step(single, out_, 1, {.prefix = "../"}), kUsage, "'..'");
  for (const auto* name : {"none.safetensors", "none.json", "none.h5"}) {
    EXPECT_OUNCE_ERROR(import_step(folder_.path() + "/" + name, out_, 1), kNotFound, name);
  }
  EXPECT_TRUE(!fs::exists(out_) || list_checkpoints(out_).empty());
  EXPECT_OUNCE_ERROR(import_step(single, root_, 5), kUsage, "step 5 is in");
  expect_same(step_, "model/");
  EXPECT_EQ(import_step(single, root_, 5, {.replace = true}).warnings.size(), 1u);
}

TEST_F(Import, RefusesAnIndexThatLies) {
  const auto shards = export_safetensors(root_, folder_.path() + "/shards", {.shard_bytes = 300});
  const auto index = shards.files.back();
  const auto good = bytes_of(index);
  const auto with = [&](const std::string& text) {
    write_bytes(index, text);
    return import_step(index, out_, 1);
  };
  const std::string deep = std::string(1000000, '[') + std::string(1000000, ']');
  for (const auto& text :
       {std::string("{}"), std::string(), std::string("[1]"), "{\"weight_map\":" + deep + "}",
        std::string(R"({"weight_map":{"a":"../ckpt/x.safetensors"}})"),
        std::string(R"({"weight_map":{"a":"/etc/passwd"}})"),
        std::string(R"({"weight_map":{"a":1}})"),
        std::string(R"({"weight_map":{"a":"model-00001-of-00002.bin"}})")}) {
    EXPECT_OUNCE_ERROR(with(text), kData, "index.json");
  }
  EXPECT_OUNCE_ERROR(with(R"({"weight_map":{"a":"none.safetensors"}})"), kNotFound, "none");
  const auto shard = fs::path(shards.files[0]).filename().string();
  EXPECT_OUNCE_ERROR(with(R"({"weight_map":{"a":")" + shard + R"("}})"), kData, "it lists");
  EXPECT_FALSE(fs::exists(out_));
  with(good);
}

// 40 damaged files, read in this process as a user's would be: an error of one line, or the right
// values. The format has sums over its own structure, and the values are not touched.
TEST_F(Import, DamagedHdf5CrashesNothing) {
  const auto whole = bytes_of(step_ + "/rank00000.h5");
  const auto path = folder_.path() + "/damaged.h5";
  std::mt19937_64 random(11);
  int errors = 0, right = 0;
  for (int sample = 0; sample < 40; ++sample) {
    auto spoiled = whole;
    const int flips = sample % 4 == 0 ? 1 : sample % 4 == 1 ? 8 : 300;
    for (int i = 0; i < flips; ++i) {
      const auto place = random() % (sample % 8 == 0 ? 96 : 8192);
      spoiled[place] = static_cast<char>(random());
    }
    if (sample % 10 == 9) spoiled.resize(random() % spoiled.size());
    write_bytes(path, spoiled);
    try {
      expect_same(import_step(path, out_, sample).info.path, "model/");
      ++right;
    } catch (const Error& error) {
      const std::string what = error.what_without_backtrace();
      EXPECT_EQ(static_cast<int>(error.fault()), static_cast<int>(Fault::kData)) << what;
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_NE(what.find(path), std::string::npos) << what;
      ++errors;
    }
  }
  EXPECT_GT(errors, 20);
  std::cout << errors << " refused, " << right << " with the right values\n";
}

TEST_F(Import, WhatIsNoHdf5IsRefused) {
  const auto path = folder_.path() + "/x.h5";
  for (const auto& bytes : {std::string(), std::string("garbage"), std::string(4096, '\x89')}) {
    write_bytes(path, bytes);
    EXPECT_OUNCE_ERROR(import_step(path, out_, 1), kData, "libhdf5 cannot read it");
  }
  fs::create_directory(folder_.path() + "/folder.h5");
  EXPECT_OUNCE_ERROR(import_step(folder_.path() + "/folder.h5", out_, 1), kData, "no file");
  EXPECT_OUNCE_ERROR(import_step(folder_.path() + "/folder.safetensors", out_, 1), kNotFound, "");
  EXPECT_FALSE(fs::exists(out_));
}

TEST(ChildProcess, BringsBackTextOrWhyThereIsNone) {
  const auto large = std::string(1 << 20, 'x') + '\0' + "end";
  auto output = run_in_child([&] { return large; });
  EXPECT_EQ(output.text, large);
  EXPECT_EQ(output.problem, "");
  output = run_in_child([]() -> std::string { ::abort(); });
  EXPECT_EQ(output.problem, "it died: Aborted");
  output = run_in_child([]() -> std::string { throw std::runtime_error("no"); });
  EXPECT_EQ(output.problem, "it gave up");
  output = run_in_child(
      []() -> std::string {
        for (volatile int forever = 0;;) forever = forever + 1;
      },
      1);
  EXPECT_EQ(output.problem, "it took more than 1 s");
}

TEST(ChildProcess, HasALimitOfMemory) {
  const auto output = run_in_child([] { return std::string(size_t{4} << 30, 'x').substr(0, 1); });
  EXPECT_EQ(output.text, "");
  EXPECT_NE(output.problem, "");
}

}  // namespace
}  // namespace ounce::ckpt
