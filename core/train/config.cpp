// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/run_checkpoints.h>

#include <algorithm>

namespace ounce {

// Chosen so that two CPU cores end below the order-2 count model within six minutes.
const char* const kDefaultConfig = R"(format = 1
[model]
dim = 128
layers = 4
mixer = { name = "gla", heads = 4 }
[data]
name = "embedded"
sequence = 256
batch = 8
[optimizer]
name = "adamw"
lr = 3e-3
schedule = { name = "cosine", warmup = 50 }
[run]
steps = 1500
eval_every = 500
)";

namespace {

// The loop's own sections and keys, with their defaults. What a section holds beyond them belongs
// to the part that its `name` chooses.
constexpr const char* kLoopDefaults = R"(format = 1
[model]
name = "lm"
[data]
name = "embedded"
sequence = 1024        # tokens of a row
batch = 8              # rows of a step, of the whole job
accumulate = 1         # micro-batches a step is cut into
documents = "stream"   # stream | packed (no state or attention across documents)
[learner]
name = "gradient"
[optimizer]
name = "adamw"
schedule = { name = "cosine" }
[precision]
params = "fp32"
compute = "fp32"       # fp32 | bf16 (autocast)
[checkpoint]
every = 200            # steps; 0 = only at the end
keep_last = 3
keep_every = 0
keep_best = "val_loss" # metric whose best step is kept; "" = none
levels = [{ path = "ckpt" }]  # each is filled from the one before; every, keep_*, sync = "full" | "data" | "off" of its own
busy = "wait"          # while the save before is not durable: wait | skip | supersede
overflow = "block"     # where the pool is full: block | spill (into pageable memory)
pool_mib = 0           # host memory for copies; 0 = the state's size, at most 40 % of what is free
direct = true          # write past the page cache where the file system can
gpu_clone = true       # clone on the GPU what a short step leaves no time to copy
[run]
steps = 1000           # horizon of the schedule
eval_every = 100       # steps; 0 = only at the end
eval_batches = 16      # evenly spread over the validation split; 0 = all of it
final_eval_batches = 0
log_every = 10
sample_every = 0       # steps; 0 = only at the end
sample_tokens = 300
sample_prompt = ""
sample_temperature = 0.8
sample_top_k = 0
seed = 1
deterministic = true
plan = true            # measure a memory plan before the first step
)";

struct Section {
  const char* name;
  const char* kind;                    // of the part it chooses; null = none
  std::vector<std::string> loop_keys;  // keys that are not the part's
};

const std::vector<Section>& sections() {
  static const std::vector<Section> all = {
      {"model", "model", {}},
      {"data", "dataset", {"sequence", "batch", "accumulate", "documents"}},
      {"learner", "learner", {}},
      {"optimizer", "optimizer", {"schedule"}},
      {"precision", nullptr, {}},
      {"checkpoint", nullptr, {}},
      {"run", nullptr, {}}};
  return all;
}

bool is_loop_key(const Section& section, const std::string& key) {
  const auto& keys = section.loop_keys;
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

// Splits a section into the loop's keys and the part's, completes both, and joins them again.
Options complete_section(const Section& section, const Options& given, const Options& defaults) {
  if (section.kind == nullptr) return given.over(defaults, section.name);
  Options loop, part, loop_defaults;
  for (const auto& [key, value] : given.items()) {
    (is_loop_key(section, key) ? loop : part).set(key, value);
  }
  for (const auto& [key, value] : defaults.items()) {
    if (is_loop_key(section, key)) loop_defaults.set(key, value);
  }
  if (!part.contains("name")) part.set("name", *defaults.find("name"));
  // Both halves are known here alone: each would take the other's misspelt keys for its own.
  if (part.find("name")->is_text()) {
    auto known = section.loop_keys;
    const auto schema = registry_store(section.kind).resolve(*part.find("name"), section.name);
    for (const auto& item : schema.table().items()) known.push_back(item.first);
    for (const auto& item : part.items()) {
      OUNCE_CHECK(std::find(known.begin(), known.end(), item.first) != known.end(),
                  "[config] unknown key '", item.first, "' in ", section.name,
                  nearest_hint(item.first, known));
    }
  }
  Options result = registry_store(section.kind).resolve(part, section.name).table();
  const auto completed = loop.over(loop_defaults, section.name);
  for (const auto& [key, value] : completed.items()) {
    result.set(key, key == "schedule"
                        ? registry_store("schedule").resolve(value, "optimizer.schedule")
                        : value);
  }
  return result;
}

void collect_changes(const Options& a, const Options& b, const std::string& prefix,
                     std::vector<std::string>& changes) {
  for (const auto& [key, value] : a.items()) {
    const auto* other = b.find(key);
    const auto path = prefix + key;
    if (other != nullptr && *other == value) continue;
    if (other != nullptr && value.is_table() && other->is_table()) {
      collect_changes(value.table(), other->table(), path + ".", changes);
    } else {
      changes.push_back(path + ": " + value.to_toml() + " -> " +
                        (other == nullptr ? "nothing" : other->to_toml()));
    }
  }
  for (const auto& [key, value] : b.items()) {
    if (!a.contains(key)) changes.push_back(prefix + key + ": nothing -> " + value.to_toml());
  }
}

// Changes that leave the run's numbers alone.
bool may_change(const std::string& change) {
  static const std::vector<std::string> prefixes = {
      "checkpoint.", "run.eval_", "run.final_eval_batches", "run.log_every",
      "run.sample_", "run.plan",  "model.recompute"};
  return std::any_of(prefixes.begin(), prefixes.end(),
                     [&](const std::string& prefix) { return change.starts_with(prefix); });
}

}  // namespace

