// SPDX-License-Identifier: MIT
// A folder with a text and a config of a small hybrid model, and ways to run the real program in
// it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "support/program.h"
#include "support/temp_dir.h"

namespace ounce::test {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// Some text with structure to learn: sentences over a few words.
inline std::string small_text(int sentences) {
  static const char* words[] = {"red", "blue", "small", "river", "stone", "walks", "sees", "and"};
  std::mt19937 random(3);
  std::string text;
  for (int i = 0; i < sentences; ++i) {
    for (int w = 0; w < 6; ++w) text += std::string(words[random() % 8]) + (w < 5 ? " " : ".\n");
  }
  return text;
}

// A variable of the environment, for the programs started while this lives.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~ScopedVariable() { old_.empty() ? unsetenv(name_) : setenv(name_, old_.c_str(), 1); }
  ScopedVariable(const ScopedVariable&) = delete;
  ScopedVariable& operator=(const ScopedVariable&) = delete;

 private:
  const char* name_;
  std::string old_;
};

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
  // The output of a command that must succeed.
  Json json_of(const std::string& arguments) {
    const auto result = run(arguments + " --json");
    EXPECT_EQ(result.exit_code, 0) << arguments << "\n" << result.err;
    return Json::parse(result.out, nullptr, /*allow_exceptions=*/false);
  }
  // The rows of a run's metrics.jsonl of type `kind`; a line that is still being written is left
  // out.
  std::vector<Json> rows(const std::string& out, const std::string& kind) {
    std::vector<Json> found;
    std::istringstream lines(read_text(dir / (out + "/metrics.jsonl")));
    for (std::string line; std::getline(lines, line);) {
      auto row = Json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (row.is_object() && row.at("t") == kind) found.push_back(std::move(row));
    }
    return found;
  }
  // One line on stderr that names the trouble, nothing else; the exit code of design.
  void expect_refusal(const std::string& arguments, int exit_code, const std::string& text) {
    expect_one_line(arguments, run(arguments), exit_code, {text});
  }
  static void expect_one_line(const std::string& what, const ProgramResult& result, int exit_code,
                              const std::vector<std::string>& parts) {
    EXPECT_EQ(result.exit_code, exit_code) << what << "\n" << result.err;
    for (const auto& part : parts) {
      EXPECT_NE(result.err.find(part), std::string::npos) << what << ": no '" << part << "' in\n"
                                                          << result.err;
    }
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  }

  TempDir dir;
};

}  // namespace ounce::test
