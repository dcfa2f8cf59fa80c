// SPDX-License-Identifier: MIT
#include <link.h>
#include <ounce/core/check.h>
#include <ounce/core/data/byte_dataset.h>
#include <ounce/core/data/datasets.h>
#include <ounce/core/data/files.h>

#include <algorithm>
#include <array>
#include <filesystem>

namespace ounce::data {

namespace {

namespace fs = std::filesystem;

constexpr std::array<std::string_view, 4> kFolders = {"ATen", "c10", "caffe2", "torch"};
constexpr std::array<std::string_view, 3> kSuffixes = {".h", ".hpp", ".cuh"};
// Generated code says so in its text (kGeneratedMark), or is one of these; the rest is vendored.
constexpr std::string_view kGeneratedMark = "@generated";
constexpr std::array<std::string_view, 3> kLeftOutFolders = {"ops", "generated",
                                                             "mem_eff_attention"};
constexpr std::array<std::string_view, 11> kLeftOutFiles = {"RedispatchFunctions.h",
                                                            "VmapGeneratedPlumbing.h",
                                                            "RegistrationDeclarations.h",
                                                            "CompositeViewCopyKernels.h",
                                                            "TensorBody.h",
                                                            "crc_alt.h",
                                                            "pythoncapi_compat.h",
                                                            "flat_hash_map.h",
                                                            "order_preserving_flat_hash_map.h",
                                                            "dlpack.h",
                                                            "avx_mathfun.h"};

template <class Range>
bool contains(const Range& range, std::string_view name) {
  return std::find(range.begin(), range.end(), name) != range.end();
}

int find_libtorch(dl_phdr_info* info, size_t, void* found) {
  const fs::path library = info->dlpi_name;
  const auto name = library.filename().string();
  auto& folder = *static_cast<fs::path*>(found);
  // libtorch_cpu is preferred: libc10 could come from elsewhere.
  if (name.rfind("libtorch_cpu.", 0) == 0 || (folder.empty() && name.rfind("libc10.", 0) == 0)) {
    folder = library.parent_path();
  }
  return 0;
}

fs::path include_folder(const std::string& given) {
  const auto holds_headers = [](const fs::path& folder) {
    std::error_code ignored;
    return fs::is_regular_file(folder / "ATen" / "core" / "Tensor.h", ignored);
  };
  if (!given.empty()) {
    OUNCE_CHECK_AS(Fault::kData, holds_headers(given), "[data] embedded: '", given,
                   "' is not the include folder of a LibTorch (no ATen/core/Tensor.h in it); "
                   "correct data.path");
    return given;
  }
  fs::path libraries;
  dl_iterate_phdr(find_libtorch, &libraries);
  std::error_code ignored;
  // A library that is a link has its headers beside the file it leads to.
  const auto target = fs::canonical(libraries / "libtorch_cpu.so", ignored).parent_path();
  for (const auto& folder : {libraries, target}) {
    if (folder.empty()) continue;
    const auto include = folder.parent_path() / "include";
    if (holds_headers(include)) return include;
  }
  fail(Fault::kData, "[data] embedded: no headers beside the LibTorch in '", libraries.string(),
       "'; set data.path to its include folder, or use data.name = \"text\"");
}

struct Header {
  uint64_t hash;  // of the relative name
  std::string name;
};

// Ordered by the hash of the name: fixed, and any part of it is a fair sample of the whole.
std::vector<Header> list_headers(const fs::path& include) {
  std::vector<Header> headers;
  for (const auto folder : kFolders) {
    if (!fs::is_directory(include / folder)) continue;
    for (auto entry = fs::recursive_directory_iterator(include / folder);
         entry != fs::recursive_directory_iterator(); ++entry) {
      const auto name = entry->path().filename().string();
      if (entry->is_directory()) {
        if (contains(kLeftOutFolders, name)) entry.disable_recursion_pending();
        continue;
      }
      if (!contains(kSuffixes, entry->path().extension().string())) continue;
      if (contains(kLeftOutFiles, name)) continue;
      auto relative = entry->path().lexically_relative(include).generic_string();
      const auto hash = hash64(relative);
      headers.push_back({hash, std::move(relative)});
    }
  }
  std::sort(headers.begin(), headers.end(), [](const Header& a, const Header& b) {
    return a.hash != b.hash ? a.hash < b.hash : a.name < b.name;
  });
  return headers;
}

}  // namespace

std::shared_ptr<Dataset> make_embedded(const Options& options, const Dataset::Context& context) {
  const auto include = include_folder(options.text("path"));
  const auto valid_every = static_cast<uint64_t>(options.positive("valid_every"));
  OUNCE_CHECK(valid_every >= 2, "[config] 'valid_every': expected at least 2, got 1");
  std::string train;
  std::string valid;
  int64_t files = 0;
  int64_t valid_files = 0;
  std::vector<Header> headers;
  try {
    headers = list_headers(include);
  } catch (const fs::filesystem_error& error) {
    fail(Fault::kData, "[data] embedded: cannot list '", error.path1().string(),
         "': ", error.code().message());
  }
  for (const auto& header : headers) {
    const auto text = read_file((include / header.name).string());
    if (text.find(kGeneratedMark) != std::string::npos) continue;
    const bool validates = header.hash % valid_every == 0;
    auto& split = validates ? valid : train;
    if (!split.empty()) split += ByteDataset::kDocumentEnd;
    split += text;
    ++files;
    valid_files += validates;
  }
  // Named from here where that is shorter to read.
  std::error_code ignored;
  const auto place = fs::proximate(include, ignored);
  auto description = "embedded: " + std::to_string(files) + " C++ headers of LibTorch in " +
                     (ignored || place.native().starts_with("..") ? include : place).string() +
                     ", " + std::to_string(valid_files) + " for validation";
  return ByteDataset::make("embedded", std::move(train), std::move(valid), context,
                           {std::move(description)});
}

}  // namespace ounce::data
