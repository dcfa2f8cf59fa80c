// SPDX-License-Identifier: MIT
// The warnings that are given while it is the handler:
//
//   Said said;
//   const c10::WarningUtils::WarningHandlerGuard guard(&said);
#pragma once

#include <c10/util/Exception.h>

#include <string>
#include <vector>

namespace ounce::test {

struct Said : c10::WarningHandler {
  void process(const c10::Warning& warning) override { all.push_back(warning.msg()); }
  std::vector<std::string> all;
};

}  // namespace ounce::test
