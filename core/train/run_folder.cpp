// SPDX-License-Identifier: MIT
#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/restore.h>
#include <ounce/core/check.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/run_checkpoints.h>
#include <ounce/core/train/run_folder.h>

#include <charconv>
#include <filesystem>

namespace ounce {

namespace fs = std::filesystem;

namespace {

constexpr const char* kRuns = "runs";

// n of "<name>-<n>", or -1.
int64_t run_number(const std::string& folder, const std::string& name) {
  if (!folder.starts_with(name + "-")) return -1;
  const auto digits = folder.substr(name.size() + 1);
  int64_t number = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  return error == std::errc() && end == digits.data() + digits.size() ? number : -1;
}

int64_t last_run(const std::string& name) {
  int64_t last = 0;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(kRuns, error)) {
    last = std::max(last, run_number(entry.path().filename().string(), name));
  }
  return last;
}

void make_folder(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  OUNCE_CHECK_AS(Fault::kData, !error, "[run] cannot make the folder '", path.string(),
                 "': ", error.message());
}

}  // namespace

void RunFolder::check_free(const std::string& path) {
  if (path.empty() || !fs::exists(path)) return;
  OUNCE_CHECK(fs::is_directory(path), "[run] --out '", path, "' is a file");
  OUNCE_CHECK(!fs::exists(fs::path(path) / "config.toml"), "[run] '", path,
              "' holds another run; add --resume auto to go on with it, or choose another --out");
  OUNCE_CHECK(fs::is_empty(path), "[run] '", path,
              "' is not empty and not a run; choose another --out");
}

RunFolder RunFolder::create(const std::string& path, const std::string& name,
                            const Options& config) {
  auto chosen = path;
  if (chosen.empty()) {
    make_folder(kRuns);
    auto number = last_run(name);
    std::error_code error;
    do {
      chosen = std::string(kRuns) + "/" + name + "-" + std::to_string(++number);
    } while (!fs::create_directory(chosen, error) && !error);
    OUNCE_CHECK_AS(Fault::kData, !error, "[run] cannot make '", chosen, "': ", error.message());
  } else {
    check_free(chosen);
    make_folder(chosen);
  }
  RunFolder folder(chosen);
  folder.write_config(config);
  return folder;
}

RunFolder RunFolder::open(const std::string& path) {
  OUNCE_CHECK_AS(Fault::kNotFound, fs::exists(fs::path(path) / "config.toml"), "[run] '", path,
                 "' is not a run folder: it has no config.toml");
  return RunFolder(path);
}

RunFolder RunFolder::newest(const std::string& name) {
  const auto number = last_run(name);
  OUNCE_CHECK_AS(Fault::kNotFound, number > 0, "[run] there is no ", kRuns, "/", name,
                 "-<n> to resume; start one without --resume");
  return open(std::string(kRuns) + "/" + name + "-" + std::to_string(number));
}

Options RunFolder::config() const { return read_config(file("config.toml"), {}); }

void RunFolder::write_config(const Options& config) const {
  const auto files = ckpt::posix_file_system();
  ckpt::with_faults(
      [&] { ckpt::write_file_durably(*files, path_, "config.toml", config.to_toml()); });
  // The entries of the run and of the folder of runs; another's folder, which cannot be synced, is
  // left alone.
  const auto parent = fs::absolute(path_).parent_path();
  for (const auto& folder : {parent, parent.parent_path()}) files->sync_directory(folder.string());
}

std::vector<std::string> RunFolder::checkpoints(const Options& config) const {
  std::vector<std::string> paths;
  for (const auto& level : checkpoint_levels(config, path_)) paths.push_back(level.path);
  return paths;
}

}  // namespace ounce
