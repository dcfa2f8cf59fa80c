// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/format.h>
#include <ounce/core/train/run_folder.h>
#include <ounce/core/train/trainer.h>

#include <filesystem>
#include <iostream>

#include "commands.h"

namespace ounce::cli {

namespace {

struct TrainFlags {
  std::string config, out, device = "auto", resume = "none", init_from;
  std::vector<std::string> sets, init_map;
  int64_t steps = 0, seed = 0;
  bool dry_run = false, quiet = false;
};

// The config of a resumed run is its own unless --config names one: that of the run folder, which a
// checkpoint or its folder lies in.
std::string config_path(const TrainFlags& flags) {
  if (!flags.config.empty() || flags.resume == "none") return flags.config;
  if (flags.resume == "auto") {
    const auto folder =
        flags.out.empty() ? RunFolder::newest("default") : RunFolder::open(flags.out);
    return folder.file("config.toml");
  }
  auto folder = std::filesystem::absolute(flags.resume).lexically_normal();
  for (int levels = 0; levels < 4; ++levels, folder = folder.parent_path()) {
    if (std::filesystem::exists(folder / "config.toml")) return (folder / "config.toml").string();
  }
  fail(Fault::kNotFound, "[train] --resume ", flags.resume,
       " is in no run folder; name the config of its run with --config");
}

// What a resumed run has to be told again.
std::string resume_flags(const CLI::App& app, const TrainFlags& flags) {
  std::string result;
  if (app.count("--device") > 0) result += " --device " + flags.device;
  for (const auto& plugin : app.get_option("--plugin")->results()) {
    result += " --plugin " + shell_quoted(plugin);
  }
  return result;
}

void train(const CLI::App& app, TrainFlags flags, const std::string& command, int& exit_code) {
  if (app.count("--seed") > 0) flags.sets.push_back("run.seed=" + std::to_string(flags.seed));
  TrainerOptions options;
  options.config = read_config(config_path(flags), flags.sets);
  options.name =
      flags.config.empty() ? "default" : std::filesystem::path(flags.config).stem().string();
  options.out = flags.out;
  options.device = flags.device;
  options.resume = flags.resume;
  if (app.count("--steps") > 0) options.stop_after = flags.steps;
  options.init_from = flags.init_from;
  options.init_map = flags.init_map;
  options.dry_run = flags.dry_run;
  options.quiet = flags.quiet;
  options.command = command;
  options.resume_flags = resume_flags(app, flags);
  OUNCE_CHECK(options.init_from.empty() || options.resume == "none",
              "[train] --init-from starts a new run; it cannot be combined with --resume");
  Trainer(std::move(options), std::cout).run();
  exit_code = 0;
}

}  // namespace

void add_train(CLI::App& app, int& exit_code, const std::string& command_line) {
  auto* command = app.add_subcommand("train", "train a model");
  auto flags = std::make_shared<TrainFlags>();
  command->add_option("--config", flags->config,
                      "TOML file; default: a small GLA model on C++ headers");
  command->add_option("--set", flags->sets, "change one setting, a.b=c; repeatable")
      ->allow_extra_args(false);
  command->add_option("--out", flags->out, "run folder; default runs/<config>-<n>");
  command->add_option("--steps", flags->steps, "stop after step N; default run.steps")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--device", flags->device, "auto, cpu, cuda or cuda:N");
  command->add_option("--seed", flags->seed, "run.seed");
  command->add_option("--resume", flags->resume,
                      "none, auto (of --out, or the newest run), or a path");
  command->add_option("--init-from", flags->init_from,
                      "start from the weights of a checkpoint or a .safetensors file");
  command->add_option("--init-map", flags->init_map, "rename on the way, from=to; repeatable")
      ->allow_extra_args(false);
  command->add_flag("--dry-run", flags->dry_run, "print the plan and stop; writes nothing");
  command->add_flag("--quiet", flags->quiet, "print warnings and the last lines only");
  add_plugins(*command);
  command->callback([command, flags, command_line, &exit_code] {
    train(*command, *flags, command_line, exit_code);
  });
}

}  // namespace ounce::cli
