// SPDX-License-Identifier: MIT
// Every file call of a save or a load fails once, in turn. Oracle: load gives a committed step bit
// for bit or a clear error, what was announced is never lost, and a failed load changes nothing.
#include "ckpt/faulty_file_system.h"
#include "ckpt/sample_state.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <iostream>
#include <map>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;

// One tensor, so that a save has few calls and all of them can be made to fail.
SampleState tiny_state(int64_t step) {
  SampleState state;
  auto generator = at::detail::createCPUGenerator(step + 1);
  state.tensors = {{"w", at::randn({300}, generator)}};
  state.integers = {{"step", step}};
  return state;
}

// What the newest loadable step holds must be exactly the state of its number.
int64_t load_and_check(const std::string& root) {
  auto loaded = tiny_state(999);
  const auto report = load_checkpoint(root, std::nullopt, {{"s", &loaded}});
  EXPECT_TRUE(same_state(loaded, tiny_state(report.info.step))) << "step " << report.info.step;
  EXPECT_TRUE(report.rejected.empty()) << report.rejected.front();
  return report.info.step;
}

// Saves step 1 without faults, then step 2 (or 1 again) with call k failing. Returns whether the
// fault was reached.
bool save_with_fault(FaultyFileSystem& faults, int64_t second,
                     std::map<std::string, int>& outcomes) {
  const TemporaryFolder folder(/*in_memory=*/true);
  auto first = tiny_state(1), next = tiny_state(second);
  auto files = std::make_shared<FaultyFileSystem>();
  files->no_exchange = faults.no_exchange;
  Checkpointer writer({.levels = {{.path = folder.path(), .keep_last = 1}}, .file_system = files});
  writer.save_and_wait(1, {{"s", &first}});
  writer.drain();  // old steps are removed behind a save
  files->fail_at = files->calls + faults.fail_at;
  files->error = faults.error;
  files->persistent = faults.persistent;
  bool announced = false;
  try {
    writer.save_and_wait(second, {{"s", &next}});
    announced = true;
  } catch (const Error& error) {
    const std::string text = error.what_without_backtrace();
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    EXPECT_EQ(text.rfind("[checkpoint] ", 0), 0u) << text;
  }
  writer.drain();
  const bool reached = !files->failed.empty();
  if (reached) ++outcomes[files->failed + (announced ? " survived" : " reported")];
  files->fail_at = -1;
  const auto newest = load_and_check(folder.path());
  EXPECT_TRUE(!announced || newest == second) << "lost an announced step";
  // The same writer and a new one go on.
  writer.save_and_wait(3, {{"s", &(next = tiny_state(3))}});
  EXPECT_EQ(load_and_check(folder.path()), 3);
  return reached;
}

TEST(Commit, SurvivesTheFailureOfAnyCall) {
  std::map<std::string, int> outcomes;
  for (const int error : {EIO, ENOSPC}) {
    for (const bool persistent : {false, true}) {
      FaultyFileSystem faults;
      faults.error = error;
      faults.persistent = persistent;
      for (faults.fail_at = 0; save_with_fault(faults, 2, outcomes); ++faults.fail_at) {
        ASSERT_LT(faults.fail_at, 200);
      }
      EXPECT_GT(faults.fail_at, 25) << "the calls of one save";
    }
  }
  for (const auto& [outcome, count] : outcomes) std::cout << outcome << ": " << count << "\n";
  EXPECT_GT(outcomes["sync survived"], 0) << "one failed sync: written again to a new file";
  EXPECT_GT(outcomes["pwrite survived"], 0) << "and so is one failed write";
  EXPECT_GT(outcomes["pwrite reported"], 0);
  EXPECT_GT(outcomes["sync_directory reported"], 0);
}

