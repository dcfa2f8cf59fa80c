// SPDX-License-Identifier: MIT
#include "ckpt/sample_state.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/restore.h>
#include <ounce/core/check.h>
#include <sys/stat.h>

#include <cmath>
#include <fstream>
#include <limits>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;

std::vector<int64_t> steps_in(const std::string& root) {
  std::vector<int64_t> steps;
  for (const auto& info : list_checkpoints(root)) steps.push_back(info.step);
  return steps;
}

constexpr at::ScalarType kDtypes[] = {at::kFloat,          at::kDouble,        at::kHalf,
                                      at::kBFloat16,       at::kByte,          at::kChar,
                                      at::kShort,          at::kInt,           at::kLong,
                                      at::kUInt16,         at::kUInt32,        at::kUInt64,
                                      at::kBool,           at::kComplexFloat,  at::kComplexDouble,
                                      at::kFloat8_e5m2,    at::kFloat8_e4m3fn, at::kFloat8_e4m3fnuz,
                                      at::kFloat8_e5m2fnuz};

SampleState every_dtype(uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  SampleState state;
  for (const auto dtype : kDtypes) {
    const std::string name = c10::toString(dtype);
    state.tensors.push_back({name + "/matrix", random_bits({7, 3, 2}, dtype, generator)});
    state.tensors.push_back({name + "/scalar", random_bits({}, dtype, generator)});
    state.tensors.push_back({name + "/empty", random_bits({3, 0}, dtype, generator)});
  }
  // Two blocks of sums, the second one ragged.
  state.tensors.push_back(
      {"large", at::randn({1 << 20, 2}, generator).narrow(0, 0, (1 << 20) - 7)});
  return state;
}

TEST(Checkpointer, KeepsEveryDtypeBitForBit) {
  const TemporaryFolder folder;
  auto saved = every_dtype(1);
  Checkpointer writer({.levels = {{.path = folder.path()}}});
  const auto report = writer.save_and_wait(5, {{"all", &saved}});
  EXPECT_GT(report.bytes, 8 << 20);
  auto loaded = every_dtype(2);
  ASSERT_FALSE(same_state(saved, loaded));
  EXPECT_EQ(load_checkpoint(folder.path(), std::nullopt, {{"all", &loaded}}).info.step, 5);
  EXPECT_TRUE(same_state(saved, loaded));
  EXPECT_TRUE(verify_step(posix_file_system(), report.info.path, true).problems.empty());
}

TEST(Checkpointer, KeepsScalarsExactly) {
  const TemporaryFolder folder;
  const double quiet = std::bit_cast<double>(uint64_t{0x7ff800000000beef});
  SampleState saved, loaded;
  saved.numbers = {{"a", 0.1},       {"b", -0.0},   {"c", quiet},
                   {"d", -INFINITY}, {"e", 5e-324}, {"f", 1.7976931348623157e308}};
  saved.integers = {{"low", std::numeric_limits<int64_t>::min()},
                    {"high", std::numeric_limits<int64_t>::max()}};
  saved.texts = {
      {"empty", ""}, {"nul", std::string("a\0b", 3)}, {"raw", "\xff\xfe"}, {"utf8", "µ"}};
  loaded = saved;
  for (auto& [name, value] : loaded.numbers) value = 7;
  for (auto& [name, value] : loaded.integers) value = 7;
  for (auto& [name, value] : loaded.texts) value = "other";
  const std::string config(200000, 'x');
  Checkpointer({.levels = {{.path = folder.path()}}})
      .save_and_wait(0, {{"", &saved}},
                     {.notes = {{"config", config}}, .metrics = {{"loss", NAN}}});
  const auto info = load_checkpoint(folder.path(), 0, {{"", &loaded}}).info;
  EXPECT_TRUE(same_state(saved, loaded));
  EXPECT_EQ(info.notes.at("config"), config);
  EXPECT_TRUE(std::isnan(info.metrics.at("loss")));
}

