// SPDX-License-Identifier: MIT
// Saves that go on while training does: the gate, what happens without it, pools that are too
// small, slow and hanging disks, tickets. On the CPU and on a GPU.
#include "ckpt/faulty_file_system.h"
#include "ckpt/sample_state.h"
#include "support/devices.h"
#include "support/expect_error.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/capture.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/scan.h>
#include <ounce/core/device.h>
#include <sys/wait.h>

#include <atomic>
#include <condition_variable>
#include <set>
#include <thread>

namespace ounce::ckpt {
namespace {

using std::chrono::milliseconds;

constexpr int64_t kSlot = int64_t{4} << 20;
constexpr int64_t kSlotFloats = kSlot / 4;

// A disk that stops at calls of one kind until it is opened.
class Stopped {
 public:
  explicit Stopped(std::string kind) : kind_(std::move(kind)) {
    files->before = [this](const std::string& kind) { wait(kind); };
  }
  ~Stopped() { open(); }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  // Until a call has been stopped.
  void reached() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ > 0; });
  }

  std::shared_ptr<FaultyFileSystem> files = std::make_shared<FaultyFileSystem>();

 private:
  void wait(const std::string& kind) {
    std::unique_lock lock(mutex_);
    if (kind != kind_) return;
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
    --waiting_;
  }

  const std::string kind_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  int waiting_ = 0;
};

class Async : public test::OnDevice {
 protected:
  // `count` tensors of one slot each, small ones between them.
  SampleState state(int count, uint64_t seed) const {
    auto generator = at::detail::createCPUGenerator(seed);
    SampleState result;
    for (int i = 0; i < count; ++i) {
      const auto name = "layer/" + std::to_string(i);
      result.tensors.push_back(
          {name + "/weight", at::randn({kSlotFloats}, generator).to(device())});
      result.tensors.push_back({name + "/bias", at::randn({i * 7 + 1}, generator).to(device())});
    }
    result.integers = {{"seed", static_cast<int64_t>(seed)}};
    return result;
  }

  SampleState copy_of(const SampleState& from) const {
    auto copy = from;
    for (auto& tensor : copy.tensors) tensor.value = tensor.value.clone();
    return copy;
  }

  static void change(SampleState& state) {
    for (auto& tensor : state.tensors) tensor.value.mul_(-2).add_(1);
  }

  static void expect_same(const SampleState& a, const SampleState& b) {
    ASSERT_EQ(a.tensors.size(), b.tensors.size());
    for (size_t i = 0; i < a.tensors.size(); ++i) {
      EXPECT_TRUE(same_bits(a.tensors[i].value.cpu(), b.tensors[i].value.cpu()))
          << a.tensors[i].name;
    }
    EXPECT_EQ(a.integers, b.integers);
  }

  // What a load gives into tensors of this device.
  void expect_stored(const SampleState& expected, std::optional<int64_t> step = std::nullopt) {
    auto loaded = copy_of(expected);
    change(loaded);
    load_checkpoint(folder_.path(), step, {{"s", &loaded}});
    expect_same(loaded, expected);
  }

  CheckpointerOptions options() const {
    return {.levels = {{.path = folder_.path()}}, .slot_bytes = kSlot};
  }

  const TemporaryFolder folder_;
};
OUNCE_ON_EACH_DEVICE(Async);

TEST_P(Async, TheGateKeepsAStepFromOvertakingTheCopies) {
  Checkpointer writer(options());
  auto training = state(12, 1);
  for (int step = 0; step < 4; ++step) {
    const auto before = copy_of(training);
    const auto ticket = writer.save(step, {{"s", &training}});
    {
      const StepGuard guard(writer);
      change(training);
    }
    const auto report = ticket.wait();
    EXPECT_EQ(report.info.step, step);
    EXPECT_GT(report.bytes, 12 * kSlot);
    EXPECT_TRUE(ticket.durable(0));
    EXPECT_EQ(ticket.progress(), 1);
    EXPECT_LE(report.captured, report.seconds);
    EXPECT_TRUE(verify_step(posix_file_system(), report.info.path, true).problems.empty());
    expect_stored(before);
  }
}

