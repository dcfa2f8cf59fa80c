// SPDX-License-Identifier: MIT
// Several levels: who gets which step, what each keeps, what a slow, full or damaged one does, and
// which one a load takes.
#include "ckpt/faulty_file_system.h"
#include "ckpt/sample_state.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/background.h>
#include <ounce/ckpt/levels.h>
#include <ounce/ckpt/restore.h>

#include <condition_variable>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kElements = 3'000'000;  // more than one slot

class Levels : public ::testing::Test {
 protected:
  std::string at(const std::string& name) const { return folder_.path() + "/" + name; }
  std::vector<std::string> all() const { return {at("memory"), at("disk"), at("far")}; }

  std::vector<int64_t> steps(const std::string& name) const {
    std::vector<int64_t> result;
    for (const auto& info : list_checkpoints(at(name))) result.push_back(info.step);
    return result;
  }

  CheckpointerOptions options() const {
    return {.levels = {{.path = at("memory"), .keep_last = 1, .sync = SyncPolicy::kOff},
                       {.path = at("disk"), .every = 2, .keep_last = 2, .sync = SyncPolicy::kData},
                       {.path = at("far"), .every = 4, .keep_last = 0}},
            .slot_bytes = int64_t{4} << 20};
  }

  void save(Checkpointer& writer, int64_t step, bool all_levels = false) {
    auto state = small_state(step, kElements);
    writer.save_and_wait(step, {{"s", &state}}, {.all_levels = all_levels});
  }

  // The step that a load over `roots` takes, compared with what it must hold.
  CheckpointInfo load(const std::vector<std::string>& roots) {
    auto loaded = small_state(999, kElements);
    const auto report = load_checkpoint(roots, {{"s", &loaded}});
    EXPECT_TRUE(same_state(loaded, small_state(report.info.step, kElements)));
    rejected_ = report.rejected;
    return report.info;
  }

  const TemporaryFolder folder_{/*in_memory=*/true};
  std::vector<std::string> rejected_;
};

TEST_F(Levels, EachTakesItsStepsAndKeepsItsOwn) {
  Checkpointer writer(options());
  for (int64_t step = 1; step <= 8; ++step) {
    EXPECT_TRUE(writer.due(step));
    save(writer, step);
    EXPECT_TRUE(writer.drain());
  }
  EXPECT_EQ(steps("memory"), (std::vector<int64_t>{8}));
  EXPECT_EQ(steps("disk"), (std::vector<int64_t>{8, 6}));
  EXPECT_EQ(steps("far"), (std::vector<int64_t>{8, 4}));
  save(writer, 9, /*all_levels=*/true);
  writer.drain();
  EXPECT_EQ(steps("far"), (std::vector<int64_t>{9, 8, 4}));
}

TEST_F(Levels, ACopyIsTheSameToTheLastByte) {
  Checkpointer writer(options());
  save(writer, 4);
  writer.drain();
  for (const auto* name : {"/manifest.json", "/rank00000.h5"}) {
    const auto bytes = bytes_of(at("memory/step_0000000004") + name);
    EXPECT_GT(bytes.size(), 500u);
    for (const auto* level : {"disk", "far"}) {
      EXPECT_EQ(bytes_of(at(level) + "/step_0000000004" + name), bytes) << level << name;
    }
  }
  EXPECT_TRUE(verify_step(posix_file_system(), at("far/step_0000000004"), true).problems.empty());
}

TEST_F(Levels, TicketsTellLevelByLevel) {
  Checkpointer writer(options());
  auto state = small_state(2, kElements);
  const auto ticket = writer.save(2, {{"s", &state}});
  ticket.wait();
  EXPECT_TRUE(ticket.durable(0));
  writer.drain();
  EXPECT_TRUE(ticket.durable(1));
  EXPECT_FALSE(ticket.durable(2)) << "its interval does not take step 2";
  EXPECT_TRUE(ticket.wait().warnings.empty());
}