TEST(Checkpointer, LoadsIntoAndSavesFromStridedTensors) {
  const TemporaryFolder folder;
  const auto base = at::randn({6, 8});
  SampleState saved, loaded;
  saved.tensors = {{"t", base.t()}, {"slice", base.slice(1, 0, 8, 3)}};
  loaded.tensors = {{"t", at::zeros({6, 8}).t()}, {"slice", at::zeros({3, 6}).t()}};
  Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(1, {{"m", &saved}});
  load_checkpoint(folder.path(), std::nullopt, {{"m", &loaded}});
  EXPECT_TRUE(same_state(saved, loaded));
}

TEST(Checkpointer, StoresTiedTensorsOnce) {
  const TemporaryFolder folder;
  const auto shared = at::randn({1 << 18});
  SampleState saved, loaded;
  saved.tensors = {{"embed", shared}, {"z/head", shared}, {"view", shared.view({-1, 2})}};
  loaded.tensors = {{"embed", at::zeros({1 << 18})},
                    {"z/head", at::zeros({1 << 18})},
                    {"view", at::zeros({1 << 17, 2})}};
  const auto report =
      Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(1, {{"m", &saved}});
  EXPECT_LT(report.bytes, int64_t{7} << 19) << "one of the three is a link to the first";
  EXPECT_TRUE(verify_step(posix_file_system(), report.info.path, true).problems.empty());
  load_checkpoint(folder.path(), std::nullopt, {{"m", &loaded}});
  EXPECT_TRUE(same_state(saved, loaded));
}

TEST(Checkpointer, TellsViewsOfTheSameMemoryApart) {
  const TemporaryFolder folder;
  const auto value = at::randn({5}, at::kComplexFloat), real = at::randn({5});
  SampleState saved, loaded;
  saved.tensors = {{"a", value}, {"b", value.conj()}, {"c", real}, {"d", at::_neg_view(real)}};
  loaded.tensors = {{"a", at::zeros_like(value)},
                    {"b", at::zeros_like(value)},
                    {"c", at::zeros_like(real)},
                    {"d", at::zeros_like(real)}};
  Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(1, {{"m", &saved}});
  load_checkpoint(folder.path(), std::nullopt, {{"m", &loaded}});
  EXPECT_TRUE(at::equal(loaded.tensors[0].value, value));
  EXPECT_TRUE(at::equal(loaded.tensors[1].value, value.conj()));
  EXPECT_TRUE(at::equal(loaded.tensors[2].value, real));
  EXPECT_TRUE(at::equal(loaded.tensors[3].value, -real));
}

TEST(Checkpointer, RestoresGenerators) {
  const TemporaryFolder folder;
  struct Random : Stateful {
    at::Generator generator = at::detail::createCPUGenerator(3);
    void visit_state(StateVisitor& visitor) override { visit_generator(generator, "cpu", visitor); }
  } saved, loaded;
  at::randn({5}, saved.generator);
  Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(1, {{"rng", &saved}});
  const auto expected = at::randn({9}, saved.generator);
  load_checkpoint(folder.path(), std::nullopt, {{"rng", &loaded}});
  EXPECT_TRUE(same_bits(expected, at::randn({9}, loaded.generator)));
}