TEST_P(Async, WithoutTheGateTheTensorIsNamedAndTheSaveGivenUp) {
  Stopped disk("pwrite");
  auto with = options();
  with.file_system = disk.files;
  with.pool_bytes = 2 * kSlot;  // the third slot waits for the disk
  Checkpointer writer(with);
  auto training = state(6, 1);
  const auto ticket = writer.save(1, {{"s", &training}});
  disk.reached();
  training.tensors[10].value.add_(1);
  disk.open();
  test::expect_error(Fault::kProblem, {"'s/layer/5/weight' was changed", "before_mutation()"},
                     [&] { ticket.wait(); });
  EXPECT_EQ(ticket.stage(), Ticket::Stage::kFailed);
  EXPECT_OUNCE_ERROR(load_checkpoint(folder_.path(), std::nullopt, {{"s", &training}}), kNotFound,
                     "no checkpoint");
  writer.save_and_wait(2, {{"s", &training}});
  expect_stored(training);
}

TEST_P(Async, AStepInsideBackwardGatesBucketByBucket) {
  Stopped disk("pwrite");
  auto with = options();
  with.file_system = disk.files;
  with.pool_bytes = 4 * kSlot;
  Checkpointer writer(with);
  auto training = state(8, 3);
  const auto before = copy_of(training);
  const auto ticket = writer.save(1, {{"s", &training}});
  disk.reached();
  // Backward changes the last layer first. The disk stands still, so only what is in the pool can
  // have been copied: a gate over everything would wait for it.
  const auto update = [&](int layer) {
    const at::Tensor bucket[] = {training.tensors[2 * layer].value,
                                 training.tensors[2 * layer + 1].value};
    writer.before_mutation(bucket);
    for (auto tensor : bucket) tensor.mul_(3);
  };
  std::thread opener([&] {
    std::this_thread::sleep_for(milliseconds(100));
    disk.open();
  });
  for (int layer = 7; layer >= 0; --layer) update(layer);
  opener.join();
  ticket.wait();
  expect_stored(before);
}

TEST_P(Async, OnlyTheBucketIsWaitedFor) {
  Stopped disk("pwrite");
  auto with = options();
  with.file_system = disk.files;
  with.pool_bytes = 4 * kSlot;
  Checkpointer writer(with);
  auto training = state(8, 3);
  const auto before = copy_of(training);
  const auto ticket = writer.save(1, {{"s", &training}});
  // In the pool already, or next: no byte has to reach the disk for it.
  const at::Tensor first[] = {training.tensors[0].value};
  writer.before_mutation(first);
  training.tensors[0].value.zero_();
  EXPECT_FALSE(ticket.captured());
  disk.open();
  writer.before_mutation();
  change(training);
  ticket.wait();
  expect_stored(before);
}

TEST_P(Async, StateOfOtherClassesMayChangeAtOnce) {
  Checkpointer writer(options());
  auto training = state(3, 5);
  training.tensors[0].cls = StateClass::kForward;
  training.tensors[2].cls = StateClass::kHost;
  training.tensors[4].value = training.tensors[4].value.view({-1, 2}).t();  // not contiguous
  const auto before = copy_of(training);
  const auto ticket = writer.save(1, {{"s", &training}});
  for (const int i : {0, 2, 4}) training.tensors[i].value.zero_();
  training.integers[0].second = 99;
  writer.before_mutation();
  change(training);
  ticket.wait();
  expect_stored(before);
}