TEST(Commit, SurvivesTheFailureOfAnyCallWhileReplacing) {
  std::map<std::string, int> outcomes;
  for (const int mode : {0, 1, 2, 3}) {
    FaultyFileSystem faults;
    faults.no_exchange = mode % 2 == 1;
    faults.persistent = mode / 2 == 1;
    // The state of step 1 is the same both times: whichever is there must be whole.
    for (faults.fail_at = 0; save_with_fault(faults, 1, outcomes); ++faults.fail_at) {
      ASSERT_LT(faults.fail_at, 200);
    }
  }
  EXPECT_GT(outcomes["exchange reported"], 0);
}

TEST(Commit, AStepThatIsBeingReplacedIsReadAndPutBack) {
  const TemporaryFolder folder;
  auto state = tiny_state(1);
  const auto path = Checkpointer({.levels = {{.path = folder.path()}}})
                        .save_and_wait(1, {{"s", &state}})
                        .info.path;
  // Where a writer without RENAME_EXCHANGE dies between its two renames.
  fs::rename(path, folder.path() + "/.old-step_0000000001-ab");
  EXPECT_EQ(load_and_check(folder.path()), 1);
  EXPECT_FALSE(fs::exists(path)) << "a reader changes nothing";
  const Checkpointer writer({.levels = {{.path = folder.path()}}});
  EXPECT_TRUE(fs::exists(path));
  EXPECT_EQ(load_and_check(folder.path()), 1);
}

// Whatever call of the reader the writer gets in front of, with the next step or the same again.
TEST(Commit, AReaderFindsAWholeStepWhileTheWriterGoesOn) {
  for (const int64_t second : {2, 1}) {
    bool reached = true;
    for (int64_t k = 0; reached; ++k) {
      const TemporaryFolder folder(/*in_memory=*/true);
      auto first = tiny_state(1), next = tiny_state(2), loaded = tiny_state(9);
      Checkpointer writer({.levels = {{.path = folder.path(), .keep_last = 1}}});
      writer.save_and_wait(1, {{"s", &first}});
      auto files = std::make_shared<FaultyFileSystem>();
      files->fail_at = k;
      files->instead = [&] { writer.save_and_wait(second, {{"s", &next}}); };
      const auto report =
          load_checkpoint({folder.path()}, {{"s", &loaded}}, {.file_system = files});
      EXPECT_TRUE(same_state(loaded, first) || same_state(loaded, next)) << k;
      EXPECT_TRUE(report.rejected.empty()) << report.rejected.front();
      reached = !files->failed.empty();
      ASSERT_LT(k, 100);
    }
  }
}

TEST(Commit, ARootThatVanishesIsAFailedWrite) {
  const TemporaryFolder folder;
  Checkpointer writer({.levels = {{.path = folder.path() + "/root"}}});
  fs::remove_all(folder.path() + "/root");
  auto state = tiny_state(1);
  EXPECT_OUNCE_ERROR(writer.save_and_wait(1, {{"s", &state}}), kData, "No such file");
}

TEST(Commit, FailsAfterTwoFailedSyncs) {
  const TemporaryFolder folder;
  auto files = std::make_shared<FaultyFileSystem>();
  Checkpointer writer({.levels = {{.path = folder.path()}}, .file_system = files});
  files->only = "sync";
  files->persistent = true;
  files->fail_at = files->calls = 0;
  auto state = tiny_state(1);
  EXPECT_THROW(writer.save_and_wait(1, {{"s", &state}}), Error);
  EXPECT_EQ(files->calls, 2) << "never a second sync of the same file";
  EXPECT_FALSE(fs::exists(folder.path() + "/step_0000000001"));
}

