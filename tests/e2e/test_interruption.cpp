// SPDX-License-Identifier: MIT
// The real program is stopped by signals, killed, and out of disk: what it committed stays, and the
// run goes on.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <optional>
#include <thread>

#include "e2e/train_fixture.h"

namespace ounce::test {
namespace {

// The program in the background, killed at the end of its scope at the latest. Its streams go to
// stdout.txt and stderr.txt, as those of run_program() do.
class Background {
 public:
  Background(const std::string& folder, std::vector<std::string> arguments,
             std::optional<rlim_t> largest_file = {})
      : folder_(folder) {
    // A poll must not read what the program before it wrote.
    fs::remove(folder + "/stdout.txt");
    arguments.insert(arguments.begin(), OUNCE_PROGRAM);
    std::vector<char*> argv;
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ != 0) return;
    if (chdir(folder.c_str()) != 0) _exit(126);
    dup2(open("stdout.txt", O_WRONLY | O_CREAT | O_TRUNC, 0644), 1);
    dup2(open("stderr.txt", O_WRONLY | O_CREAT | O_TRUNC, 0644), 2);
    if (largest_file) {
      signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{*largest_file, *largest_file};
      setrlimit(RLIMIT_FSIZE, &limit);
    }
    execv(argv[0], argv.data());
    _exit(127);
  }
  ~Background() {
    if (pid_ > 0) stop(SIGKILL);
  }
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  std::string out() const { return read_text(folder_ + "/stdout.txt"); }

  // Waits for the end, with run_program()'s meaning of the exit code.
  ProgramResult wait() {
    int status = 0;
    waitpid(std::exchange(pid_, -1), &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), out(),
            read_text(folder_ + "/stderr.txt")};
  }
  ProgramResult stop(int signal) {
    kill(pid_, signal);
    return wait();
  }
  // Until `condition` holds; false after half a minute, or when the program has ended.
  template <class Condition>
  bool wait_until(Condition condition) {
    for (int i = 0; i < 3000; ++i) {
      if (condition()) return true;
      siginfo_t info{};
      waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT);
      if (info.si_pid == pid_) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }

 private:
  std::string folder_;
  pid_t pid_ = -1;
};

class Interruption : public Train {
 protected:
  // A run in folder K that would go on for hours.
  std::vector<std::string> endless(const std::string& resume) const {
    return {"train",
            "--device",
            "cpu",
            "--config",
            "hybrid.toml",
            "--set",
            "checkpoint.every=2",
            "--set",
            "run.plan=false",
            "--set",
            "run.eval_every=0",
            "--set",
            "run.log_every=1",
            "--steps",
            "1000000",
            "--resume",
            resume,
            "--out",
            "K"};
  }
  int64_t newest_step() { return json_of("ckpt ls K").at("steps").at(0).at("step"); }
  // Whether a step after `step` lies committed; cheap enough to poll.
  bool has_step_after(int64_t step) const {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(dir / "K/ckpt", error)) {
      const auto name = entry.path().filename().string();
      if (name.starts_with("step_") && std::stoll(name.substr(5)) > step) return true;
    }
    return false;
  }
};

TEST_F(Interruption, SignalsSaveAndTheRunResumes) {
  std::string saved;
  for (const int signal : {SIGINT, SIGTERM}) {
    Background program(dir.path(), endless(saved.empty() ? "none" : "auto"));
    ASSERT_TRUE(program.wait_until([&] {
      return program.out().find("\nstep ") != std::string::npos;
    })) << program.out();
    const auto result = program.stop(signal);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_NE(result.out.find("resume: "), std::string::npos) << result.out;
    if (!saved.empty()) {
      EXPECT_NE(result.out.find("at step " + saved + "\n"), std::string::npos) << result.out;
    }
    saved = std::to_string(newest_step());
    EXPECT_NE(result.out.find("saved step " + saved + "\n"), std::string::npos) << result.out;
    EXPECT_EQ(run("ckpt verify K").exit_code, 0);
  }
}

TEST_F(Interruption, SurvivesKillNine) {
  std::mt19937 random(5);
  int64_t newest = -1;
  for (int round = 0; round < 5; ++round) {
    Background program(dir.path(), endless(round == 0 ? "none" : "auto"));
    ASSERT_TRUE(program.wait_until([&] { return has_step_after(newest); })) << program.out();
    std::this_thread::sleep_for(std::chrono::milliseconds(random() % 300));
    EXPECT_EQ(program.stop(SIGKILL).exit_code, 128 + SIGKILL);
    const auto announced = rows("K", "ckpt");
    const auto before = std::exchange(newest, newest_step());
    EXPECT_GT(newest, before);
    if (!announced.empty()) {
      EXPECT_GE(newest, announced.back().at("step").get<int64_t>()) << "an announced step is lost";
    }
    const auto verify = run("ckpt verify K");
    EXPECT_EQ(verify.exit_code, 0) << verify.out << verify.err;
  }
  const auto result = train(
      "--set checkpoint.every=2 --set run.plan=false --set run.eval_every=0 "
      "--set run.log_every=1 --resume auto --out K --steps " +
      std::to_string(newest + 3));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(newest_step(), newest + 3);
  // Every step of the six sittings is there once, in order.
  const auto train_rows = rows("K", "train");
  ASSERT_EQ(static_cast<int64_t>(train_rows.size()), newest + 3);
  for (size_t i = 0; i < train_rows.size(); ++i) ASSERT_EQ(train_rows[i].at("step"), i + 1);
}

TEST_F(Interruption, AFullDiskKeepsTheLastStep) {
  ASSERT_EQ(train("--steps 20 --quiet --out K").exit_code, 0);
  // No file may become as large as a checkpoint: saves in between fail loudly, the last one ends
  // it.
  const auto size = fs::file_size(dir / "K/ckpt/step_0000000020/rank00000.h5");
  for (const auto limit : {size / 2, size - 4096}) {
    Background program(
        dir.path(),
        {"train", "--device", "cpu", "--config", "hybrid.toml", "--resume", "auto", "--out", "K"},
        limit);
    const auto result = program.wait();
    expect_one_line("full disk", result, 4, {"[checkpoint]", "'K/ckpt"});
    EXPECT_NE(result.out.find("WARNING: step 30 was not saved"), std::string::npos) << result.out;
    EXPECT_EQ(newest_step(), 20);
    EXPECT_EQ(run("ckpt verify K").exit_code, 0);
  }
  EXPECT_EQ(train("--resume auto --out K").exit_code, 0);
  EXPECT_EQ(newest_step(), 40);
}

}  // namespace
}  // namespace ounce::test