TEST_P(Async, APoolThatIsTooSmallBlocksOrSpills) {
  for (const auto overflow : {Overflow::kBlock, Overflow::kSpill}) {
    Stopped disk("pwrite");
    auto with = options();
    with.file_system = disk.files;
    with.pool_bytes = 2 * kSlot;
    with.overflow = overflow;
    with.spare_gpu_bytes = -1;
    Checkpointer writer(with);
    auto training = state(9, 1);
    const auto before = copy_of(training);
    const auto ticket = writer.save(7, {{"s", &training}});
    disk.reached();
    std::thread opener;
    if (overflow == Overflow::kBlock) {
      opener = std::thread([&] {
        std::this_thread::sleep_for(milliseconds(200));
        disk.open();
      });
    }
    // Spilling, this returns although the disk stands still.
    writer.before_mutation();
    change(training);
    if (overflow == Overflow::kSpill) {
      EXPECT_LT(ticket.progress(), 0.5);
    }
    if (opener.joinable()) opener.join();
    disk.open();
    const auto report = ticket.wait();
    if (overflow == Overflow::kBlock) {
      EXPECT_GT(report.blocked, 0.1);
    }
    expect_stored(before);
  }
}

TEST_P(Async, ASaveThatMeetsAnotherWaitsSkipsOrTakesItsPlace) {
  auto training = state(2, 1);
  for (const auto busy : {Busy::kWait, Busy::kSkip, Busy::kSupersede}) {
    Stopped disk("pwrite");
    auto with = options();
    with.file_system = disk.files;
    with.busy = busy;
    Checkpointer writer(with);
    const auto first = writer.save(1, {{"s", &training}});
    disk.reached();
    std::thread opener([&] {
      std::this_thread::sleep_for(milliseconds(100));
      disk.open();
    });
    const auto second = writer.save(2, {{"s", &training}});
    opener.join();
    EXPECT_TRUE(first.wait(std::chrono::seconds(60)));
    EXPECT_TRUE(second.wait(std::chrono::seconds(60)));
    if (busy == Busy::kWait) {
      EXPECT_EQ(first.stage(), Ticket::Stage::kDurable);
      EXPECT_EQ(second.stage(), Ticket::Stage::kDurable);
      EXPECT_GT(second.wait().blocked, 0.05);
    } else if (busy == Busy::kSkip) {
      EXPECT_EQ(first.stage(), Ticket::Stage::kDurable);
      EXPECT_EQ(second.stage(), Ticket::Stage::kSkipped);
      EXPECT_OUNCE_ERROR(second.wait(), kProblem, "the save before is still on its way");
    } else {
      EXPECT_EQ(first.stage(), Ticket::Stage::kCancelled);
      EXPECT_OUNCE_ERROR(first.wait(), kProblem, "cancelled");
      EXPECT_EQ(second.stage(), Ticket::Stage::kDurable);
    }
    expect_stored(training);
  }
}

TEST_P(Async, ADiskThatHangsReleasesTheGateInTime) {
  Stopped disk("pwrite");
  auto with = options();
  with.file_system = disk.files;
  with.pool_bytes = 2 * kSlot;
  with.spare_gpu_bytes = -1;
  with.timeout = 0.2;
  Checkpointer writer(with);
  auto training = state(8, 1);
  const auto ticket = writer.save(1, {{"s", &training}});
  disk.reached();
  writer.before_mutation();  // returns
  change(training);
  const auto second = writer.save(2, {{"s", &training}});  // so does this
  EXPECT_EQ(second.stage(), Ticket::Stage::kSkipped);
  disk.open();
  EXPECT_OUNCE_ERROR(ticket.wait(), kProblem, "not copied in time");
  writer.save_and_wait(3, {{"s", &training}});
  expect_stored(training);
}

TEST_P(Async, ASaveCanBeCancelledUntilItIsPublished) {
  Stopped disk("sync");
  auto with = options();
  with.file_system = disk.files;
  auto training = state(2, 1);
  {
    Checkpointer writer(with);
    auto ticket = writer.save(1, {{"s", &training}});
    EXPECT_FALSE(ticket.wait(std::chrono::duration<double>(0.05)));
    EXPECT_FALSE(ticket.finished());
    disk.reached();
    ticket.cancel();
    disk.open();
    EXPECT_OUNCE_ERROR(ticket.wait(), kProblem, "the save of step 1 was cancelled");
    EXPECT_EQ(ticket.stage(), Ticket::Stage::kCancelled);
    ticket.cancel();  // does no harm
  }
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
    names.insert(entry.path().filename());
  }
  EXPECT_EQ(names, std::set<std::string>{"LOCK"});
}

