// SPDX-License-Identifier: MIT
// Tests that repeat something take how often from the environment in their long form
// (tests/fault/long.sh).
#pragma once

#include <cstdlib>

namespace ounce::test {

inline int count_from(const char* variable, int usual) {
  const char* given = std::getenv(variable);
  return given == nullptr ? usual : std::atoi(given);
}

}  // namespace ounce::test