TEST(Checkpointer, RefusesNamesThatCannotBeStored) {
  const TemporaryFolder folder;
  Checkpointer writer({.levels = {{.path = folder.path()}}});
  const std::string bad[] = {
      "",        std::string("a\0b", 3), "..", "a/../b", "a//b", "/a", "a/.", "\xff",
      "_ckpt/x", std::string(2000, 'n')};
  for (const auto& name : bad) {
    SampleState state;
    state.tensors = {{name, at::zeros(1)}};
    SCOPED_TRACE(name);
    EXPECT_OUNCE_ERROR(writer.save_and_wait(1, {{"", &state}}), kUsage, "name");
  }
  SampleState twice;
  twice.tensors = {{"a", at::zeros(1)}};
  twice.integers = {{"a", 1}};
  EXPECT_OUNCE_ERROR(writer.save_and_wait(1, {{"", &twice}}), kUsage, "twice");
  SampleState nested;
  nested.tensors = {{"a", at::zeros(1)}, {"a/b", at::zeros(1)}};
  EXPECT_OUNCE_ERROR(writer.save_and_wait(1, {{"", &nested}}), kUsage, "'a/b'");
  EXPECT_TRUE(steps_in(folder.path()).empty());
  for (const auto& entry : fs::directory_iterator(folder.path())) {
    EXPECT_EQ(entry.path().filename(), "LOCK");
  }
}

TEST(Checkpointer, RefusesTensorsWithoutValues) {
  const TemporaryFolder folder;
  Checkpointer writer({.levels = {{.path = folder.path()}}});
  const at::Tensor bad[] = {at::Tensor(), at::zeros({2}).to_sparse(), at::empty({2}, at::kMeta),
                            at::zeros(std::vector<int64_t>(33, 1))};
  for (const auto& tensor : bad) {
    SampleState state;
    state.tensors = {{"t", tensor}};
    EXPECT_OUNCE_ERROR(writer.save_and_wait(1, {{"", &state}}), kUsage, "");
  }
  auto state = small_state(1);
  for (const int64_t step : {int64_t{-1}, kMostStep + 1, std::numeric_limits<int64_t>::max()}) {
    EXPECT_OUNCE_ERROR(writer.save_and_wait(step, {{"", &state}}), kUsage, "");
  }
  writer.save_and_wait(kMostStep, {{"", &state}});
  EXPECT_EQ(steps_in(folder.path()), std::vector<int64_t>{kMostStep});
}

TEST(Checkpointer, ListsEveryDifferenceAndChangesNothing) {
  const TemporaryFolder folder;
  SampleState saved;
  saved.tensors = {{"same", at::ones({2})},
                   {"old", at::ones({3})},
                   {"shape", at::ones({4})},
                   {"dtype", at::ones({2})}};
  saved.integers = {{"count", 3}, {"kind", 1}};
  Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(1, {{"m", &saved}});
  SampleState wanted;
  wanted.tensors = {{"same", at::zeros({2})},
                    {"new", at::zeros({3})},
                    {"shape", at::zeros({4, 1})},
                    {"dtype", at::zeros({2}, at::kDouble)}};
  wanted.integers = {{"fresh", 9}};
  wanted.numbers = {{"kind", 9}};
  test::expect_error(
      Fault::kUsage,
      {"2 missing in the checkpoint: m/new, m/fresh", "2 unexpected: m/old, m/count",
       "m/shape (expected float32[4, 1], got float32[4])",
       "m/dtype (expected float64[2], got float32[2])", "m/kind (expected number, got integer)"},
      [&] {
        load_checkpoint(folder.path(), std::nullopt, {{"m", &wanted}});
      });
  for (const auto& tensor : wanted.tensors) EXPECT_EQ(tensor.value.abs().sum().item<double>(), 0);
  EXPECT_EQ(wanted.integers[0].second, 9);
}

TEST(Checkpointer, TellsNothingThereFromNothingGood) {
  const TemporaryFolder folder;
  auto state = small_state(1);
  const auto load = [&](const std::string& path, std::optional<int64_t> step) {
    load_checkpoint(path, step, {{"", &state}});
  };
  EXPECT_OUNCE_ERROR(load(folder.path() + "/absent", std::nullopt), kNotFound, "no checkpoint in");
  EXPECT_OUNCE_ERROR(load(folder.path(), std::nullopt), kNotFound, "no checkpoint in");
  const auto info =
      Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(1, {{"", &state}}).info;
  EXPECT_OUNCE_ERROR(load(folder.path(), 2), kNotFound, "there: 1");
  EXPECT_NO_THROW(load(info.path, std::nullopt));
  fs::resize_file(info.path + "/rank00000.h5", 100);
  EXPECT_OUNCE_ERROR(load(folder.path(), std::nullopt), kData, "no good checkpoint in");
  EXPECT_OUNCE_ERROR(load(info.path, std::nullopt), kData, "got 100 bytes");
}