TEST_P(Async, TheDestructorDrainsOrCancels) {
  for (const bool drain : {true, false}) {
    const TemporaryFolder folder;
    Stopped disk("pwrite");
    auto training = state(3, 1);
    Ticket ticket = [&] {
      Checkpointer writer({.levels = {{.path = folder.path()}},
                           .slot_bytes = kSlot,
                           .drain = drain,
                           .file_system = disk.files});
      auto result = writer.save(1, {{"s", &training}});
      disk.reached();
      std::thread([&] {
        std::this_thread::sleep_for(milliseconds(50));
        disk.open();
      }).detach();
      return result;
    }();
    EXPECT_EQ(ticket.stage(), drain ? Ticket::Stage::kDurable : Ticket::Stage::kCancelled);
    std::this_thread::sleep_for(milliseconds(60));  // for the detached thread
  }
}

TEST_P(Async, AFailedWriteIsRepeatedWhileTheSlotsAreHeld) {
  auto training = state(6, 1);
  for (const int64_t pool : {int64_t{0}, 2 * kSlot}) {
    auto with = options();
    const auto files = std::make_shared<FaultyFileSystem>();
    with.file_system = files;
    with.pool_bytes = pool;
    Checkpointer writer(with);
    files->only = "sync";
    files->calls = 0;
    files->fail_at = 0;
    const auto ticket = writer.save(1, {{"s", &training}});
    if (pool == 0) {
      const auto report = ticket.wait();
      EXPECT_EQ(report.retries, 1);
      EXPECT_EQ(report.warnings.size(), 1u);
      expect_stored(training);
    } else {
      EXPECT_OUNCE_ERROR(ticket.wait(), kData, "make durable");
    }
  }
}

TEST_P(Async, TensorsMayBeReplacedAndFreedBehindASave) {
  Checkpointer writer(options());
  for (int step = 0; step < 3; ++step) {
    auto training = state(4, step);
    training.tensors.push_back({"scalar", at::randn({}).to(device())});
    training.tensors.push_back({"none", at::empty({0, 4}).to(device())});
    training.tensors.push_back({"tied", training.tensors[0].value});
    const auto before = copy_of(training);
    const auto ticket = writer.save(step, {{"s", &training}});
    training.tensors.clear();  // the save holds what it needs
    ticket.wait();
    expect_stored(before, step);
  }
}

TEST_P(Async, ManySmallTensorsOfEveryDtype) {
  Checkpointer writer(options());
  SampleState training;
  auto generator = at::detail::createCPUGenerator(2);
  for (int i = 0; i < 3000; ++i) {
    const auto dtype =
        std::array{at::kFloat, at::kBFloat16, at::kLong, at::kBool, at::kByte}[i % 5];
    training.tensors.push_back({"t/" + std::to_string(i),
                                random_bits({i % 37, i % 11 + 1}, dtype, generator).to(device())});
  }
  const auto before = copy_of(training);
  const auto ticket = writer.save(1, {{"s", &training}});
  writer.before_mutation();
  for (auto& tensor : training.tensors) tensor.value.zero_();
  ticket.wait();
  auto loaded = copy_of(training);
  load_checkpoint(folder_.path(), std::nullopt, {{"s", &loaded}});
  for (size_t i = 0; i < loaded.tensors.size(); ++i) {
    ASSERT_TRUE(same_bits(loaded.tensors[i].value.cpu(), before.tensors[i].value.cpu())) << i;
  }
}