TEST(Commit, TellsWhatAFullDiskLacks) {
  const TemporaryFolder folder;
  // The second write is that of the manifest.
  for (const auto& [kind, call] : std::initializer_list<std::pair<const char*, int>>{
           {"allocate", 0}, {"pwrite", 0}, {"pwrite", 1}, {"sync", 0}}) {
    auto files = std::make_shared<FaultyFileSystem>();
    Checkpointer writer({.levels = {{.path = folder.path()}}, .file_system = files});
    auto state = tiny_state(1);
    writer.save_and_wait(1, {{"s", &state}});
    files->only = kind;
    files->error = ENOSPC;
    files->calls = 0;
    files->fail_at = call;
    auto next = tiny_state(2);
    test::expect_error(Fault::kData, {"no room for step 2 in '", " bytes, ", "bytes free"}, [&] {
      writer.save_and_wait(2, {{"s", &next}});
    });
    EXPECT_EQ(load_and_check(folder.path()), 1);
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder.path())) {
      names.insert(entry.path().filename());
    }
    EXPECT_EQ(names, (std::set<std::string>{"LATEST", "LOCK", "step_0000000001"}));
  }
}

TEST(Commit, RefusesWhatCannotFitBeforeItWritesAnything) {
  const TemporaryFolder folder;
  Checkpointer writer({.levels = {{.path = folder.path()}}});
  SampleState state;
  // 2^60 bytes, all in one value.
  state.tensors = {{"huge", at::zeros({1}).expand({int64_t{1} << 58})}};
  EXPECT_OUNCE_ERROR(writer.save_and_wait(1, {{"s", &state}}), kData, "no room for step 1");
}

TEST(Commit, WritesWholeFilesThroughShortAndInterruptedCalls) {
  const TemporaryFolder folder;
  auto files = std::make_shared<FaultyFileSystem>();
  files->short_transfers = true;
  files->no_allocate = true;
  auto state = small_state(4, 500000), loaded = small_state(5, 500000);
  Checkpointer writer({.levels = {{.path = folder.path()}}, .file_system = files});
  writer.save_and_wait(4, {{"s", &state}});
  load_checkpoint({folder.path()}, {{"s", &loaded}}, {.file_system = files});
  EXPECT_TRUE(same_state(state, loaded));
}

TEST(Commit, ALoadThatFailsChangesNothing) {
  const TemporaryFolder folder;
  auto files = std::make_shared<FaultyFileSystem>();
  auto state = small_state(4);
  Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(4, {{"s", &state}});
  int failures = 0;
  for (int64_t k = 0;; ++k) {
    auto loaded = small_state(5);
    files->calls = 0;
    files->fail_at = k;
    files->failed.clear();
    try {
      load_checkpoint({folder.path()}, {{"s", &loaded}}, {.file_system = files});
      EXPECT_TRUE(same_state(loaded, state));
    } catch (const Error& error) {
      EXPECT_TRUE(same_state(loaded, small_state(5))) << files->failed;
      ++failures;
    }
    if (files->failed.empty()) break;
  }
  EXPECT_GT(failures, 10);
}

// libhdf5 makes its own file calls: a limit on the size of files makes them fail.
TEST(Commit, SurvivesAFailureInsideTheHdf5Library) {
  const TemporaryFolder folder;
  auto state = tiny_state(1);
  Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(1, {{"s", &state}});
  for (const rlim_t limit : {4096, 200000, 1049000}) {
    const auto child = ::fork();
    if (child == 0) {
      ::signal(SIGXFSZ, SIG_IGN);
      const rlimit small{limit, limit};
      ::setrlimit(RLIMIT_FSIZE, &small);
      int code = 1;
      try {
        auto next = tiny_state(2);
        Checkpointer({.levels = {{.path = folder.path()}}}).save_and_wait(2, {{"s", &next}});
      } catch (const Error& error) {
        const std::string text = error.what_without_backtrace();
        code = text.find("no room for step 2") == std::string::npos ? 2 : 0;
        if (code != 0) std::cerr << text << std::endl;
      }
      ::_exit(code);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0) << "limit " << limit;
    EXPECT_EQ(load_and_check(folder.path()), 1);
  }
}

}  // namespace
}  // namespace ounce::ckpt
