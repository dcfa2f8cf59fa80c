// SPDX-License-Identifier: MIT
// Power loss: the calls of some saves are logged, and after each of them the folder is rebuilt as a
// crash may leave it: what was synced is there; what was not, contents, entries of step folders and
// entries of the folders above them, is there or lost, each in turn. Oracle: a load gives what was
// announced or the save after it, bit for bit, and nothing half-written is in sight.
#include "ckpt/faulty_file_system.h"
#include "ckpt/sample_state.h"

#include <gtest/gtest.h>
#include <ounce/core/check.h>

#include <iostream>
#include <map>
#include <optional>

namespace ounce::ckpt {
namespace {

constexpr const char* kRoot = "/run/ckpt";  // under the folder of the test

struct Call {
  std::string kind, path, to;
  int64_t offset = 0;
  std::string data;
};

class RecordingFileSystem : public FaultyFileSystem {
 public:
  explicit RecordingFileSystem(std::string base) : base_(std::move(base)) {}
  std::vector<Call> log;

  int open(const std::string& path, Mode mode, int& descriptor) override {
    // The syncs of the hint come after the commit and would stand in for missing ones.
    if (path.ends_with("/LATEST.tmp")) return EACCES;
    const int error = FaultyFileSystem::open(path, mode, descriptor);
    if (error != 0 || mode == Mode::kRead) return error;
    paths_[descriptor] = path;
    note(0, "create", path);
    // libhdf5 has written its part by itself.
    if (mode == Mode::kWrite) log.push_back({"write", inside(path), "", 0, bytes_of(path)});
    return 0;
  }
  int pwrite(int descriptor, const void* data, size_t size, int64_t offset, size_t& done) override {
    const int error = FaultyFileSystem::pwrite(descriptor, data, size, offset, done);
    log.push_back({"write", inside(paths_.at(descriptor)), "", offset,
                   std::string(static_cast<const char*>(data), done)});
    return error;
  }
  int sync(int descriptor) override { return note(0, "sync", paths_.at(descriptor)); }
  int sync_directory(const std::string& path) override { return note(0, "sync_directory", path); }
  int rename(const std::string& from, const std::string& to) override {
    return note(FaultyFileSystem::rename(from, to), "rename", from, to);
  }
  int exchange(const std::string& first, const std::string& second) override {
    return note(FaultyFileSystem::exchange(first, second), "exchange", first, second);
  }
  int make_directory(const std::string& path) override {
    return note(FaultyFileSystem::make_directory(path), "make_directory", path);
  }
  int unlink(const std::string& path) override {
    return note(FaultyFileSystem::unlink(path), "remove", path);
  }
  int remove_directory(const std::string& path) override {
    return note(FaultyFileSystem::remove_directory(path), "remove", path);
  }

 private:
  std::string inside(const std::string& path) const { return path.substr(base_.size()); }
  int note(int error, const char* kind, const std::string& path, const std::string& to = "") {
    if (error == 0) log.push_back({kind, inside(path), to.empty() ? to : inside(to)});
    return error;
  }

  std::string base_;
  std::map<int, std::string> paths_;
};

// A file or a folder, as it is and as it was last synced.
struct Node {
  bool folder = false;
  std::string data, synced_data;
  std::map<std::string, std::shared_ptr<Node>> entries, synced_entries;
};

struct Kept {
  bool contents, inner, outer;
};

class Disk {
 public:
  Disk() { base_->folder = true; }

  void apply(const Call& call) {
    if (call.kind == "create" || call.kind == "make_directory") {
      auto& slot = entry(call.path) = std::make_shared<Node>();
      slot->folder = call.kind == "make_directory";
    } else if (call.kind == "write") {
      auto& data = find(call.path)->data;
      data.resize(std::max(data.size(), call.offset + call.data.size()));
      data.replace(call.offset, call.data.size(), call.data);
    } else if (call.kind == "sync") {
      find(call.path)->synced_data = find(call.path)->data;
    } else if (call.kind == "sync_directory") {
      find(call.path)->synced_entries = find(call.path)->entries;
    } else if (call.kind == "rename") {
      entry(call.to) = find(call.path);
      remove(call.path);
    } else if (call.kind == "exchange") {
      std::swap(entry(call.path), entry(call.to));
    } else if (call.kind == "remove") {
      remove(call.path);
    }
  }

  // Path -> content; nothing for a folder.
  using Picture = std::map<std::string, std::optional<std::string>>;
  Picture after_crash(const Kept& kept) const {
    Picture picture;
    collect(*base_, "", kept, picture);
    return picture;
  }

 private:
  static std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }
  std::shared_ptr<Node> find(const std::string& path) { return path.empty() ? base_ : entry(path); }
  std::map<std::string, std::shared_ptr<Node>>& siblings(const std::string& path) {
    return find(path.substr(0, path.rfind('/')))->entries;
  }
  std::shared_ptr<Node>& entry(const std::string& path) { return siblings(path)[name_of(path)]; }
  void remove(const std::string& path) { siblings(path).erase(name_of(path)); }

  static void collect(const Node& node, const std::string& path, const Kept& kept, Picture& out) {
    const bool is_outer = path.size() <= std::string(kRoot).size();
    for (const auto& [name, child] :
         (is_outer ? kept.outer : kept.inner) ? node.entries : node.synced_entries) {
      auto& content = out[path + "/" + name];
      if (child->folder) {
        collect(*child, path + "/" + name, kept, out);
      } else {
        content = kept.contents ? child->data : child->synced_data;
        content->resize(child->data.size());  // a size may be kept without the bytes
      }
    }
  }

  std::shared_ptr<Node> base_ = std::make_shared<Node>();
};

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
  Checkpointer({.root = folder.path() + kRoot});
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
      {.root = folder.path() + kRoot, .keep_last = keep_last, .file_system = files});
  Scenario scenario;
  for (const auto& [step, seed] : saves) {
    auto state = state_of(seed);
    writer.save(step, {{"s", &state}});
    scenario.announced.emplace_back(files->log.size(), seed);
  }
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
      const Kept kept{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
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