TEST_P(Async, LoadsStraightIntoTensorsAndSaysWhatItChanged) {
  Checkpointer writer(options());
  auto training = state(5, 1);
  const auto path = writer.save_and_wait(1, {{"s", &training}}).info.path;
  for (const auto verify : {Verify::kNone, Verify::kTouched, Verify::kFull}) {
    auto loaded = copy_of(training);
    change(loaded);
    const auto report =
        load_checkpoint({folder_.path()}, {{"s", &loaded}}, {.verify = verify, .staged_bytes = 0});
    EXPECT_GE(report.bytes, 5 * kSlot);
    expect_same(loaded, training);
  }
  // The last slot is damaged: by then the first ones are in their tensors.
  const StepReader reader(posix_file_system(), path);
  auto bytes = bytes_of(path + "/rank00000.h5");
  bytes[reader.find("s/layer/4/weight")->offset + 77] ^= 1;
  write_bytes(path + "/rank00000.h5", bytes);
  const auto load = [&](LoadOptions with) {
    auto loaded = copy_of(training);
    change(loaded);
    const auto expected = copy_of(loaded);
    with.readers = 1;
    try {
      load_checkpoint({folder_.path()}, {{"s", &loaded}}, with);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& error) {
      const std::string text = error.what_without_backtrace();
      EXPECT_NE(text.find("in tensor 's/layer/4/weight'"), std::string::npos) << text;
      const bool changed = text.find("values were changed") != std::string::npos;
      if (!changed) expect_same(loaded, expected);
      return changed;
    }
    return false;
  };
  EXPECT_FALSE(load({}));
  EXPECT_TRUE(load({.staged_bytes = 0}));
  EXPECT_FALSE(load({.verify = Verify::kFull, .staged_bytes = 0}));
}

TEST_P(Async, AnOlderStepIsLoadedOverADamagedOne) {
  Checkpointer writer(options());
  auto first = state(4, 1), second = state(4, 2);
  writer.save_and_wait(1, {{"s", &first}});
  const auto path = writer.save_and_wait(2, {{"s", &second}}).info.path;
  const StepReader reader(posix_file_system(), path);
  auto bytes = bytes_of(path + "/rank00000.h5");
  bytes[reader.find("s/layer/3/bias")->offset] ^= 1;
  write_bytes(path + "/rank00000.h5", bytes);
  auto loaded = copy_of(second);
  change(loaded);
  const auto report = load_checkpoint({folder_.path()}, {{"s", &loaded}}, {.staged_bytes = 0});
  EXPECT_EQ(report.info.step, 1);
  EXPECT_EQ(report.rejected.size(), 1u);
  expect_same(loaded, first);
}

TEST_P(Async, LoadsAPartByNames) {
  Checkpointer writer(options());
  auto training = state(4, 1);
  writer.save_and_wait(1, {{"s", &training}});
  auto loaded = copy_of(training);
  change(loaded);
  const auto untouched = copy_of(loaded);
  load_checkpoint({folder_.path()}, {{"s", &loaded}},
                  {.include = {"*/weight"}, .exclude = {"s/layer/2*"}});
  for (size_t i = 0; i < loaded.tensors.size(); ++i) {
    const bool chosen = i % 2 == 0 && i != 4;
    const auto& expected = (chosen ? training : untouched).tensors[i].value;
    EXPECT_TRUE(same_bits(loaded.tensors[i].value.cpu(), expected.cpu())) << i;
  }
  // What the objects lack or have more, or of another shape, is an error or a report.
  SampleState other;
  other.tensors = {training.tensors[0], {"new", at::zeros({3})}, {"layer/1/bias", at::zeros({99})}};
  other.tensors[0].value = at::zeros_like(training.tensors[0].value);
  EXPECT_OUNCE_ERROR(load_checkpoint({folder_.path()}, {{"s", &other}}), kUsage,
                     "1 missing in the checkpoint: s/new");
  const auto report = load_checkpoint({folder_.path()}, {{"s", &other}}, {.strict = false});
  EXPECT_EQ(report.missing, std::vector<std::string>{"s/new"});
  EXPECT_EQ(report.mismatched.size(), 1u);
  EXPECT_EQ(report.unexpected.size(), 7u);  // six tensors, one integer
  EXPECT_TRUE(same_bits(other.tensors[0].value.cpu(), training.tensors[0].value.cpu()));
}

