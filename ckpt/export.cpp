// SPDX-License-Identifier: MIT
#include <errno.h>
#include <ounce/ckpt/export.h>
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/safetensors.h>
#include <torch/torch.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace ounce::ckpt {
namespace {

constexpr const char* kModel = "model/";
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

constexpr int64_t kPart = 1 << 20;  // elements converted at a time

// ---- what is written

// A file: where its tensors are stored, and how they will stand in it.
struct Shard {
  std::string name;
  std::vector<const TensorRecord*> stored;
  std::vector<TensorRecord> written;
  std::string header;

  int64_t bytes() const {
    return written.empty() ? static_cast<int64_t>(header.size())
                           : written.back().offset + written.back().bytes;
  }
};

using Pair = std::pair<const TensorRecord*, TensorRecord>;

std::vector<Pair> chosen(const StepReader& reader, const ExportOptions& options) {
  const std::string prefix = options.all ? "" : kModel;
  std::vector<Pair> pairs;
  std::vector<std::string> refused;
  for (const auto& tensor : reader.manifest().tensors) {
    if (!tensor.name.starts_with(prefix)) continue;
    TensorRecord written;
    written.name = tensor.name.substr(prefix.size());
    const bool floating = at::isFloatingType(dtype_of_name(tensor.dtype));
    written.dtype = floating && !options.dtype.empty() ? options.dtype : tensor.dtype;
    written.shape = tensor.shape;
    written.bytes =
        reader.holder(tensor).bytes / dtype_bytes(tensor.dtype) * dtype_bytes(written.dtype);
    if (safetensors_dtype(written.dtype).empty()) {
      refused.push_back("'" + tensor.name + "' of " + tensor.dtype);
    }
    pairs.emplace_back(&tensor, std::move(written));
  }
  OUNCE_CHECK(refused.empty(), "[export] expected dtypes that safetensors has, got ",
              c10::Join(", ", refused), "; export the model alone, without --all");
  OUNCE_CHECK_AS(Fault::kNotFound, !pairs.empty(), "[export] no tensor ",
                 options.all ? "" : "under 'model/' ", "in '", reader.folder(),
                 options.all ? "'" : "'; --all exports the others");
  std::sort(pairs.begin(), pairs.end(),
            [](const auto& a, const auto& b) { return a.second.name < b.second.name; });
  return pairs;
}

std::vector<Shard> shards_of(const StepReader& reader, const ExportOptions& options) {
  std::vector<std::vector<Pair>> groups;
  int64_t size = 0;
  for (auto& pair : chosen(reader, options)) {
    const auto bytes = pair.second.bytes;
    const bool full = options.shard_bytes > 0 && bytes > options.shard_bytes - size;
    if (groups.empty() || (full && size > 0)) {
      groups.emplace_back();
      size = 0;
    }
    size += bytes;
    groups.back().push_back(std::move(pair));
  }
  const auto& manifest = reader.manifest();
  const std::map<std::string, std::string> metadata = {{"format", "pt"},
                                                       {"step", std::to_string(manifest.step)},
                                                       {"uuid", manifest.uuid},
                                                       {"prefix", options.all ? "" : kModel}};
  std::vector<Shard> shards;
  for (auto& group : groups) {
    std::stable_sort(group.begin(), group.end(), [](const auto& a, const auto& b) {
      return dtype_bytes(a.second.dtype) > dtype_bytes(b.second.dtype);
    });
    Shard shard{.name = kSingle};
    if (groups.size() > 1) {
      char name[64];
      std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", shards.size() + 1,
                    groups.size());
      shard.name = name;
    }
    for (auto& [stored, written] : group) {
      shard.stored.push_back(stored);
      shard.written.push_back(std::move(written));
    }
    // Its error is no damage that an older step would mend.
    shard.header = with_faults([&] { return safetensors_header(shard.written, metadata); });
    shards.push_back(std::move(shard));
  }
  return shards;
}

std::string index_of(const std::vector<Shard>& shards, int64_t bytes) {
  auto map = nlohmann::json::object();
  for (const auto& shard : shards) {
    for (const auto& tensor : shard.written) map[tensor.name] = shard.name;
  }
  return nlohmann::json{{"metadata", {{"total_size", bytes}}}, {"weight_map", map}}.dump(2) + "\n";
}

// ---- values

// A float that rounds to any shorter format as `value` itself does: cut off, and odd when anything
// was lost. Rounding to nearest twice would round some values wrongly.
float rounded_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (std::isnan(value) || static_cast<double>(nearest) == value) return nearest;
  auto bits = std::bit_cast<uint32_t>(nearest);
  if (std::fabs(nearest) > std::fabs(value)) --bits;
  return std::bit_cast<float>(bits | 1);
}

