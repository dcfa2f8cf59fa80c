// SPDX-License-Identifier: MIT
// The real program: trains, resumes bit for bit, survives kill -9, and refuses bad input in one
// line.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "support/program.h"
#include "support/temp_dir.h"

namespace ounce::test {
namespace {

namespace fs = std::filesystem;

// Some text with structure to learn: sentences over a few words.
std::string small_text(int sentences) {
  static const char* words[] = {"red", "blue", "small", "river", "stone", "walks", "sees", "and"};
  std::mt19937 random(3);
  std::string text;
  for (int i = 0; i < sentences; ++i) {
    for (int w = 0; w < 6; ++w) text += std::string(words[random() % 8]) + (w < 5 ? " " : ".\n");
  }
  return text;
}

class Train : public testing::Test {
 protected:
  void SetUp() override {
    dir.write_file("text.txt", small_text(2000));
    dir.write_file("hybrid.toml", R"(format = 1
[model]
dim = 32
layers = 2
mixer = [{ name = "gla", heads = 2 }, { name = "attention", heads = 2 }]
dropout = 0.1
[data]
name = "text"
files = "text.txt"
sequence = 32
batch = 4
accumulate = 2
[optimizer]
name = "adamw"
lr = 1e-2
schedule = { name = "cosine", warmup = 5 }
[checkpoint]
every = 10
[run]
steps = 40
eval_every = 15
eval_batches = 2
final_eval_batches = 4
log_every = 5
sample_tokens = 20
)");
  }
  ProgramResult run(const std::string& arguments) { return run_program(dir.path(), arguments); }
  ProgramResult train(const std::string& arguments) {
    return run("train --device cpu --config hybrid.toml " + arguments);
  }
  // One line on stderr that names the trouble, nothing else; the exit code of design.
  void expect_refusal(const std::string& arguments, int exit_code, const std::string& text) {
    const auto result = run(arguments);
    EXPECT_EQ(result.exit_code, exit_code) << arguments << "\n" << result.err;
    EXPECT_NE(result.err.find(text), std::string::npos) << arguments << "\n" << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  }