TEST_P(Async, ALoadIntoASaveInFlightTearsIt) {
  auto training = state(6, 1);
  {
    Checkpointer writer(options());
    writer.save_and_wait(1, {{"s", &training}});
  }
  Stopped disk("pwrite");
  auto with = options();
  with.file_system = disk.files;
  with.pool_bytes = 2 * kSlot;
  Checkpointer writer(with);
  const auto ticket = writer.save(2, {{"s", &training}});
  disk.reached();
  load_checkpoint(folder_.path(), 1, {{"s", &training}});
  disk.open();
  EXPECT_OUNCE_ERROR(ticket.wait(), kProblem, "was changed before it was copied");
}

TEST_P(Async, SavesFromTwoThreads) {
  auto training = state(2, 1);
  Checkpointer writer({.levels = {{.path = folder_.path(), .keep_last = 0}}, .slot_bytes = kSlot});
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 2; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < 5; ++i) writer.save_and_wait(2 * i + thread, {{"s", &training}});
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(list_checkpoints(folder_.path()).size(), 10u);
  expect_stored(training);
}

TEST_P(Async, ExceptionsInCallbacksEndTheirSaveAlone) {
  auto training = state(2, 1);
  std::string throws_in;
  auto with = options();
  with.on_phase = [&](const char* phase) {
    if (phase == throws_in) throw std::runtime_error("no " + throws_in);
  };
  Checkpointer writer(with);
  int64_t step = 0;
  for (const auto* phase : {"create", "data", "sync", "manifest", "publish"}) {
    throws_in = phase;
    EXPECT_OUNCE_ERROR(writer.save_and_wait(++step, {{"s", &training}}), kProblem, "no ");
    EXPECT_OUNCE_ERROR(load_checkpoint(folder_.path(), step, {{"s", &training}}), kNotFound,
                       "none");
  }
  for (const auto* phase : {"retention", "done"}) {
    throws_in = phase;
    EXPECT_EQ(writer.save_and_wait(++step, {{"s", &training}}).warnings.size(), 1u);
    expect_stored(training, step);
  }
}

class AsyncHost : public Async {};
INSTANTIATE_TEST_SUITE_P(, AsyncHost, testing::Values(at::kCPU),
                         [](const auto&) { return std::string("cpu"); });