at::Tensor converted(at::Tensor value, at::ScalarType dtype) {
  if (value.scalar_type() == dtype) return value;
  if (value.scalar_type() == at::kDouble && dtype != at::kFloat) {
    const auto shorter = at::empty(value.sizes(), at::kFloat);
    const auto* from = value.const_data_ptr<double>();
    std::transform(from, from + value.numel(), shorter.mutable_data_ptr<float>(), rounded_to_odd);
    value = shorter;
  }
  return value.to(dtype);
}

int64_t count_infinite(const at::Tensor& value) {
  // No 8-bit float overflows another format.
  return value.element_size() == 1 ? 0 : value.isinf().sum().item<int64_t>();
}

// ---- files

bool is_full(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

std::string parent_of(const std::string& path) {
  const auto slash = path.find_last_of('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// The names that an export gives its files.
bool is_ours(const std::string& name) {
  if (name == kSingle || name == kIndex) return true;
  std::string pattern = name;
  for (auto& c : pattern) {
    if (c >= '0' && c <= '9') c = '#';
  }
  return pattern == "model-#####-of-#####.safetensors";
}

// Files that appear together in a folder, or not at all.
class Output {
 public:
  Output(FileSystem& files, std::string folder, int64_t needed)
      : files_(files), folder_(std::move(folder)), needed_(needed) {
    FileInfo info;
    auto there = folder_;
    while (files_.stat(there, info) == ENOENT && there != "." && there != "/") {
      missing_.push_back(there);
      there = parent_of(there);
    }
    int64_t free = 0;
    if (files_.free_bytes(there, free) == 0 && free < needed_) fail_full(there, ENOSPC);
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    if (done_) return;
    for (const auto& name : begun_) files_.unlink(path(name) + ".tmp");
    for (const auto& name : placed_) files_.unlink(path(name));
    for (const auto& folder : missing_) files_.remove_directory(folder);  // innermost first
  }

  void make_folder() { make_directories(files_, folder_); }

  // `fill` writes the file through the function it gets, at offsets.
  template <class Fill>
  void write(const std::string& name, int64_t size, const Fill& fill) {
    const auto temporary = path(name) + ".tmp";
    // Of an export that was killed.
    if (const int error = files_.unlink(temporary); error != 0 && error != ENOENT) {
      fail_io("remove", temporary, error);
    }
    int descriptor = -1;
    if (const int error = files_.open(temporary, FileSystem::Mode::kCreate, descriptor)) {
      fail_io("create", temporary, error);
    }
    begun_.push_back(name);
    OpenFile file(files_, descriptor);
    if (const int error = files_.allocate(descriptor, size); is_full(error)) {
      fail_io("reserve", temporary, error);
    }
    fill([&](const void* data, size_t bytes, int64_t offset) {
      const int error = write_all(files_, descriptor, data, bytes, offset);
      if (error != 0) fail_io("write", temporary, error);
    });
    const int synced = files_.sync(descriptor), closed = file.close();
    if (synced != 0 || closed != 0) fail_io("make durable", temporary, synced ? synced : closed);
  }

  // Renames all that was written, in order, and removes `old` files that were not.
  void publish(const std::vector<std::string>& old) {
    for (const auto& name : begun_) {
      const int error = files_.rename(path(name) + ".tmp", path(name));
      if (error != 0) fail_io("rename to", path(name), error);
      placed_.push_back(name);
    }
    for (const auto& name : old) {
      if (std::find(placed_.begin(), placed_.end(), name) != placed_.end()) continue;
      if (const int error = files_.unlink(path(name))) fail_io("remove", path(name), error);
    }
    if (const int error = files_.sync_directory(folder_)) fail_io("sync", folder_, error);
    done_ = true;
  }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

 private:
  [[noreturn]] void fail_full(const std::string& where, int error) const {
    int64_t free = 0;
    const bool known = files_.free_bytes(where, free) == 0;
    fail(Fault::kData, "[export] no room in '", where, "' (", std::strerror(error), "): needs ",
         needed_, " bytes, ", known ? std::to_string(free) : "an unknown number of",
         " bytes free; free some space or choose another --out");
  }
  [[noreturn]] void fail_io(const char* what, const std::string& path, int error) const {
    if (is_full(error)) fail_full(folder_, error);
    fail(Fault::kData, "[export] cannot ", what, " '", path, "': ", std::strerror(error));
  }

  FileSystem& files_;
  const std::string folder_;
  const int64_t needed_;
  std::vector<std::string> missing_;  // folders that were not there
  std::vector<std::string> begun_, placed_;
  bool done_ = false;
};

// Where the files go.
struct Target {
  std::string folder;
  std::string file;              // the only file's name; empty = the folder is the target
  std::vector<std::string> old;  // files of an export that is there
};

Target target_of(FileSystem& files, const std::string& out, bool replace) {
  OUNCE_CHECK(!out.empty(), "[export] expected a folder or a .safetensors file as --out, got ''");
  auto path = out;
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  Target target{.folder = path};
  if (path.ends_with(".safetensors")) {
    target.folder = parent_of(path);
    target.file = path.substr(path.find_last_of('/') + 1);
  }
  FileInfo info;
  const int looked = files.stat(path, info);
  OUNCE_CHECK_AS(Fault::kData, looked == 0 || looked == ENOENT || looked == ENOTDIR,
                 "[export] cannot look at '", path, "': ", std::strerror(looked));
  const bool there = looked == 0;
  if (target.file.empty() && info.kind == FileKind::kLink && std::filesystem::is_directory(path)) {
    return target_of(files, std::filesystem::canonical(path).string(), replace);
  }
  const bool folder = there && info.kind == FileKind::kDirectory;
  OUNCE_CHECK(!there || folder == target.file.empty(), "[export] expected --out '", out, "' to be ",
              target.file.empty() ? "a folder, got a file" : "a file, got a folder",
              "; choose another name");
  if (!target.file.empty() && there) target.old = {target.file};
  std::vector<std::string> names;
  if (folder) {
    const int error = files.list(path, names);
    OUNCE_CHECK_AS(Fault::kData, error == 0, "[export] cannot list '", path,
                   "': ", std::strerror(error));
    std::copy_if(names.begin(), names.end(), std::back_inserter(target.old), is_ours);
  }
  OUNCE_CHECK(target.old.empty() || replace, "[export] '", target.folder, "/",
              target.old.empty() ? "" : target.old[0],
              "' is there already; choose another --out, or replace it with --force");
  return target;
}

template <class Write>
void write_shard(const StepReader& reader, const Shard& shard, const Write& write,
                 int64_t& overflowed) {
  write(shard.header.data(), shard.header.size(), 0);
  for (size_t i = 0; i < shard.stored.size(); ++i) {
    const auto stored = read_tensor(reader, *shard.stored[i]);
    const auto flat = stored.reshape({-1});
    const auto& written = shard.written[i];
    const auto size = dtype_bytes(written.dtype);
    for (int64_t at = 0; at < flat.numel(); at += kPart) {
      const auto part = flat.slice(0, at, std::min(at + kPart, flat.numel()));
      const auto value = converted(part, dtype_of_name(written.dtype));
      if (value.scalar_type() != part.scalar_type()) {
        overflowed += count_infinite(value) - count_infinite(part);
      }
      write(value.const_data_ptr(), value.nbytes(), written.offset + at * size);
    }
  }
}

// Throws StorageError for damage of the step alone, so that an older one is tried.
ExportReport export_step(FileSystem& files, const StepReader& reader, const Target& target,
                         const ExportOptions& options) {
  ExportReport report;
  auto shards = shards_of(reader, options);
  OUNCE_CHECK(shards.size() == 1 || target.file.empty(), "[export] ", shards.size(),
              " shards need a folder; give one as --out, or leave --shard-gb out");
  if (!target.file.empty()) shards[0].name = target.file;
  int64_t needed = 0;
  for (const auto& shard : shards) {
    needed += shard.bytes();
    for (const auto& tensor : shard.written) report.bytes += tensor.bytes;
    report.tensors += static_cast<int64_t>(shard.written.size());
  }
  const auto index = shards.size() > 1 ? index_of(shards, report.bytes) : "";
  Output output(files, target.folder, needed + static_cast<int64_t>(index.size()));
  try {
    output.make_folder();
  } catch (const StorageError& error) {
    fail(Fault::kData, error.what());
  }
  for (const auto& shard : shards) {
    output.write(shard.name, shard.bytes(),
                 [&](const auto& write) { write_shard(reader, shard, write, report.overflowed); });
    report.files.push_back(output.path(shard.name));
  }
  if (!index.empty()) {
    output.write(kIndex, index.size(),
                 [&](const auto& write) { write(index.data(), index.size(), 0); });
    report.files.push_back(output.path(kIndex));
  }
  output.publish(target.old);
  return report;
}

}  // namespace

ExportReport export_safetensors(const std::string& path, const std::string& out,
                                const ExportOptions& options) {
  const torch::NoGradGuard guard;
  OUNCE_CHECK(options.dtype.empty() || options.dtype == "float32" || options.dtype == "float16" ||
                  options.dtype == "bfloat16",
              "[export] expected float32, float16 or bfloat16, got '", options.dtype, "'");
  OUNCE_CHECK(options.shard_bytes >= 0, "[export] expected a shard size of at least 0, got ",
              options.shard_bytes);
  const auto files = options.file_system ? options.file_system : posix_file_system();
  const auto target = target_of(*files, out, options.replace);
  return with_faults([&] {
    ExportReport report;
    auto read = read_step(
        files, {path}, options.step, /*direct=*/false,
        [&](const StepReader& reader) { report = export_step(*files, reader, target, options); });
    report.info = std::move(read.info);
    report.rejected = std::move(read.rejected);
    return report;
  });
}

}  // namespace ounce::ckpt
