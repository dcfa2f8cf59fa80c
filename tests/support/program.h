// SPDX-License-Identifier: MIT
// Runs the real program from a test.
#pragma once

#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace ounce::test {

struct ProgramResult {
  int exit_code = -1;  // 128 + signal when it was killed
  std::string out, err;
};

inline std::string read_text(const std::string& path) {
  std::ostringstream content;
  content << std::ifstream(path, std::ios::binary).rdbuf();
  return content.str();
}

// `folder` takes the captured streams; `arguments` go through the shell.
inline ProgramResult run_program(const std::string& folder, const std::string& arguments) {
  const auto out = folder + "/stdout.txt", err = folder + "/stderr.txt";
  const auto line =
      "cd '" + folder + "' && '" OUNCE_PROGRAM "' " + arguments + " >'" + out + "' 2>'" + err + "'";
  const int status = std::system(line.c_str());
  ProgramResult result;
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.out = read_text(out);
  result.err = read_text(err);
  return result;
}

}  // namespace ounce::test