TEST_F(Levels, AStepThatOnlyAFurtherLevelTakesComesFromTheState) {
  auto with = options();
  with.levels[0].every = 3;
  Checkpointer writer(with);
  EXPECT_FALSE(writer.due(1));
  auto state = small_state(1, kElements);
  EXPECT_EQ(writer.save(1, {{"s", &state}}).stage(), Ticket::Stage::kSkipped);
  save(writer, 2);
  EXPECT_TRUE(steps("memory").empty());
  EXPECT_EQ(steps("disk"), std::vector<int64_t>{2});
}

TEST_F(Levels, ALoadTakesTheNewestGoodStepOfAll) {
  {
    Checkpointer writer(options());
    for (int64_t step = 1; step <= 5; ++step) save(writer, step);
    writer.drain();
  }
  EXPECT_EQ(load(all()).path, at("memory/step_0000000005"));
  // The node is gone, and its memory with it.
  fs::remove_all(at("memory"));
  EXPECT_EQ(load(all()).path, at("disk/step_0000000004"));
  EXPECT_TRUE(rejected_.empty());
  // The same step elsewhere stands in for a damaged one.
  fs::resize_file(at("disk/step_0000000004/rank00000.h5"), 10000);
  EXPECT_EQ(load(all()).path, at("far/step_0000000004"));
  EXPECT_EQ(rejected_.size(), 1u);
  fs::remove_all(at("far"));
  EXPECT_EQ(load(all()).path, at("disk/step_0000000002"));
  fs::remove_all(at("disk"));
  EXPECT_OUNCE_ERROR(load(all()), kNotFound, "no checkpoint in");
}

TEST_F(Levels, TheNewestIsTheLastSavedWhereverItLies) {
  {
    Checkpointer writer(options());
    for (int64_t step = 1; step <= 8; ++step) save(writer, step);
    writer.drain();
  }
  {
    // Resumed from step 4: another branch, whose step 5 only the first level has.
    Checkpointer writer(options());
    save(writer, 5);
  }
  EXPECT_EQ(load(all()).step, 5);
  fs::remove_all(at("memory"));
  EXPECT_EQ(load(all()).step, 8);
}

TEST_F(Levels, DamageIsNotPassedOn) {
  {
    Checkpointer writer(options());
    save(writer, 3);
    writer.drain();
  }
  const auto path = at("memory/step_0000000003/rank00000.h5");
  auto bytes = bytes_of(path);
  bytes[bytes.size() / 2] ^= 4;
  write_bytes(path, bytes);
  try {
    copy_step(posix_file_system(), at("memory/step_0000000003"), at("disk"), SyncPolicy::kFull,
              true);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const StorageError& error) {
    EXPECT_NE(std::string(error.what()).find("in tensor 's/w'"), std::string::npos);
  }
  for (const auto& entry : fs::directory_iterator(at("disk"))) {
    EXPECT_EQ(entry.path().filename(), "LOCK");
  }
}

// Each call of a copy fails in turn: the level gets the whole step or nothing, the first level and
// the run go on.
TEST_F(Levels, AFailingLevelIsAWarning) {
  int64_t warned = 0, calls = 0;
  for (bool reached = true; reached; ++calls) {
    ASSERT_LT(calls, 200);
    const TemporaryFolder folder(/*in_memory=*/true);
    const auto files = std::make_shared<FaultyFileSystem>();
    Checkpointer writer({.levels = {{.path = folder.path() + "/a"}, {.path = folder.path() + "/b"}},
                         .file_system = files});
    auto state = small_state(1);
    writer.save_and_wait(1, {{"s", &state}});
    writer.drain();
    files->calls = 0;
    // The whole of one more copy, with call number `calls` failing.
    files->fail_at = calls;
    files->error = ENOSPC;
    std::string failure;
    try {
      copy_step(files, folder.path() + "/a/step_0000000001", folder.path() + "/b",
                SyncPolicy::kFull, true);
    } catch (const StorageError& error) {
      failure = error.what();
      ++warned;
    }
    reached = !files->failed.empty();
    auto loaded = small_state(2);
    files->fail_at = -1;
    const auto report = load_checkpoint({folder.path() + "/b"}, {{"s", &loaded}});
    EXPECT_TRUE(same_state(loaded, state)) << failure;
    EXPECT_TRUE(report.rejected.empty());
  }
  EXPECT_GT(warned, 10);
}

