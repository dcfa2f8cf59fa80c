// SPDX-License-Identifier: MIT
// The subcommands of the program, one file each. Each adds itself to `app` and, when chosen, leaves
// its exit code in `exit_code`.
#pragma once

#include <CLI/CLI.hpp>

#include <string>

namespace ounce::cli {

void add_train(CLI::App& app, int& exit_code, const std::string& command);
void add_eval(CLI::App& app, int& exit_code);
void add_sample(CLI::App& app, int& exit_code);
void add_modules(CLI::App& app, int& exit_code);
void add_report(CLI::App& app, int& exit_code);
void add_ckpt(CLI::App& app, int& exit_code);

// Shared by train, eval, sample and modules: loads --plugin libraries before anything is looked up.
void add_plugins(CLI::App& command);

}  // namespace ounce::cli
