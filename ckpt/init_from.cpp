// SPDX-License-Identifier: MIT
#include <ounce/ckpt/init_from.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/safetensors.h>
#include <torch/torch.h>

#include <filesystem>
#include <map>
#include <set>

namespace ounce::ckpt {
namespace {

using Weights = std::map<std::string, at::Tensor>;
using NameMap = std::vector<std::pair<std::string, std::string>>;

NameMap parse_name_map(const std::vector<std::string>& rules) {
  NameMap map;
  for (const auto& rule : rules) {
    const auto equals = rule.find('=');
    OUNCE_CHECK(equals != std::string::npos && rule.find('=', equals + 1) == std::string::npos,
                "[init-from] expected a name rule \"from=to\", got \"", rule, "\"");
    map.emplace_back(rule.substr(0, equals), rule.substr(equals + 1));
  }
  return map;
}

std::string mapped(const std::string& name, const NameMap& map) {
  for (const auto& [from, to] : map) {
    if (name.starts_with(from)) return to + name.substr(from.size());
  }
  return name;
}

void add(Weights& weights, const std::string& stored, const NameMap& map, at::Tensor value) {
  const auto name = mapped(stored, map);
  OUNCE_CHECK(weights.emplace(name, std::move(value)).second, "[init-from] two stored tensors, '",
              stored, "' one of them, are both called '", name, "' after the name map; change it");
}

bool is_no_folder(FileSystem& files, const std::string& path) {
  FileInfo info;
  return files.stat(path, info) == 0 && info.kind != FileKind::kDirectory;
}

// Sets source and rejected of the report.
Weights read_weights(const std::vector<std::string>& paths, const NameMap& map,
                     const std::string& prefix, WeightsReport& report) {
  const auto& path = paths.at(0);
  const auto files = posix_file_system();
  Weights weights;
  report.source = path;
  if (is_no_folder(*files, path)) {
    // A link is what model caches are made of; the readers themselves follow none.
    std::error_code error;
    const auto resolved = std::filesystem::canonical(path, error).string();
    if (error) throw_io("open", path, error.value());
    const SafetensorsReader reader(files, resolved);
    for (const auto& tensor : reader.tensors()) {
      auto value = at::empty(tensor.shape, at::dtype(dtype_of_name(tensor.dtype)));
      reader.read(tensor, value.data_ptr());
      add(weights, tensor.name, map, std::move(value));
    }
    return weights;
  }
  auto read =
      read_step(files, paths, std::nullopt, /*direct=*/false, [&](const StepReader& reader) {
        weights.clear();
        for (const auto& tensor : reader.manifest().tensors) {
          if (!tensor.name.starts_with(prefix)) continue;
          add(weights, tensor.name.substr(prefix.size()), map, read_tensor(reader, tensor));
        }
      });
  report.source = read.info.path;
  report.rejected = std::move(read.rejected);
  OUNCE_CHECK(!weights.empty(), "[init-from] no tensor under '", prefix, "' in '", report.source,
              "'");
  return weights;
}

// Why `stored` cannot fill `wanted`; "" when it can.
std::string mismatch(const at::Tensor& wanted, const at::Tensor& stored) {
  const bool converts = wanted.is_floating_point() && stored.is_floating_point();
  if (wanted.sizes() == stored.sizes() && (converts || wanted.dtype() == stored.dtype())) return "";
  return c10::str(" (expected ", dtype_name(wanted.scalar_type()), wanted.sizes(), ", got ",
                  dtype_name(stored.scalar_type()), stored.sizes(), ")");
}

struct Target {
  std::vector<std::string> names;
  at::Tensor tensor;
};

std::vector<Target> targets_of(torch::nn::Module& module) {
  std::vector<Target> targets;
  std::map<const void*, size_t> seen;
  const auto present = [&](const auto& items) {
    for (const auto& item : items) {
      const auto [found, is_new] = seen.emplace(item.value().unsafeGetTensorImpl(), targets.size());
      if (is_new) targets.push_back({{}, item.value()});
      targets[found->second].names.push_back(item.key());
    }
  };
  present(module.named_parameters());
  present(module.named_buffers());
  return targets;
}

void append(std::string& text, const char* what, const std::vector<std::string>& names) {
  if (names.empty()) return;
  text += c10::str("; ", names.size(), " ", what, ": ", c10::Join(", ", names));
}

}  // namespace

std::string WeightsReport::summary() const {
  auto text = c10::str(loaded.size(), " loaded");
  append(text, "missing", missing);
  append(text, "unexpected", unexpected);
  append(text, "of another shape or type", mismatched);
  return text;
}

WeightsReport load_weights(const std::string& path, torch::nn::Module& module,
                           const std::vector<std::string>& name_rules, bool strict,
                           const std::string& prefix) {
  return load_weights(std::vector{path}, module, name_rules, strict, prefix);
}

WeightsReport load_weights(const std::vector<std::string>& roots, torch::nn::Module& module,
                           const std::vector<std::string>& name_rules, bool strict,
                           const std::string& prefix) {
  return with_faults([&] {
    const torch::NoGradGuard guard;
    WeightsReport report;
    const auto weights = read_weights(roots, parse_name_map(name_rules), prefix, report);
    auto targets = targets_of(module);
    std::set<std::string> known;
    std::vector<std::pair<at::Tensor, at::Tensor>> copies;
    for (auto& [names, tensor] : targets) {
      const at::Tensor* stored = nullptr;
      for (const auto& name : names) {
        known.insert(name);
        const auto found = weights.find(name);
        if (stored == nullptr && found != weights.end()) stored = &found->second;
      }
      const auto problem = stored == nullptr ? "" : mismatch(tensor, *stored);
      if (stored == nullptr) {
        report.missing.push_back(names.front());
      } else if (!problem.empty()) {
        report.mismatched.push_back(names.front() + problem);
      } else {
        report.loaded.push_back(names.front());
        copies.emplace_back(tensor, *stored);
      }
    }
    for (const auto& [name, value] : weights) {
      if (!known.contains(name)) report.unexpected.push_back(name);
    }
    OUNCE_CHECK(report.good() || !strict, "[init-from] the weights of '", report.source,
                "' are not those of this model: ", report.summary(),
                "; give a name map or another file; nothing was loaded");
    for (auto& [target, value] : copies) target.copy_(value);
    return report;
  });
}

}  // namespace ounce::ckpt