Options complete_config(const Options& given, const std::string& source) {
  const auto defaults = Options::parse(kLoopDefaults, "defaults");
  std::vector<std::string> known;
  for (const auto& item : defaults.items()) known.push_back(item.first);
  for (const auto& [key, value] : given.items()) {
    OUNCE_CHECK(defaults.contains(key), "[config] ", source, ": unknown section or key '", key, "'",
                nearest_hint(key, known));
    OUNCE_CHECK(key == "format" || value.is_table(), "[config] ", source, ": '", key,
                "' is a section, write [", key, "]");
  }
  OUNCE_CHECK(given.contains("format"), "[config] ", source,
              ": 'format' is missing; write format = 1 at the top");
  const auto format = given.integer("format");
  OUNCE_CHECK_AS(Fault::kNewerFormat, format <= 1, "[config] ", source, ": format ", format,
                 " is newer than this program's 1");
  OUNCE_CHECK(format == 1, "[config] ", source, ": format ", format, " never was; write 1");
  Options result;
  result.set("format", 1);
  for (const auto& section : sections()) {
    const auto* own = given.find(section.name);
    result.set(section.name, complete_section(section, own == nullptr ? Options() : own->table(),
                                              defaults.table(section.name)));
  }
  const auto batch = result.positive("data.batch"), parts = result.positive("data.accumulate");
  OUNCE_CHECK(batch % parts == 0, "[config] data.batch ", batch,
              " is not a multiple of data.accumulate ", parts);
  result.positive("data.sequence");
  result.choice("data.documents", {"stream", "packed"});
  result.choice("precision.params", {"fp32", "bf16"});
  result.choice("precision.compute", {"fp32", "bf16"});
  checkpoint_levels(result, "");
  for (const char* key :
       {"run.eval_every", "run.eval_batches", "run.final_eval_batches", "run.sample_every",
        "run.sample_tokens", "run.sample_top_k", "checkpoint.every", "checkpoint.keep_last",
        "checkpoint.keep_every", "checkpoint.pool_mib"}) {
    result.non_negative(key);
  }
  result.positive("run.steps");
  result.positive("run.log_every");
  result.number_in("run.sample_temperature", 0, 1e6);
  result.choice("checkpoint.keep_best", {"", "val_loss"});
  result.choice("checkpoint.busy", {"wait", "skip", "supersede"});
  result.choice("checkpoint.overflow", {"block", "spill"});
  result.flag("checkpoint.direct");
  result.flag("checkpoint.gpu_clone");
  return result;
}

Options read_config(const std::string& path, const std::vector<std::string>& overrides) {
  auto given =
      path.empty() ? Options::parse(kDefaultConfig, "default config") : Options::read_file(path);
  for (const auto& entry : overrides) {
    const auto equals = entry.find('=');
    OUNCE_CHECK(equals != std::string::npos && equals > 0, "[config] --set ", entry,
                ": expected key=value");
    given.set(entry.substr(0, equals), Options::parse_value(entry.substr(equals + 1)));
  }
  return complete_config(given, path.empty() ? "default config" : path);
}

Value part_spec(const Options& config, const std::string& section) {
  const auto& table = config.table(section);
  for (const auto& candidate : sections()) {
    if (section != candidate.name) continue;
    Options part;
    for (const auto& [key, value] : table.items()) {
      if (!is_loop_key(candidate, key)) part.set(key, value);
    }
    return part;
  }
  fail(Fault::kUsage, "[config] no section '", section, "'");
}

std::vector<std::string> forbidden_changes(const Options& old_config, const Options& new_config) {
  std::vector<std::string> changes;
  collect_changes(old_config, new_config, "", changes);
  std::erase_if(changes, may_change);
  return changes;
}

}  // namespace ounce
