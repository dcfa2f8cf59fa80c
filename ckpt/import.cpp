// SPDX-License-Identifier: MIT
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/import.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/safetensors.h>
#include <ounce/ckpt/scan.h>
#include <torch/torch.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

namespace ounce::ckpt {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int64_t kMostIndexBytes = int64_t{256} << 20;

struct Tensors : Stateful {
  std::vector<std::pair<std::string, at::Tensor>> items;
  std::optional<std::string> prefix;  // what belongs before the names; none = not known

  void visit_state(StateVisitor& visitor) override {
    for (auto& [name, value] : items) visitor.tensor(name, value, StateClass::kStep);
  }
};

std::string resolved(const std::string& path) {
  std::error_code error;
  auto result = fs::canonical(path, error).string();
  if (error) throw_io("open", path, error.value());
  return result;
}

[[noreturn]] void damaged(const std::string& path, const std::string& message) {
  throw StorageError(StorageError::Kind::kDamaged,
                     one_line("[import] '" + path + "': " + message + "; get the file again"));
}

at::Tensor empty_of(const TensorRecord& tensor) {
  return at::empty(tensor.shape, at::dtype(dtype_of_name(tensor.dtype)));
}

void read_safetensors(const std::shared_ptr<FileSystem>& files, const std::string& path,
                      Tensors& into) {
  const SafetensorsReader reader(files, resolved(path));
  for (const auto& tensor : reader.tensors()) {
    into.items.emplace_back(tensor.name, empty_of(tensor));
    reader.read(tensor, into.items.back().second.data_ptr());
  }
  const auto prefix = reader.metadata().find("prefix");
  if (prefix != reader.metadata().end()) into.prefix = prefix->second;
}

// File and names of each shard that an index lists.
std::map<std::string, std::set<std::string>> shards_of(FileSystem& files, const std::string& path) {
  const auto text = read_file(files, resolved(path), kMostIndexBytes);
  const auto json = nesting_of(text) <= 8 ? Json::parse(text, nullptr, false) : Json();
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
    damaged(path, "no index of shards: it has no 'weight_map'");
  }
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [name, file] : json["weight_map"].items()) {
    const auto shard = file.is_string() ? file.get<std::string>() : "";
    if (!shard.ends_with(".safetensors") || shard.find('/') != std::string::npos ||
        shard.find('\0') != std::string::npos) {
      damaged(path, "'" + name.substr(0, 80) + "' is in no file beside it");
    }
    shards[shard].insert(name);
  }
  return shards;
}

void read_index(const std::shared_ptr<FileSystem>& files, const std::string& path, Tensors& into) {
  const auto folder = fs::path(path).parent_path();  // of the link, where the shards' links are
  for (const auto& [shard, listed] : shards_of(*files, path)) {
    const auto before = into.items.size();
    read_safetensors(files, (folder / shard).string(), into);
    std::set<std::string> found;
    for (size_t i = before; i < into.items.size(); ++i) found.insert(into.items[i].first);
    if (found != listed) damaged(path, "the tensors of '" + shard + "' are not those it lists");
  }
}

void read_hdf5(FileSystem& files, const std::string& path, Tensors& into) {
  const auto real = resolved(path);
  const auto contents = list_datasets(files, real);
  const auto open = open_file(files, real, FileSystem::Mode::kRead);
  std::map<std::string, at::Tensor> held;
  for (const auto& tensor : contents.tensors) {
    auto& value = held[tensor.tied_to.empty() ? tensor.name : tensor.tied_to];
    if (!value.defined()) {
      value = empty_of(tensor);
      const int error =
          read_all(files, open.descriptor(), value.data_ptr(), tensor.bytes, tensor.offset);
      if (error != 0) throw_io("read '" + tensor.name + "' of", path, error);
    }
    into.items.emplace_back(tensor.name, value);
  }
  if (contents.of_step) into.prefix = "";
}

Tensors read_tensors(const std::shared_ptr<FileSystem>& files, const std::string& path) {
  Tensors tensors;
  if (path.ends_with(".safetensors")) {
    read_safetensors(files, path, tensors);
  } else if (path.ends_with(".json")) {
    read_index(files, path, tensors);
  } else {
    OUNCE_CHECK(path.ends_with(".h5") || path.ends_with(".hdf5"),
                "[import] expected a file *.safetensors, *.json (the index of shards), *.h5 or "
                "*.hdf5, got '",
                path, "'");
    read_hdf5(*files, path, tensors);
  }
  OUNCE_CHECK_AS(Fault::kNotFound, !tensors.items.empty(), "[import] no tensor in '", path, "'");
  return tensors;
}

// Before anything is read: a folder where the step would hide others, and a step that is there.
std::string checked_root(FileSystem& files, const std::string& path, int64_t step, bool replace) {
  auto root = path;
  while (root.size() > 1 && root.back() == '/') root.pop_back();
  FileInfo info;
  OUNCE_CHECK(!root.empty() && !is_step_folder(files, root) && root_of(files, root) == root &&
                  files.stat(root + "/config.toml", info) != 0,
              "[import] expected a folder of steps as --out, got '", path,
              "', which is a step or a run; choose a folder of its own");
  OUNCE_CHECK(step >= 0 && step <= kMostStep, "[import] expected a step of 0 to ", kMostStep,
              ", got ", step);
  OUNCE_CHECK(replace || files.stat(root + "/" + step_name(step), info) != 0, "[import] step ",
              step, " is in '", root,
              "' already; choose another number, or replace it with --force");
  return root;
}

}  // namespace

ImportReport import_step(const std::string& file, const std::string& root, int64_t step,
                         const ImportOptions& options) {
  const torch::NoGradGuard guard;
  const auto files = options.file_system ? options.file_system : posix_file_system();
  return with_faults([&] {
    const auto folder = checked_root(*files, root, step, options.replace);
    auto tensors = read_tensors(files, file);
    ImportReport report;
    report.prefix = options.prefix.value_or(tensors.prefix.value_or("model/"));
    for (auto& [name, value] : tensors.items) name = report.prefix + name;
    Checkpointer writer(
        {.levels = {{.path = folder, .keep_last = 0}}, .file_system = options.file_system});
    auto saved = writer.save_and_wait(step, {{"", &tensors}},
                                      {.notes = {{"imported_from", fs::absolute(file).string()}}});
    report.info = std::move(saved.info);
    report.warnings = std::move(saved.warnings);
    report.tensors = static_cast<int64_t>(tensors.items.size());
    return report;
  });
}

}  // namespace ounce::ckpt
