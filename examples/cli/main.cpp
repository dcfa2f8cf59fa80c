// SPDX-License-Identifier: MIT
// The program `ounce`.
#include <malloc.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/options.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/format.h>
#include <ounce/core/version.h>
#include <ounce/ounce.h>

#include <algorithm>
#include <filesystem>
#include <iostream>

#include "commands.h"

namespace ounce::cli {

void add_plugins(CLI::App& command) {
  command
      .add_option_function<std::vector<std::string>>(
          "--plugin",
          [](const std::vector<std::string>& libraries) {
            for (const auto& library : libraries) load_plugin(library);
          },
          "shared library with extern \"C\" void ounce_register()")
      ->trigger_on_parse()
      ->allow_extra_args(false);
}

}  // namespace ounce::cli

namespace {

int run(int argc, char** argv) {
  CLI::App app("ounce: pretraining in little memory");
  app.set_version_flag("--version", ounce::version_line());
  app.require_subcommand(1);
  int exit_code = 0;
  std::string command;
  for (int i = 0; i < argc; ++i) command += (i == 0 ? "" : " ") + ounce::shell_quoted(argv[i]);
  ounce::cli::add_train(app, exit_code, command);
  ounce::cli::add_eval(app, exit_code);
  ounce::cli::add_sample(app, exit_code);
  ounce::cli::add_modules(app, exit_code);
  ounce::cli::add_report(app, exit_code);
  ounce::cli::add_ckpt(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help, --version
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    std::vector<std::string> names;
    for (const auto* known : app.get_subcommands({})) names.push_back(known->get_name());
    if (argc > 1 && argv[1][0] != '-' &&
        std::find(names.begin(), names.end(), argv[1]) == names.end()) {
      ounce::fail(ounce::Fault::kUsage, "no command is called '", argv[1], "'",
                  ounce::nearest_hint(argv[1], names));
    }
    std::cerr << "ounce: " << error.what() << "; see ./ounce --help" << std::endl;
    return static_cast<int>(ounce::Fault::kUsage);
  }
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    // A step frees what the next one needs again: pages that go back to the kernel in between cost
    // a CPU a good part of its time.
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    // Before the first tensor, so that memory is counted from the start.
    ounce::count_cpu_memory();
    ounce::register_builtins();
    return run(argc, argv);
  } catch (const ounce::Error& error) {
    std::cerr << "ounce: " << error.what_without_backtrace() << std::endl;
    return static_cast<int>(error.fault());
  } catch (const c10::Error& error) {
    std::cerr << "ounce: " << error.what_without_backtrace() << std::endl;
  } catch (const std::filesystem::filesystem_error& error) {
    std::cerr << "ounce: " << error.what() << std::endl;
    return static_cast<int>(ounce::Fault::kData);
  } catch (const std::exception& error) {
    std::cerr << "ounce: " << error.what() << std::endl;
  }
  return static_cast<int>(ounce::Fault::kProblem);
}
