// SPDX-License-Identifier: MIT
// What eval and sample share: a run's config, built, with the weights of its newest good
// checkpoint.
#pragma once

#include <ounce/core/train/session.h>
#include <CLI/CLI.hpp>

#include <memory>
#include <string>
#include <vector>

namespace ounce::cli {

struct RunFlags {
  std::string run, device = "auto";
  std::vector<std::string> sets;
};

void add_run_flags(CLI::App& command, RunFlags& flags);
std::unique_ptr<Session> open_run_session(const RunFlags& flags);

}  // namespace ounce::cli
