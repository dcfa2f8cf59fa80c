// SPDX-License-Identifier: MIT
// `ounce ckpt gc|pin|unpin`: which steps stay. Exit code 1 when gc could not remove something.
#include <errno.h>
#include <ounce/ckpt/commit.h>
#include <ounce/ckpt/lock.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/retention.h>
#include <ounce/ckpt/scan.h>
#include <ounce/core/train/format.h>

#include <iostream>

#include "ckpt_commands.h"

namespace ounce::cli {
namespace {

using namespace ounce::ckpt;

struct Removal {
  std::string path;
  int64_t bytes = 0;
};

struct Collected {
  std::string root;
  std::vector<Removal> leftovers, steps;
  std::vector<int64_t> kept;
  std::vector<std::string> left_alone;  // damaged steps: what is in them nobody can say
  std::vector<std::string> warnings;

  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto* list : {&leftovers, &steps}) {
      for (const auto& removal : *list) sum += removal.bytes;
    }
    return sum;
  }
};

std::string existing_root(FileSystem& files, const std::string& path) {
  auto root = root_of(files, path);
  FileInfo info;
  OUNCE_CHECK_AS(Fault::kNotFound, files.stat(root, info) == 0, "[ckpt] no checkpoint in '", path,
                 "'");
  return root;
}

Removal removal_of(FileSystem& files, const std::string& path) {
  Removal removal{path};
  std::vector<std::string> names;
  FileInfo info;
  files.list(path, names);
  for (const auto& name : names) {
    if (files.stat(path + "/" + name, info) == 0) removal.bytes += info.size;
  }
  return removal;
}

// What sweep() would remove.
std::vector<Removal> leftovers_in(FileSystem& files, const std::string& root) {
  std::vector<std::string> names;
  if (const int error = files.list(root, names); error != 0) throw_io("list", root, error);
  std::vector<Removal> found;
  for (const auto& name : names) {
    const auto step = parse_replaced_name(name);
    FileInfo info;
    const bool replaced = step >= 0 && files.stat(root + "/" + step_name(step), info) == 0;
    if (replaced || name.starts_with(std::string(kTemporaryPrefix) + "step_") ||
        name.starts_with(std::string(kTrashPrefix) + "step_")) {
      found.push_back(removal_of(files, root + "/" + name));
    }
  }
  return found;
}

// A later version's step may be the newest, and nothing may be judged behind its back.
Scan scan_known(FileSystem& files, const std::string& root) {
  auto scan = scan_root(files, root);
  for (const auto& bad : scan.bad) {
    if (bad.newer_format) fail(Fault::kNewerFormat, bad.problem);
  }
  return scan;
}

Collected collect(const std::shared_ptr<FileSystem>& files, const std::string& root,
                  const RetentionRule& rule, bool dry_run) {
  Collected result{.root = root};
  const auto before = scan_known(*files, root);
  result.leftovers = leftovers_in(*files, root);
  if (before.steps.empty() && before.bad.empty() && result.leftovers.empty()) {
    fail(Fault::kNotFound, "[ckpt] no checkpoint in '", root, "'");
  }
  const RootLock lock(root);
  result.leftovers = leftovers_in(*files, root);
  if (!dry_run) result.warnings = sweep(*files, root);
  auto scan = scan_known(*files, root);
  for (const auto& bad : scan.bad) result.left_alone.push_back(bad.problem);
  // Only a step that can be read counts as one of those that are kept.
  std::erase_if(scan.steps, [&](const StepEntry& entry) {
    try {
      const StepReader opened(files, entry.path, entry.manifest);
      return false;
    } catch (const StorageError& error) {
      result.left_alone.push_back(error.what());
      return true;
    }
  });
  const auto victims = steps_to_remove(*files, scan.steps, rule);
  for (const auto& path : victims) result.steps.push_back(removal_of(*files, path));
  for (const auto& entry : scan.steps) {
    if (std::find(victims.begin(), victims.end(), entry.path) == victims.end()) {
      result.kept.push_back(entry.manifest.step);
    }
  }
  if (!dry_run) {
    const auto warnings = remove_steps(*files, root, victims);
    result.warnings.insert(result.warnings.end(), warnings.begin(), warnings.end());
  }
  return result;
}

void show(const Collected& result, bool dry_run) {
  for (const auto* list : {&result.leftovers, &result.steps}) {
    for (const auto& removal : *list) {
      std::cout << (dry_run ? "would remove " : "removed ") << removal.path << "  "
                << format_bytes(removal.bytes) << "\n";
    }
  }
  for (const auto& problem : result.left_alone) std::cout << "left alone: " << problem << "\n";
  for (const auto& warning : result.warnings) std::cout << "WARNING: " << warning << "\n";
  std::cout << result.root << ": " << result.kept.size() << " steps kept, " << result.steps.size()
            << (dry_run ? " would be removed, " : " removed, ") << format_bytes(result.bytes())
            << (dry_run ? " would be freed\n" : " freed\n");
}

