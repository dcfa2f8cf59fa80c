// SPDX-License-Identifier: MIT
// `ounce ckpt resume-cmd`: the line that goes on from a checkpoint.
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/scan.h>
#include <ounce/core/options.h>
#include <ounce/core/train/format.h>
#include <ounce/core/train/run_folder.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <sstream>

#include "ckpt_commands.h"

namespace ounce::cli {
namespace {

namespace fs = std::filesystem;
using namespace ounce::ckpt;

// Values of a flag in a command line as it was noted: words without their quotes.
std::vector<std::string> values_of(const std::string& command, const std::string& flag) {
  std::vector<std::string> values;
  std::istringstream words(command);
  for (std::string word; words >> word;) {
    if (word == flag && words >> word) {
      values.push_back(word);
    } else if (word.starts_with(flag + "=")) {
      values.push_back(word.substr(flag.size() + 1));
    }
  }
  return values;
}

// The run folder that a step lies in, as the user would name it; "" when it lies in none.
std::string run_of(const std::string& step_folder) {
  auto folder = fs::absolute(step_folder).lexically_normal();
  for (int levels = 0; levels < 4; ++levels, folder = folder.parent_path()) {
    if (!fs::exists(folder / "config.toml")) continue;
    const bool relative = fs::path(step_folder).is_relative();
    return (relative ? folder.lexically_proximate(fs::current_path()) : folder).string();
  }
  return "";
}

// `base`, or base-2, base-3, ...: the first that is not there.
std::string free_path(const std::string& base) {
  auto path = base;
  for (int n = 2; fs::exists(path); ++n) path = base + "-" + std::to_string(n);
  return path;
}

// Where the run goes on as itself: its own folder of checkpoints was named, not one step.
bool continues(const std::string& run, const std::string& root, const Options& config) {
  std::error_code error;
  const auto levels = RunFolder::open(run).checkpoints(config);
  return std::any_of(levels.begin(), levels.end(),
                     [&](const auto& level) { return fs::equivalent(level, root, error); });
}

// Steps, device and plug-ins as they were; a run that is done gets as many steps again.
std::string flags_again(const CheckpointInfo& info, const Options& config) {
  const auto noted = info.notes.find("command");
  const auto command = noted == info.notes.end() ? "" : noted->second;
  const auto steps = values_of(command, "--steps"), devices = values_of(command, "--device");
  auto stop = config.integer("run.steps");
  if (!steps.empty()) stop = std::strtoll(steps.back().c_str(), nullptr, 10);
  if (stop <= info.step) stop = 2 * std::max<int64_t>(info.step, 1);
  auto text = " --steps " + std::to_string(stop);
  if (!devices.empty()) text += " --device " + shell_quoted(devices.back());
  for (const auto& plugin : values_of(command, "--plugin")) {
    text += " --plugin " + shell_quoted(plugin);
  }
  return text;
}

std::string line_for(const std::string& path, const CheckpointInfo& info) {
  const auto root = root_of(*posix_file_system(), path);
  const auto run = run_of(info.path);
  if (!run.empty()) {
    const auto config = Options::read_file(run + "/config.toml");
    const auto again = flags_again(info, config);
    if (continues(run, root, config)) {
      return "./ounce train --resume auto --out " + shell_quoted(run) + again;
    }
    const auto out = free_path(run + "-from-" + std::to_string(info.step));
    return "./ounce train --resume " + shell_quoted(root) + " --out " + shell_quoted(out) + again;
  }
  const auto config = info.notes.find("config");
  OUNCE_CHECK_AS(Fault::kNotFound, config != info.notes.end(), "[ckpt] '", info.path,
                 "' holds no config of a run; start one from its weights with --init-from");
  const auto again = flags_again(info, Options::parse(config->second, info.path));
  const auto out = free_path("runs/from-" + std::to_string(info.step));
  const auto toml = free_path("from-" + std::to_string(info.step) + ".toml");
  return "./ounce ckpt show " + shell_quoted(info.path) + " --note config > " + toml +
         " && ./ounce train --config " + toml + " --resume " + shell_quoted(root) + " --out " +
         out + again;
}

void print_line(const std::string& path, bool as_json) {
  const auto files = posix_file_system();
  const auto folder = resolve_step(*files, path);
  const auto info = with_faults([&] { return info_of(read_manifest(*files, folder), folder); });
  const auto line = line_for(path, info);
  if (as_json) return print({{"command", line}, {"step", info.step}, {"path", info.path}});
  std::cout << line << "\n";
}

}  // namespace

void add_ckpt_resume(CLI::App& ckpt) {
  struct Arguments {
    std::string path;
    bool json = false;
  };
  auto arguments = std::make_shared<Arguments>();
  auto* command = ckpt.add_subcommand("resume-cmd", "print the line that goes on from here");
  command->add_option("path", arguments->path, "run folder, checkpoint folder or step folder")
      ->required();
  command->add_flag("--json", arguments->json, "print JSON");
  command->callback([=] { print_line(arguments->path, arguments->json); });
}

}  // namespace ounce::cli
