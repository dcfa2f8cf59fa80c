// SPDX-License-Identifier: MIT
#include <errno.h>
#include <ounce/ckpt/retention.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ounce::ckpt {

std::vector<std::string> steps_to_remove(FileSystem& files, const std::vector<StepEntry>& steps,
                                         const RetentionRule& rule) {
  if (rule.keep_last <= 0) return {};
  // A NaN is never best; of equal values the newest is.
  std::vector<std::pair<double, const StepEntry*>> ranked;
  for (const auto& entry : steps) {
    const auto found = entry.manifest.metrics.find(rule.keep_best);
    if (rule.keep_best.empty() || found == entry.manifest.metrics.end()) continue;
    const auto value = rule.best_is_highest ? -found->second : found->second;
    if (!std::isnan(value)) ranked.emplace_back(value, &entry);
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  ranked.resize(std::min(ranked.size(), static_cast<size_t>(rule.best_count)));
  const auto is_best = [&](const StepEntry& entry) {
    return std::any_of(ranked.begin(), ranked.end(),
                       [&](const auto& item) { return item.second == &entry; });
  };
  std::vector<std::string> victims;
  for (size_t i = rule.keep_last; i < steps.size(); ++i) {
    const auto& entry = steps[i];
    if (rule.keep_every > 0 && entry.manifest.step % rule.keep_every == 0) continue;
    FileInfo info;
    // Unsure counts as pinned.
    if (is_best(entry) || files.stat(entry.path + "/" + kPinName, info) != ENOENT) continue;
    victims.push_back(entry.path);
  }
  return victims;
}

namespace {

void warn(const std::string& path, int error, std::vector<std::string>& warnings) {
  warnings.push_back("[checkpoint] cannot remove '" + path + "': " + std::strerror(error));
}

}  // namespace

std::vector<std::string> hide_steps(FileSystem& files, const std::string& root,
                                    const std::vector<std::string>& paths,
                                    std::vector<std::string>& warnings) {
  std::vector<std::string> hidden;
  for (const auto& path : paths) {
    auto trash =
        root + "/" + kTrashPrefix + path.substr(path.find_last_of('/') + 1) + "-" + random_id();
    if (const int error = files.rename(path, trash); error != 0) {
      warn(path, error, warnings);
    } else {
      hidden.push_back(std::move(trash));
    }
  }
  if (hidden.empty()) return {};
  // Half removed, a step must not come back under its name.
  if (const int error = files.sync_directory(root); error != 0) {
    warn(root, error, warnings);
    return {};
  }
  return hidden;
}

std::vector<std::string> remove_hidden(FileSystem& files, const std::vector<std::string>& hidden) {
  std::vector<std::string> warnings;
  for (const auto& path : hidden) {
    if (const int error = remove_tree(files, path); error != 0) warn(path, error, warnings);
  }
  return warnings;
}

std::vector<std::string> remove_steps(FileSystem& files, const std::string& root,
                                      const std::vector<std::string>& paths) {
  std::vector<std::string> warnings;
  const auto hidden = hide_steps(files, root, paths, warnings);
  for (auto& warning : remove_hidden(files, hidden)) warnings.push_back(std::move(warning));
  return warnings;
}

}  // namespace ounce::ckpt