TEST(Checkpointer, FallsBackToTheNewestGoodStep) {
  const TemporaryFolder folder;
  std::vector<SampleState> states;
  Checkpointer writer({.levels = {{.path = folder.path(), .keep_last = 0}}});
  for (int step = 0; step < 4; ++step) {
    states.push_back(small_state(step));
    writer.save_and_wait(step, {{"s", &states.back()}});
  }
  const auto path = [&](int step) { return folder.path() + "/" + step_name(step); };
  fs::resize_file(path(3) + "/rank00000.h5", 5000);
  std::ofstream(path(2) + "/manifest.json") << "{}";
  auto loaded = small_state(9);
  const auto report = load_checkpoint(folder.path(), std::nullopt, {{"s", &loaded}});
  EXPECT_EQ(report.info.step, 1);
  EXPECT_TRUE(same_state(loaded, states[1]));
  EXPECT_EQ(report.rejected.size(), 2u);
  // The next writer replaces what is bad and goes on.
  writer.save_and_wait(3, {{"s", &states[3]}});
  EXPECT_EQ(load_checkpoint(folder.path(), std::nullopt, {{"s", &loaded}}).info.step, 3);
  EXPECT_TRUE(same_state(loaded, states[3]));
}

TEST(Checkpointer, TheLastCommitIsTheNewestWhateverItsStep) {
  const TemporaryFolder folder;
  Checkpointer writer({.levels = {{.path = folder.path(), .keep_last = 2}}});
  auto state = small_state(1), loaded = small_state(2);
  for (const int step : {10, 20, 30}) writer.save_and_wait(step, {{"s", &state}});
  writer.save_and_wait(15, {{"s", &state}});  // resumed from 10: another branch
  EXPECT_EQ(steps_in(folder.path()), (std::vector<int64_t>{15, 30}));
  EXPECT_EQ(load_checkpoint(folder.path(), std::nullopt, {{"s", &loaded}}).info.step, 15);
}

TEST(Checkpointer, RemovesOnlyWhatTheRulesLetGo) {
  const TemporaryFolder folder;
  auto state = small_state(1);
  Checkpointer writer(
      {.levels = {{.path = folder.path(), .keep_last = 2, .keep_every = 50, .keep_best = "loss"}}});
  const auto save = [&](int64_t step, double loss) {
    return writer.save_and_wait(step, {{"s", &state}}, {.metrics = {{"loss", loss}}});
  };
  save(10, 3.0);
  save(20, 1.0);
  std::ofstream(folder.path() + "/step_0000000010/PINNED") << "";
  save(10, 3.0);  // written again, it stays pinned
  for (const int step : {30, 40, 50, 60, 70}) save(step, step == 40 ? NAN : 2.0);
  EXPECT_EQ(steps_in(folder.path()), (std::vector<int64_t>{70, 60, 50, 10, 20}));
  save(80, 0.5);
  EXPECT_EQ(steps_in(folder.path()), (std::vector<int64_t>{80, 70, 50, 10}));
}

TEST(Checkpointer, RefusesASecondWriter) {
  const TemporaryFolder folder;
  const std::string root = folder.path() + "/a/b c/µ";
  {
    const Checkpointer first({.levels = {{.path = root}}});
    char host[256];
    ::gethostname(host, sizeof(host));
    EXPECT_OUNCE_ERROR(Checkpointer({.levels = {{.path = root + "/"}}}), kProblem,
                       "process " + std::to_string(::getpid()) + " on host '" + host);
  }
  // A holder that died, on this machine before and after a reboot.
  for (const auto& boot : {"", "another boot"}) {
    std::ofstream(root + "/LOCK") << R"({"host":"elsewhere","pid":4194304,"boot":")" << boot
                                  << "\"}";
    EXPECT_NO_THROW(Checkpointer({.levels = {{.path = root}}}));
  }
}