  TempDir dir;
};

TEST_F(Train, ResumeIsBitIdenticalToNeverHavingStopped) {
  for (const std::string compute : {"fp32", "bf16"}) {
    const auto set = "--set precision.compute=" + compute + " ";
    const auto a = "A" + compute, b = "B" + compute;
    const auto whole = train(set + "--steps 40 --out " + a);
    ASSERT_EQ(whole.exit_code, 0) << whole.err;
    ASSERT_EQ(train(set + "--steps 20 --out " + b).exit_code, 0);
    const auto resumed = train(set + "--resume auto --steps 40 --out " + b);
    ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    EXPECT_NE(resumed.out.find("at step 20"), std::string::npos);
    const auto diff = run("ckpt diff " + a + " " + b);
    EXPECT_EQ(diff.exit_code, 0) << diff.out << diff.err;
  }
  // The comparison can fail: another seed gives other weights.
  ASSERT_EQ(train("--steps 40 --seed 2 --out C").exit_code, 0);
  EXPECT_EQ(run("ckpt diff Afp32 C").exit_code, 1);
}

TEST_F(Train, LearnsAndWritesTheRunFolder) {
  const auto result = train("--out R");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (const char* name : {"config.toml", "metrics.jsonl", "samples.txt", "ckpt"}) {
    EXPECT_TRUE(fs::exists(dir.path() + "/R/" + name)) << name;
  }
  double first = 0, last = 0;
  std::map<std::string, int> kinds;
  std::istringstream rows(read_text(dir.path() + "/R/metrics.jsonl"));
  for (std::string line; std::getline(rows, line);) {
    const auto row = nlohmann::json::parse(line);
    ++kinds[row.at("t").get<std::string>()];
    if (row.at("t") == "train") {
      for (const char* field : {"step", "loss", "lr", "mem"})
        EXPECT_TRUE(row.contains(field)) << line;
      (first == 0 ? first : last) = row.at("loss").get<double>();
    }
  }
  for (const char* kind : {"config", "train", "eval", "sample", "ckpt"})
    EXPECT_GT(kinds[kind], 0) << kind;
  EXPECT_GT(first, 5.0);
  EXPECT_LT(last, first - 1.5) << "the loss did not fall";
  EXPECT_NE(result.out.find("resume: ./ounce train --resume auto --out R"), std::string::npos);
  const auto eval = run("eval --run R --device cpu --json");
  ASSERT_EQ(eval.exit_code, 0) << eval.err;
  EXPECT_LT(nlohmann::json::parse(eval.out).at("val_loss").get<double>(), first - 1.5);
  const auto sample = run("sample --run R --device cpu --prompt 'red ' --tokens 16");
  ASSERT_EQ(sample.exit_code, 0) << sample.err;
  EXPECT_TRUE(sample.out.starts_with("red ")) << sample.out;
  ASSERT_EQ(run("report --run R").exit_code, 0);
  EXPECT_NE(read_text(dir.path() + "/R/report.html").find("<polyline"), std::string::npos);
}

TEST_F(Train, BatchesInPartsGiveTheSameLoss) {
  const auto loss = [&](const std::string& arguments, const std::string& out) {
    EXPECT_EQ(train(arguments + " --set model.dropout=0.0 --steps 5 --out " + out).exit_code, 0);
    const auto eval = run("eval --json --device cpu --run " + out);
    return nlohmann::json::parse(eval.out).at("val_loss").get<double>();
  };
  EXPECT_NEAR(loss("--set data.accumulate=1", "W"), loss("--set data.accumulate=4", "P"), 1e-4);
}

TEST_F(Train, DryRunWritesNothing) {
  const auto result = train("--dry-run --out D");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("activations"), std::string::npos) << result.out;
  EXPECT_FALSE(fs::exists(dir.path() + "/D"));
}

TEST_F(Train, InitFromTakesTheWeightsAlone) {
  ASSERT_EQ(train("--steps 20 --out S").exit_code, 0);
  const auto result = train("--init-from S --steps 0 --out T");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const auto a = run("eval --run S --device cpu --json"),
             b = run("eval --run T --device cpu --json");
  EXPECT_EQ(a.out, b.out);
}

TEST_F(Train, RefusesBadInputInOneLine) {
  ASSERT_EQ(train("--steps 2 --out R").exit_code, 0);
  const std::string base = "train --device cpu --config hybrid.toml ";
  expect_refusal("trian", 2, "");
  expect_refusal("train --sed 3", 2, "--sed");
  expect_refusal(base + "--steps many", 2, "--steps");
  expect_refusal(base + "--set model.dimm=3", 2, "did you mean 'dim'");
  expect_refusal(base + "--set model.dim", 2, "key=value");
  expect_refusal(base + "--out R", 2, "--resume auto");
  expect_refusal(base + "--resume auto --out N", 3, "not a run folder");
  expect_refusal(base + "--resume auto --out R --set model.dim=16", 2, "model.dim: 32 -> 16");
  expect_refusal("train --config hybrid.toml --device cuda:77", 2, "cuda:77");
  expect_refusal("train --device cpu --config none.toml", 4, "none.toml");
  expect_refusal(base + "--set data.files=none.txt", 4, "none.txt");
  dir.write_file("empty.txt", "");
  expect_refusal(base + "--set data.files=empty.txt", 4, "empty.txt");
  expect_refusal(base + "--set data.sequence=100000", 2, "sequence");
  expect_refusal(base + "--plugin none.so", 2, "none.so");
  expect_refusal(base + "--init-from none.safetensors", 3, "none.safetensors");
  expect_refusal("sample --run none", 3, "none");
  expect_refusal("modules nothing_like_this_at_all", 2, "no kind or name");
  // Nothing was written by any of them.
  EXPECT_FALSE(fs::exists(dir.path() + "/N"));
  EXPECT_EQ(run("ckpt verify R").exit_code, 0);
}

TEST_F(Train, RefusesManyRanks) {
  const auto result =
      run_program(dir.path(), "train --config hybrid.toml --device cpu --out Z; exit $?");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  setenv("WORLD_SIZE", "2", 1);
  expect_refusal("train --device cpu --config hybrid.toml --out Y", 2, "WORLD_SIZE=2");
  unsetenv("WORLD_SIZE");
}

TEST_F(Train, DamagedNewestStepFallsBackLoudly) {
  ASSERT_EQ(train("--steps 30 --out R").exit_code, 0);
  std::vector<fs::path> steps;
  for (const auto& entry : fs::directory_iterator(dir.path() + "/R/ckpt")) {
    if (entry.path().filename().string().starts_with("step_")) steps.push_back(entry.path());
  }
  std::sort(steps.begin(), steps.end());
  ASSERT_GE(steps.size(), 2u);
  for (const auto& entry : fs::directory_iterator(steps.back())) {
    if (entry.path().extension() == ".h5")
      fs::resize_file(entry.path(), fs::file_size(entry.path()) / 2);
  }
  const auto result = train("--resume auto --steps 31 --out R");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("WARNING"), std::string::npos) << result.out;
  EXPECT_NE(result.out.find("at step 20"), std::string::npos) << result.out;
}