Json json_of(const Collected& result) {
  const auto list_of = [](const std::vector<Removal>& removals) {
    auto list = Json::array();
    for (const auto& item : removals) list.push_back({{"path", item.path}, {"bytes", item.bytes}});
    return list;
  };
  return {{"root", result.root},
          {"removed", list_of(result.steps)},
          {"leftovers", list_of(result.leftovers)},
          {"kept", result.kept},
          {"left_alone", result.left_alone},
          {"warnings", result.warnings},
          {"bytes", result.bytes()}};
}

struct GcFlags {
  std::vector<std::string> roots;
  RetentionRule rule{.keep_last = 0};
  bool dry_run = false, json = false;
};

int collect_all(const GcFlags& flags) {
  const auto files = posix_file_system();
  auto all = Json::array();
  bool clean = true;
  for (const auto& path : flags.roots) {
    const auto result = with_faults(
        [&] { return collect(files, existing_root(*files, path), flags.rule, flags.dry_run); });
    clean = clean && result.warnings.empty();
    flags.json ? all.push_back(json_of(result)) : show(result, flags.dry_run);
  }
  if (flags.json) print({{"dry_run", flags.dry_run}, {"roots", all}});
  return clean ? 0 : 1;
}

struct PinFlags {
  std::vector<std::string> paths;
  std::optional<int64_t> step;
  bool json = false;
};

std::string step_folder(FileSystem& files, const std::string& path, std::optional<int64_t> step) {
  const auto folder = existing_root(files, path);
  OUNCE_CHECK(step || is_step_folder(files, folder), "[ckpt] expected a step folder, got '", path,
              "'; name one of its steps, or say which with --step");
  return step ? resolve_step(files, folder, step) : folder;
}

void set_pins(const PinFlags& flags, bool pinned) {
  const auto files = posix_file_system();
  std::vector<std::string> folders;  // all are found before the first is changed
  for (const auto& path : flags.paths) folders.push_back(step_folder(*files, path, flags.step));
  with_faults([&] {
    for (const auto& folder : folders) {
      const auto pin = folder + "/" + kPinName;
      if (pinned) {
        write_file_durably(*files, folder, kPinName, "");
        continue;
      }
      int error = files->unlink(pin);
      if (error != 0 && error != ENOENT) throw_io("remove", pin, error);
      if (error == 0) error = files->sync_directory(folder);
      if (error != 0 && error != ENOENT) throw_io("sync", folder, error);
    }
  });
  if (flags.json) return print({{"pinned", pinned}, {"steps", folders}});
  for (const auto& folder : folders)
    std::cout << (pinned ? "pinned " : "unpinned ") << folder << "\n";
}

void add_pin(CLI::App& ckpt, const char* name, const char* what, bool pinned) {
  auto flags = std::make_shared<PinFlags>();
  auto* command = ckpt.add_subcommand(name, what);
  command->add_option("path", flags->paths, "step folders; or, with --step, folders of steps")
      ->required()
      ->expected(1, 1 << 20);
  command->add_option("--step", flags->step, "this step of a folder");
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([=] { set_pins(*flags, pinned); });
}

}  // namespace

void add_ckpt_keep(CLI::App& ckpt, int& exit_code) {
  auto flags = std::make_shared<GcFlags>();
  auto* command = ckpt.add_subcommand("gc", "remove what killed writers left, and old steps");
  command->add_option("path", flags->roots, "run folder or checkpoint folder")
      ->required()
      ->expected(1, 1 << 20);
  auto* last = command
                   ->add_option("--keep-last", flags->rule.keep_last,
                                "remove all but so many of the newest; without it none is removed")
                   ->check(CLI::PositiveNumber);
  command->add_option("--keep-every", flags->rule.keep_every, "and all but those divisible by this")
      ->check(CLI::PositiveNumber)
      ->needs(last);
  command->add_option("--keep-best", flags->rule.keep_best, "and all but the lowest of this metric")
      ->needs(last);
  command->add_flag("--dry-run", flags->dry_run, "say what would go; remove nothing");
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([=, &exit_code] { exit_code = collect_all(*flags); });
  add_pin(ckpt, "pin", "keep a step whatever else goes", true);
  add_pin(ckpt, "unpin", "let a step go when its turn comes", false);
}

}  // namespace ounce::cli
