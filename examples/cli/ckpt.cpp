// SPDX-License-Identifier: MIT
// `ounce ckpt`: everything that is done with checkpoints at the prompt.
#include "ckpt_commands.h"

#include <cmath>
#include <iostream>

#include "commands.h"

namespace ounce::cli {

void print(const Json& json) {
  std::cout << json.dump(1, ' ', false, Json::error_handler_t::replace) << "\n";
}

Json number_json(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

Json scalar_json(const ckpt::Scalar& scalar) {
  if (const auto* integer = std::get_if<int64_t>(&scalar)) return *integer;
  if (const auto* number = std::get_if<double>(&scalar)) return number_json(*number);
  return std::get<std::string>(scalar);
}

std::string scalar_text(const ckpt::Scalar& scalar) {
  return scalar_json(scalar).dump(-1, ' ', false, Json::error_handler_t::replace);
}

void add_ckpt(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("ckpt", "Look at, keep and exchange checkpoints");
  command->require_subcommand(1);
  add_ckpt_look(*command, exit_code);
  add_ckpt_diff(*command, exit_code);
  add_ckpt_exchange(*command);
  add_ckpt_keep(*command, exit_code);
  add_ckpt_resume(*command);
}

}  // namespace ounce::cli
