// SPDX-License-Identifier: MIT
#include <ounce/ckpt/names.h>
#include <ounce/core/check.h>
#include <ounce/core/train/run_checkpoints.h>

#include <algorithm>
#include <filesystem>

namespace ounce {

namespace {

ckpt::Level level_of(const Options& section, const Options& given, const std::string& folder) {
  Options defaults;
  for (const char* key : {"every", "keep_last", "keep_every", "keep_best"}) {
    defaults.set(key, *section.find(key));
  }
  defaults.set("path", "");
  defaults.set("sync", "full");
  const auto options = given.over(defaults, "checkpoint.levels");
  const std::filesystem::path path = options.text("path");
  OUNCE_CHECK(!path.empty(),
              "[config] checkpoint.levels: a level needs a path, as in { path = ", "\"ckpt\" }");
  for (const char* key : {"every", "keep_last", "keep_every"}) options.non_negative(key);
  options.choice("keep_best", {"", "val_loss"});
  const auto sync = options.choice("sync", {"full", "data", "off"});
  ckpt::Level level;
  level.path = path.is_absolute() ? path.string() : (std::filesystem::path(folder) / path).string();
  // 0 = only the last save, which goes to every level.
  level.every = options.integer("every") > 0 ? options.integer("every") : ckpt::kMostStep;
  level.keep_last = options.integer("keep_last");
  level.keep_every = options.integer("keep_every");
  level.keep_best = options.text("keep_best");
  level.sync = sync == "full"   ? ckpt::SyncPolicy::kFull
               : sync == "data" ? ckpt::SyncPolicy::kData
                                : ckpt::SyncPolicy::kOff;
  return level;
}

ckpt::CheckpointerOptions options_of(const Options& config, std::vector<ckpt::Level> levels) {
  const auto& section = config.table("checkpoint");
  const auto busy = section.text("busy");
  ckpt::CheckpointerOptions options;
  options.levels = std::move(levels);
  options.busy = busy == "wait"   ? ckpt::Busy::kWait
                 : busy == "skip" ? ckpt::Busy::kSkip
                                  : ckpt::Busy::kSupersede;
  options.overflow =
      section.text("overflow") == "spill" ? ckpt::Overflow::kSpill : ckpt::Overflow::kBlock;
  options.pool_bytes = section.integer("pool_mib") << 20;
  options.direct = section.flag("direct");
  if (!section.flag("gpu_clone")) options.spare_gpu_bytes = -1;
  return options;
}

}  // namespace

std::vector<ckpt::Level> checkpoint_levels(const Options& config, const std::string& folder) {
  const auto& section = config.table("checkpoint");
  const auto& list = section.find("levels")->array();
  OUNCE_CHECK(!list.empty(), "[config] checkpoint.levels: expected at least one level, got none");
  std::vector<ckpt::Level> levels;
  for (const auto& item : list) {
    OUNCE_CHECK(item.is_table(),
                "[config] checkpoint.levels: expected tables such as { path = ", "\"ckpt\" }, got ",
                item.to_toml());
    levels.push_back(level_of(section, item.table(), folder));
  }
  return levels;
}

RunCheckpoints::RunCheckpoints(const Options& config, const std::string& folder)
    : levels_(checkpoint_levels(config, folder)), checkpointer_(options_of(config, levels_)) {}

bool RunCheckpoints::due(int64_t step) const {
  return std::any_of(levels_.begin(), levels_.end(),
                     [&](const auto& level) { return step % level.every == 0; });
}

void RunCheckpoints::save(int64_t step, const ckpt::Objects& objects,
                          const ckpt::SaveOptions& options) {
  tickets_.push_back(checkpointer_.save(step, objects, options));
}

std::function<void(at::TensorList)> RunCheckpoints::gate() {
  return [this](at::TensorList bucket) { checkpointer_.before_mutation(bucket); };
}

std::vector<RunCheckpoints::News> RunCheckpoints::poll() {
  std::vector<News> news;
  while (!tickets_.empty() && tickets_.front().finished()) {
    const auto ticket = tickets_.front();
    tickets_.pop_front();
    News item{.step = ticket.step()};
    try {
      item.report = ticket.wait();
      durable_ = item.step;
      handed_.emplace_back(ticket, 0);
    } catch (const Error& error) {
      item.error = error.what_without_backtrace();
      item.fault = error.fault();
    }
    news.push_back(std::move(item));
  }
  return news;
}

std::vector<RunCheckpoints::News> RunCheckpoints::wait() {
  for (const auto& ticket : tickets_) ticket.wait(std::chrono::duration<double>(1e10));
  return poll();
}

std::vector<std::string> RunCheckpoints::warnings() {
  constexpr size_t kMostHanded = 16;  // saves whose further levels may still have something to say
  std::vector<std::string> fresh;
  for (auto& [ticket, told] : handed_) {
    const auto all = ticket.wait().warnings;
    fresh.insert(fresh.end(), all.begin() + static_cast<int64_t>(told), all.end());
    told = all.size();
  }
  while (handed_.size() > kMostHanded) handed_.pop_front();
  return fresh;
}

std::optional<std::pair<int64_t, double>> RunCheckpoints::in_flight() const {
  if (tickets_.empty()) return std::nullopt;
  return std::pair(tickets_.back().step(), tickets_.back().progress());
}

bool RunCheckpoints::has(int64_t step) const {
  return durable_ == step || (!tickets_.empty() && tickets_.back().step() == step);
}

}  // namespace ounce
