// SPDX-License-Identifier: MIT
#include <ounce/core/train/run_report.h>

#include <iostream>

#include "commands.h"
#include "run_session.h"

namespace ounce::cli {

void add_sample(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("sample", "text from a run's newest checkpoint");
  struct Flags : RunFlags {
    std::string prompt;
    GenerateOptions generate;
  };
  auto flags = std::make_shared<Flags>();
  add_run_flags(*command, *flags);
  command->add_option("--prompt", flags->prompt, "text to continue; default: a line break");
  command->add_option("--tokens", flags->generate.tokens, "how many to add")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--temperature", flags->generate.temperature, "0 = the likeliest token")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--top-k", flags->generate.top_k, "sample among the k likeliest; 0 = all")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--seed", flags->generate.seed, "of the draws");
  command->callback([flags, &exit_code] {
    auto session = open_run_session(*flags);
    std::cout << printable(session->sample(flags->prompt, flags->generate)) << std::endl;
    exit_code = 0;
  });
}

}  // namespace ounce::cli
