// SPDX-License-Identifier: MIT
// Power loss: the calls of some saves are logged, and after each of them the folder is rebuilt as a
// crash may leave it: what was synced is there; what was not, contents, entries of step folders and
// entries of the folders above them, is there or lost, each in turn. Oracle: a load gives what was
// announced or the save after it, bit for bit, and nothing half-written is in sight.
#include "ckpt/recording_file_system.h"

#include <gtest/gtest.h>
#include <ounce/core/check.h>

#include <iostream>
#include <map>

namespace ounce::ckpt {
namespace {

constexpr const char* kRoot = "/run/ckpt";  // under the folder of the test

SampleState state_of(int64_t seed) {
  SampleState state;
  auto generator = at::detail::createCPUGenerator(seed + 1);
  state.tensors = {{"w", at::randn({300}, generator)}};
  state.integers = {{"seed", seed}};
  return state;
}

constexpr int64_t kNothing = -1, kBroken = -2;

// The seed of the state that a load gives, before and after a writer has opened the root.
int64_t loaded_from(const Disk::Picture& picture) {
  const TemporaryFolder folder(/*in_memory=*/true);
  for (const auto& [path, content] : picture) {
    if (content) {
      write_bytes(folder.path() + path, *content);
    } else {
      std::filesystem::create_directory(folder.path() + path);
    }
  }
  const auto load = [&] {
    auto state = state_of(0);
    try {
      const auto report = load_checkpoint(folder.path() + kRoot, std::nullopt, {{"s", &state}});
      const auto seed = state.integers[0].second;
      return report.rejected.empty() && same_state(state, state_of(seed)) ? seed : kBroken;
    } catch (const Error& error) {
      return error.fault() == Fault::kNotFound ? kNothing : kBroken;
    }
  };
  const auto found = load();
  Checkpointer({.levels = {{.path = folder.path() + kRoot}}});
  return load() == found ? found : kBroken;
}

struct Scenario {
  std::vector<Call> log;
  std::vector<std::pair<size_t, int64_t>> announced;  // size of the log then, seed
};

// Saves of (step, seed).
Scenario record(bool no_exchange, int64_t keep_last,
                const std::vector<std::pair<int64_t, int64_t>>& saves) {
  const TemporaryFolder folder(/*in_memory=*/true);
  const auto files = std::make_shared<RecordingFileSystem>(folder.path());
  files->no_exchange = no_exchange;
  Checkpointer writer(
      {.levels = {{.path = folder.path() + kRoot, .keep_last = keep_last}}, .file_system = files});
  Scenario scenario;
  for (const auto& [step, seed] : saves) {
    auto state = state_of(seed);
    writer.save_and_wait(step, {{"s", &state}});
    scenario.announced.emplace_back(files->logged(), seed);
  }
  writer.drain();
  scenario.log = files->log;
  return scenario;
}

// The first crash that loses or breaks something; "" when none does. `states` counts them.
std::string violation(const Scenario& scenario, size_t& states) {
  static std::map<uint64_t, int64_t> known;  // by a sum of the picture
  Disk disk;
  for (size_t calls = 0; calls <= scenario.log.size(); ++calls) {
    if (calls > 0) disk.apply(scenario.log[calls - 1]);
    int64_t announced = kNothing, next = kNothing;
    for (const auto& [size, seed] : scenario.announced) {
      if (size <= calls) announced = seed;
      if (size > calls && next == kNothing) next = seed;
    }
    for (int bits = 0; bits < 8; ++bits) {
      const Kept kept{kRoot, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
      const auto picture = disk.after_crash(kept);
      std::string text;
      for (const auto& [path, content] : picture) text += path + '\n' + content.value_or("/");
      const auto [found, is_new] = known.emplace(block_sum(text.data(), text.size()), 0);
      if (is_new) found->second = loaded_from(picture);
      ++states;
      const auto loaded = found->second;
      if (loaded == announced || (loaded == next && next != kNothing)) continue;
      const auto& last = scenario.log[calls - (calls > 0 ? 1 : 0)];
      return c10::str("after call ", calls, " (", last.kind, " ", last.path, "), kept ", bits,
                      ": loads ", loaded, ", not ", announced, " or ", next);
    }
  }
  return "";
}

TEST(PowerLoss, LosesNothingAnnouncedAndShowsNothingHalfWritten) {
  size_t states = 0;
  for (const bool no_exchange : {false, true}) {
    const auto scenario = record(no_exchange, 1, {{1, 1}, {1, 2}, {2, 3}, {3, 4}});
    EXPECT_EQ(violation(scenario, states), "") << no_exchange;
  }
  std::cout << states << " crashes\n";
  EXPECT_GT(states, 500u);
}

TEST(PowerLoss, NoticesEveryMissingSync) {
  size_t states = 0, syncs = 0;
  const auto expect_noticed = [&](Scenario scenario, size_t call) {
    auto& missing = scenario.log[call];
    const auto what = missing.kind + " " + missing.path;
    missing.kind = "nothing";
    EXPECT_NE(violation(scenario, states), "") << what << ", call " << call;
    ++syncs;
  };
  const auto replacing = record(false, 0, {{1, 1}, {1, 2}});
  for (size_t i = 0; i < replacing.log.size(); ++i) {
    if (replacing.log[i].kind.starts_with("sync")) expect_noticed(replacing, i);
  }
  EXPECT_EQ(syncs, 2u + 2 * 4u)
      << "of both folders made, then data, manifest, its folder, the root";
  // Retention makes its renames durable before it removes the first file.
  const auto retiring = record(false, 1, {{1, 1}, {2, 2}});
  size_t last = retiring.log.size() - 1;
  while (!retiring.log[last].kind.starts_with("sync")) --last;
  expect_noticed(retiring, last);
}

}  // namespace
}  // namespace ounce::ckpt