TEST_P(AsyncHost, AForkedChildLeavesTheParentsSavesAlone) {
  auto training = state(2, 1);
  Checkpointer writer(options());
  const auto ticket = writer.save(1, {{"s", &training}});
  const auto child = ::fork();
  if (child == 0) {
    int code = 1;
    try {
      writer.save(2, {{"s", &training}});
    } catch (const Error& error) {
      code = std::string(error.what()).find("forked") == std::string::npos ? 2 : 0;
    }
    writer.~Checkpointer();
    ::_exit(code);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  ticket.wait();
  writer.save_and_wait(3, {{"s", &training}});
  expect_stored(training, 1);
  expect_stored(training, 3);
}

TEST_P(AsyncHost, RefusesOptionsThatMakeNoSense) {
  const auto refused = [&](const auto& change, const std::string& part) {
    auto with = options();
    change(with);
    EXPECT_OUNCE_ERROR(Checkpointer(with), kUsage, part);
  };
  refused([](auto& with) { with.levels.clear(); }, "at least one level");
  refused([](auto& with) { with.slot_bytes = 5; }, "slot_bytes in multiples of 4194304");
  refused([](auto& with) { with.writers = 0; }, "writers");
  refused([](auto& with) { with.levels[0].keep_last = -1; }, "keep_last");
}

TEST_P(AsyncHost, DerivedStateIsMadeAgain) {
  struct Mixed : Stateful {
    at::Tensor master = at::randn({1000}), half = master.to(at::kBFloat16);
    void visit_state(StateVisitor& visitor) override {
      visitor.tensor("master", master, StateClass::kStep);
      visitor.derived(half, master);
    }
  } saved, loaded;
  const auto report = Checkpointer(options()).save_and_wait(1, {{"m", &saved}});
  EXPECT_EQ(read_manifest(*posix_file_system(), report.info.path).tensors.size(), 1u);
  load_checkpoint(folder_.path(), std::nullopt, {{"m", &loaded}});
  EXPECT_TRUE(same_bits(loaded.half, saved.half));
}

class AsyncGpu : public Async {};
INSTANTIATE_TEST_SUITE_P(, AsyncGpu, testing::Values(at::kCUDA),
                         [](const auto&) { return std::string("cuda"); });

TEST_P(AsyncGpu, AShortStepIsClonedAndNotWaitedFor) {
  Stopped disk("pwrite");
  auto with = options();
  with.file_system = disk.files;
  with.pool_bytes = 4 * kSlot;  // the disk stands still: what is left can only be cloned
  with.spare_gpu_bytes = 0;
  Checkpointer writer(with);
  auto training = state(64, 1);
  const auto before = copy_of(training);
  const auto ticket = writer.save(1, {{"s", &training}});
  disk.reached();
  writer.before_mutation();
  change(training);
  EXPECT_LT(ticket.progress(), 0.2);
  disk.open();
  const auto report = ticket.wait();
  EXPECT_GT(report.cloned_bytes, 50 * kSlot);
  expect_stored(before);
}

TEST_P(AsyncGpu, TheGateOfAWholePoolDoesNotWaitForTheDevice) {
  Checkpointer writer(options());
  auto training = state(16, 1);
  writer.save_and_wait(0, {{"s", &training}});  // the pool is ready from here on
  const auto before = copy_of(training);
  // Work that the copies have to wait for.
  auto busy = at::randn({8192, 8192}, device());
  synchronize(device());
  for (int i = 0; i < 100; ++i) at::mm(busy, busy);
  const auto start = std::chrono::steady_clock::now();
  const auto ticket = writer.save(1, {{"s", &training}});
  writer.before_mutation();
  change(training);
  const std::chrono::duration<double> host = std::chrono::steady_clock::now() - start;
  EXPECT_LT(host.count(), 0.1) << "the device needs more than a second for what stands before";
  ticket.wait();
  expect_stored(before);
}

TEST_P(AsyncGpu, StateOfTheHostAndTheDeviceTogether) {
  Checkpointer writer(options());
  auto training = state(4, 1);
  training.tensors.push_back({"cpu/a", at::randn({kSlotFloats + 5})});
  training.tensors.insert(training.tensors.begin() + 3, {"cpu/b", at::randn({77})});
  const auto before = copy_of(training);
  const auto ticket = writer.save(1, {{"s", &training}});
  writer.before_mutation();
  change(training);
  ticket.wait();
  expect_stored(before);
}

// The pool's last buffer becomes ready at any moment while the copying thread looks for one: nobody
// tells it.
TEST(Capture, SeesABufferThatBecomesReadyWhileItLooksForOne) {
  struct One : Stateful {
    at::Tensor value = at::ones({16});
    void visit_state(StateVisitor& visitor) override {
      visitor.tensor("value", value, StateClass::kStep);
    }
  } state;
  constexpr int kTries = 2000;
  std::mutex mutex;
  Capture* current = nullptr;
  std::atomic<int> tries = 0;
  std::thread watch([&] {
    for (int idle = 0; tries < kTries && idle < 50;) {
      const int before = tries;
      std::this_thread::sleep_for(milliseconds(100));
      idle = tries == before ? idle + 1 : 0;
    }
    const std::lock_guard lock(mutex);
    if (current != nullptr) current->fail("it waits for ever");
  });
  CopyStreams streams;
  std::string failure;
  while (tries < kTries) {
    Snapshot snapshot({{"", &state}});
    snapshot.materialize();
    const auto slots = cut_into_slots({{0, 64, -1}}, kSlot, kBlockBytes);
    Capture capture(std::move(snapshot), slots,
                    std::make_shared<HostPool>(1, slots[0].bytes, false), streams, {});
    {
      const std::lock_guard lock(mutex);
      current = &capture;
    }
    capture.run();
    const std::lock_guard lock(mutex);
    current = nullptr;
    failure = capture.failure();
    if (!failure.empty()) break;
    ++tries;
  }
  const int reached = tries.exchange(kTries);
  watch.join();
  EXPECT_EQ(failure, "") << "at try " << reached;
}

}  // namespace
}  // namespace ounce::ckpt