TEST_F(Levels, AFullLevelIsToldAndLeavesTheOthersAlone) {
  const auto files = std::make_shared<FaultyFileSystem>();
  auto with = options();
  with.file_system = files;
  Checkpointer writer(with);
  // The first level reserves once; the copies fail.
  files->only = "allocate";
  files->calls = 0;
  files->fail_at = 1;
  files->persistent = true;
  files->error = ENOSPC;
  auto state = small_state(4, kElements);
  const auto ticket = writer.save(4, {{"s", &state}});
  ticket.wait();
  writer.drain();
  EXPECT_FALSE(ticket.durable(1));
  const auto warnings = ticket.wait().warnings;
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].find("cannot reserve '" + at("disk")), std::string::npos) << warnings[0];
  EXPECT_EQ(load(all()).path, at("memory/step_0000000004"));
  EXPECT_TRUE(steps("disk").empty());
}

TEST(Background, LeavesOutWhatANewerJobReplaces) {
  std::mutex mutex;
  std::condition_variable changed;
  bool open = false;
  std::vector<int> ran, left_out;
  {
    Background background;
    const auto add = [&](int number, int key) {
      background.add({.run =
                          [&, number] {
                            std::unique_lock lock(mutex);
                            changed.wait(lock, [&] { return open; });
                            ran.push_back(number);
                          },
                      .uses = "step" + std::to_string(number),
                      .key = key,
                      .left_out = [&, number] { left_out.push_back(number); }});
    };
    add(0, 1);
    // Runs, or will run: the next ones wait behind it.
    while (!background.uses("step0")) continue;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    add(1, 1);
    add(2, 2);
    add(3, 1);
    add(4, -1);
    add(5, -1);
    EXPECT_TRUE(background.uses("step3"));
    EXPECT_FALSE(background.uses("step1"));
    EXPECT_FALSE(background.wait_idle(std::chrono::steady_clock::now()));
    {
      const std::lock_guard lock(mutex);
      open = true;
    }
    changed.notify_all();
    EXPECT_TRUE(background.wait_idle(std::chrono::steady_clock::time_point::max()));
  }
  EXPECT_EQ(ran, (std::vector<int>{0, 2, 3, 4, 5}));
  EXPECT_EQ(left_out, std::vector<int>{1});
}

TEST_F(Levels, TheSameFolderTwiceIsRefused) {
  auto with = options();
  with.levels[1].path = with.levels[0].path;
  EXPECT_OUNCE_ERROR(Checkpointer(with), kProblem, "is being written by process");
}

TEST_F(Levels, KeepsTheBestOnesByEitherEnd) {
  auto with = options();
  with.levels = {{.path = at("memory"),
                  .keep_last = 1,
                  .keep_best = "accuracy",
                  .best_count = 2,
                  .best_is_highest = true}};
  Checkpointer writer(with);
  auto state = small_state(1);
  for (const auto& [step, value] : {std::pair(1, 0.7), {2, 0.9}, {3, 0.8}, {4, 0.1}, {5, 0.2}}) {
    writer.save_and_wait(step, {{"s", &state}}, {.metrics = {{"accuracy", value}}});
  }
  EXPECT_EQ(steps("memory"), (std::vector<int64_t>{5, 3, 2}));
}

}  // namespace
}  // namespace ounce::ckpt
