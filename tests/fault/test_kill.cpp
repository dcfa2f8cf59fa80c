// SPDX-License-Identifier: MIT
// kill -9 of a writer that only saves: where each phase of a save begins, and at random times.
// After each kill what is committed verifies and holds exactly its step's content, the newest
// announced step is there, and the next writer goes on from it.
#include "ckpt/sample_state.h"
#include "support/count_from.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/reader.h>
#include <ounce/core/check.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iostream>
#include <random>

namespace ounce::ckpt {
namespace {

constexpr const char* kPhases[] = {"create", "data", "sync", "manifest", "publish", "retention"};
constexpr int kPhaseCount = 6;
constexpr int kElsewhere = kPhaseCount;  // opening, making the next state
constexpr int kStopsPerPhase = 5;
constexpr int kNowhere = -1;
constexpr int64_t kElements = 500'000;

// What the writer tells while it lives; the page outlives it.
struct Progress {
  std::atomic<int> phase{kElsewhere};
  std::atomic<int> stop_in{kNowhere};  // the phase in which the writer waits for its end
  std::atomic<int64_t> stop_save{0};   // in this save or a later one
  std::atomic<bool> stopped{false};
  std::atomic<int64_t> saves{0};       // begun by this writer
  std::atomic<int64_t> announced{-1};  // newest step whose save returned
};

int phase_index(const char* name) {
  for (int i = 0; i < kPhaseCount; ++i) {
    if (std::strcmp(name, kPhases[i]) == 0) return i;
  }
  return kElsewhere;
}

// Loads the newest step and compares it with what that step must hold. -1 when there is none.
int64_t newest_step(const std::string& root) {
  auto loaded = small_state(0, kElements);
  try {
    const auto report = load_checkpoint(root, std::nullopt, {{"s", &loaded}});
    OUNCE_CHECK(report.rejected.empty(), "damaged: ", report.rejected.front());
    OUNCE_CHECK(same_state(loaded, small_state(report.info.step, kElements)), "step ",
                report.info.step, " holds other values");
    return report.info.step;
  } catch (const Error& error) {
    if (error.fault() != Fault::kNotFound) throw;
    return -1;
  }
}

[[noreturn]] void write_forever(const std::string& root, Progress& progress) {
  try {
    Checkpointer writer(
        {.levels = {{.path = root, .keep_last = 2}}, .on_phase = [&](const char* phase) {
           progress.phase = phase_index(phase);
           if (progress.phase != progress.stop_in || progress.saves < progress.stop_save) {
             return;
           }
           progress.stopped = true;
           for (;;) ::pause();
         }});
    for (int64_t step = newest_step(root) + 1;; ++step) {
      auto state = small_state(step, kElements);
      ++progress.saves;
      writer.save_and_wait(step, {{"s", &state}});
      progress.announced = step;
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
  }
  ::_exit(1);
}

// Starts a writer and kills it in phase `target` of one of its first saves, or at any time after
// that save has begun. Returns the phase it died in.
int kill_in(int target, const std::string& root, Progress& progress, std::mt19937_64& random) {
  progress.phase = kElsewhere;
  progress.stop_in = target;
  progress.stop_save = 1 + static_cast<int64_t>(random() % 3);
  progress.stopped = false;
  progress.saves = 0;
  const auto child = ::fork();
  if (child == 0) write_forever(root, progress);
  int status = 0;
  while (target == kNowhere ? progress.saves < progress.stop_save : !progress.stopped) {
    if (::waitpid(child, &status, WNOHANG) == child) return -1;
    ::usleep(20);
  }
  // Up to 64 us, ..., up to 131 ms: saves take about as long.
  if (target == kNowhere) ::usleep(random() % (uint64_t{64} << random() % 12));
  ::kill(child, SIGKILL);
  ::waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? progress.phase.load() : -1;
}

void expect_all_good(const std::string& root, const Progress& progress) {
  ASSERT_GE(newest_step(root), progress.announced) << "an announced step is lost";
  std::vector<std::string> problems;
  for (const auto& info : list_checkpoints(root, &problems)) {
    const auto report = verify_step(posix_file_system(), info.path, false);
    ASSERT_TRUE(report.problems.empty()) << report.problems.front();
    auto loaded = small_state(0, kElements);
    load_checkpoint(info.path, std::nullopt, {{"s", &loaded}});
    ASSERT_TRUE(same_state(loaded, small_state(info.step, kElements))) << info.path;
  }
  ASSERT_TRUE(problems.empty()) << problems.front();
}

TEST(Kill, CommittedStepsSurviveAndTheNextWriterGoesOn) {
  at::set_num_threads(1);  // a fork copies no other thread
  const TemporaryFolder folder;
  void* page =
      ::mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(page, MAP_FAILED);
  auto& progress = *new (page) Progress;
  std::mt19937_64 random(20260101);
  int died_in[kPhaseCount + 1] = {};
  int kills = 0;
  const int most = test::count_from("OUNCE_KILLS", 60);
  for (; kills < most; ++kills) {
    const int target = kills < kStopsPerPhase * kPhaseCount ? kills % kPhaseCount : kNowhere;
    const int phase = kill_in(target, folder.path(), progress, random);
    ASSERT_GE(phase, 0) << "the writer ended by itself";
    ++died_in[phase];
    expect_all_good(folder.path(), progress);
    if (HasFatalFailure()) break;
  }
  std::cout << kills << " kills, by phase:";
  for (int i = 0; i < kPhaseCount; ++i) std::cout << " " << kPhases[i] << " " << died_in[i];
  std::cout << " elsewhere " << died_in[kElsewhere] << "; newest step "
            << newest_step(folder.path()) << "\n";
  EXPECT_GE(*std::min_element(died_in, died_in + kPhaseCount), kStopsPerPhase);
  EXPECT_GE(newest_step(folder.path()), kills / 4) << "the writers went on";
  ::munmap(page, sizeof(Progress));
}

}  // namespace
}  // namespace ounce::ckpt
