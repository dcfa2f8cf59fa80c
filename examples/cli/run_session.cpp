// SPDX-License-Identifier: MIT
#include "run_session.h"

#include <ounce/ckpt/init_from.h>
#include <ounce/core/device.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/run_folder.h>

#include <iostream>

#include "commands.h"

namespace ounce::cli {

void add_run_flags(CLI::App& command, RunFlags& flags) {
  command.add_option("--run", flags.run, "run folder")->required();
  command.add_option("--device", flags.device, "auto, cpu, cuda or cuda:N");
  command.add_option("--set", flags.sets, "change one setting, a.b=c; repeatable")
      ->allow_extra_args(false);
  add_plugins(command);
}

std::unique_ptr<Session> open_run_session(const RunFlags& flags) {
  const auto folder = RunFolder::open(flags.run);
  const auto config = read_config(folder.file("config.toml"), flags.sets);
  auto session = std::make_unique<Session>(config, choose_device(flags.device));
  const auto report = ckpt::load_weights(folder.checkpoints(config), *session->model, {});
  for (const auto& rejected : report.rejected) {
    std::cerr << "WARNING: passed over a damaged checkpoint: " << rejected << std::endl;
  }
  return session;
}

}  // namespace ounce::cli