TEST(Checkpointer, SaysAtOnceThatTheRootCannotBeUsed) {
  const TemporaryFolder folder;
  std::ofstream(folder.path() + "/file") << "x";
  const auto open = [](const std::string& root) { Checkpointer({.levels = {{.path = root}}}); };
  EXPECT_OUNCE_ERROR(open(folder.path() + "/file"), kData, "file");
  EXPECT_OUNCE_ERROR(open(folder.path() + "/file/below"), kData, "below");
  EXPECT_OUNCE_ERROR(open(""), kUsage, "expected a folder");
  EXPECT_OUNCE_ERROR(open(folder.path() + "/" + std::string(300, 'n')), kData, "nnn");
  const auto locked = folder.path() + "/locked";
  ::mkdir(locked.c_str(), 0500);
  // Permissions mean nothing to root: then a file system that refuses stands in for them.
  EXPECT_OUNCE_ERROR(open(::geteuid() == 0 ? "/proc/ounce" : locked), kData, "cannot make");
}

TEST(Checkpointer, ClearsWhatDeadWritersLeft) {
  const TemporaryFolder folder;
  const auto make = [&](const std::string& name) {
    fs::create_directory(folder.path() + "/" + name);
    std::ofstream(folder.path() + "/" + name + "/rank00000.h5") << "half";
  };
  make(".tmp-step_0000000001-ab");
  make(".trash-step_0000000002-ab");
  make(".old-step_0000000003-ab");  // its step is gone: it was about to be replaced
  make(".old-step_0000000004-ab");
  make("step_0000000004");
  make("mine");
  const Checkpointer writer({.levels = {{.path = folder.path()}}});
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder.path()))
    names.insert(entry.path().filename());
  EXPECT_EQ(names, (std::set<std::string>{"LOCK", "mine", "step_0000000003", "step_0000000004"}));
}

TEST(Checkpointer, NeverFollowsTheHint) {
  const TemporaryFolder folder;
  auto state = small_state(1), loaded = small_state(2);
  {
    Checkpointer writer({.levels = {{.path = folder.path()}}});
    writer.save_and_wait(1, {{"s", &state}});
    writer.save_and_wait(2, {{"s", &state}});
  }
  const auto hint = folder.path() + "/LATEST";
  const std::function<void()> spoil[] = {
      [&] { std::ofstream(hint) << "step_0000000001"; },
      [&] { std::ofstream(hint) << "../../etc/passwd"; },
      [&] { fs::create_directory(hint); },
      [&] { fs::create_symlink(hint, hint); },
      [&] { fs::create_symlink("/dev/zero", hint); },
  };
  fs::remove(hint);
  for (const auto& action : spoil) {
    action();
    EXPECT_EQ(load_checkpoint(folder.path(), std::nullopt, {{"s", &loaded}}).info.step, 2);
    Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(2, {{"s", &state}});
    fs::remove_all(hint);
  }
}

TEST(Checkpointer, ReadsThroughALinkToTheRootAndRunFolders) {
  const TemporaryFolder folder;
  auto state = small_state(1), loaded = small_state(2);
  Checkpointer({.levels = {{.path = folder.path() + "/run/ckpt"}}})
      .save_and_wait(7, {{"s", &state}});
  fs::create_directory_symlink("run/ckpt", folder.path() + "/link");
  for (const auto* path : {"/run", "/run/", "/run/ckpt", "/link", "/run/ckpt/step_0000000007"}) {
    EXPECT_EQ(load_checkpoint(folder.path() + path, std::nullopt, {{"s", &loaded}}).info.step, 7);
  }
}

}  // namespace
}  // namespace ounce::ckpt