// Starts the program in the background; returns its pid.
pid_t start(const std::string& folder, const std::vector<std::string>& arguments) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  if (chdir(folder.c_str()) != 0) _exit(126);
  const int log = open("background.txt", O_WRONLY | O_CREAT | O_TRUNC, 0644);
  dup2(log, 1);
  dup2(log, 2);
  std::vector<char*> argv = {const_cast<char*>(OUNCE_PROGRAM)};
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  execv(OUNCE_PROGRAM, argv.data());
  _exit(127);
}

int wait_for(pid_t pid) {
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Until a committed step lies there, or the time is up.
bool wait_for_step(const std::string& root) {
  for (int i = 0; i < 600; ++i) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(root, error)) {
      if (entry.path().filename().string().starts_with("step_")) return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return false;
}

std::vector<std::string> endless(const std::string& resume) {
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
          "--steps",
          "1000000",
          "--resume",
          resume,
          "--out",
          "K"};
}

TEST_F(Train, SigintSavesAndResumes) {
  for (const int signal : {SIGINT, SIGTERM}) {
    const auto pid = start(dir.path(), endless(signal == SIGINT ? "none" : "auto"));
    ASSERT_TRUE(wait_for_step(dir.path() + "/K/ckpt"));
    std::this_thread::sleep_for(std::chrono::milliseconds(signal == SIGINT ? 0 : 3000));
    kill(pid, signal);
    EXPECT_EQ(wait_for(pid), 0);
    const auto text = read_text(dir.path() + "/background.txt");
    EXPECT_NE(text.find("saved step"), std::string::npos) << text;
    EXPECT_NE(text.find("resume: "), std::string::npos) << text;
    EXPECT_EQ(run("ckpt verify K").exit_code, 0);
  }
}

TEST_F(Train, SurvivesKillNine) {
  std::mt19937 random(5);
  for (int round = 0; round < 5; ++round) {
    const auto pid = start(dir.path(), endless(round == 0 ? "none" : "auto"));
    ASSERT_TRUE(wait_for_step(dir.path() + "/K/ckpt"));
    std::this_thread::sleep_for(
        std::chrono::milliseconds(round == 0 ? 500 : 2500 + random() % 1500));
    ASSERT_EQ(kill(pid, SIGKILL), 0) << read_text(dir.path() + "/background.txt");
    EXPECT_EQ(wait_for(pid), 128 + SIGKILL);
    const auto verify = run("ckpt verify K");
    EXPECT_EQ(verify.exit_code, 0) << verify.out << verify.err;
  }
  const auto result = train(
      "--resume auto --steps 1 --out K --set checkpoint.every=2 "
      "--set run.plan=false --set run.eval_every=0");
  EXPECT_EQ(result.exit_code, 0) << result.err;
}

TEST(Configs, TinyOnesTrainThreeSteps) {
  TempDir dir;
  int count = 0;
  for (const auto& entry : fs::directory_iterator(OUNCE_SOURCE "/examples/configs")) {
    const auto name = entry.path().stem().string();
    if (!name.ends_with("_tiny")) continue;
    const auto result =
        run_program(dir.path(), "train --device cpu --steps 3 --config '" + entry.path().string() +
                                    "' --set run.final_eval_batches=2 --set run.sample_tokens=10");
    EXPECT_EQ(result.exit_code, 0) << name << "\n" << result.err;
    EXPECT_TRUE(fs::exists(dir.path() + "/runs/" + name + "-1/ckpt")) << name;
    ++count;
  }
  EXPECT_GE(count, 3);
}

}  // namespace
}  // namespace ounce::test
