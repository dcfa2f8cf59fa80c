// SPDX-License-Identifier: MIT
#include <ounce/ckpt/data_file.h>
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/reader.h>
#include <ounce/ckpt/scan.h>
#include <ounce/ckpt/storage_error.h>
#include <ounce/ckpt/sums.h>

#include <algorithm>
#include <cstring>

namespace ounce::ckpt {
namespace {

[[noreturn]] void damaged(const std::string& message) {
  throw StorageError(StorageError::Kind::kDamaged, "[checkpoint] " + message);
}

std::string block_name(const Manifest& manifest, const std::string& folder,
                       const TensorRecord& tensor, int64_t at, int64_t size) {
  const auto begin = tensor.offset + at;
  return "bytes " + std::to_string(begin) + " to " + std::to_string(begin + size) + " of '" +
         folder + "/" + manifest.files[tensor.file].name + "', in tensor '" + tensor.name + "',";
}

// Reads one block into `out`; "" or what is wrong with it.
std::string block_fault(FileSystem& files, const OpenFile& open, const std::string& folder,
                        const Manifest& manifest, const TensorRecord& tensor, size_t block,
                        void* out) {
  const auto at = static_cast<int64_t>(block) * manifest.block_bytes;
  const auto size = std::min(manifest.block_bytes, tensor.bytes - at);
  const int error = read_all(files, open.descriptor(), out, size, tensor.offset + at);
  if (error == 0 && block_sum(out, size) == tensor.sums[block]) return "";
  return block_name(manifest, folder, tensor, at, size) +
         (error != 0 ? std::string(" cannot be read: ") + std::strerror(error)
                     : std::string(" do not match their sum"));
}

OpenFile open_checked(FileSystem& files, const std::string& folder, const Manifest& manifest,
                      int64_t index) {
  const auto& file = manifest.files[index];
  const auto path = folder + "/" + file.name;
  FileInfo info;
  if (const int error = files.stat(path, info); error != 0) throw_io("read", path, error);
  if (info.kind != FileKind::kFile || info.size != file.size) {
    damaged("expected a file of " + std::to_string(file.size) + " bytes at '" + path + "', got " +
            (info.kind == FileKind::kFile ? std::to_string(info.size) + " bytes"
                                          : "something that is no file"));
  }
  return open_file(files, path, FileSystem::Mode::kRead);
}

void check_rest(FileSystem& files, const OpenFile& open, const std::string& folder,
                const FileRecord& file, const ByteRanges& rest) {
  const auto path = folder + "/" + file.name;
  if (rest_sum(files, open, rest, path) != file.rest_sum) {
    damaged("the sum of the HDF5 structure of '" + path + "' does not match");
  }
}

}  // namespace

std::string rest_sum(FileSystem& files, const OpenFile& open, const ByteRanges& rest,
                     const std::string& path) {
  RunningSum sum;
  std::string buffer;
  for (const auto& [begin, end] : rest) {
    for (auto at = begin; at < end; at += static_cast<int64_t>(buffer.size())) {
      buffer.resize(std::min<int64_t>(end - at, 1 << 20));
      const int error = read_all(files, open.descriptor(), buffer.data(), buffer.size(), at);
      if (error != 0) throw_io("read", path, error);
      sum.add(buffer.data(), buffer.size());
    }
  }
  return sum.digits();
}

StepReader::StepReader(std::shared_ptr<FileSystem> files, const std::string& folder, bool direct)
    : StepReader(files, folder, read_manifest(*files, folder), direct) {}

StepReader::StepReader(std::shared_ptr<FileSystem> files, const std::string& folder,
                       Manifest manifest, bool direct)
    : files_(std::move(files)), folder_(folder), manifest_(std::move(manifest)) {
  const auto rests = rest_of_files(manifest_);
  for (size_t i = 0; i < manifest_.files.size(); ++i) {
    open_.push_back(open_checked(*files_, folder_, manifest_, i));
    check_rest(*files_, open_.back(), folder_, manifest_.files[i], rests[i]);
    direct_.emplace_back();
    if (direct) {
      direct_.back() = open_direct(*files_, folder_ + "/" + manifest_.files[i].name,
                                   FileSystem::Mode::kReadDirect);
    }
  }
  for (size_t i = 0; i < manifest_.tensors.size(); ++i) by_name_[manifest_.tensors[i].name] = i;
}

const TensorRecord* StepReader::find(const std::string& name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &manifest_.tensors[found->second];
}

const TensorRecord& StepReader::holder(const TensorRecord& tensor) const {
  return tensor.tied_to.empty() ? tensor : *find(tensor.tied_to);
}

void StepReader::read_block(const TensorRecord& tensor, size_t block, void* out) const {
  const auto fault =
      block_fault(*files_, open_[tensor.file], folder_, manifest_, tensor, block, out);
  if (!fault.empty()) damaged(fault);
}

void StepReader::read(const TensorRecord& tensor, void* out) const {
  const auto& source = holder(tensor);
  for (size_t block = 0; block < source.sums.size(); ++block) {
    read_block(source, block, static_cast<char*>(out) + block * manifest_.block_bytes);
  }
}

void StepReader::check(const TensorRecord& tensor) const {
  const auto& source = holder(tensor);
  std::string buffer(std::min(manifest_.block_bytes, source.bytes), '\0');
  for (size_t block = 0; block < source.sums.size(); ++block) {
    read_block(source, block, buffer.data());
  }
}

std::vector<Slot> StepReader::slots_of(const std::vector<size_t>& tensors,
                                       int64_t slot_bytes) const {
  std::vector<LayoutItem> items;
  for (const auto i : tensors) {
    const auto& tensor = manifest_.tensors[i];
    items.push_back({i, tensor.bytes, static_cast<int>(tensor.file)});
  }
  std::sort(items.begin(), items.end(), [&](const auto& a, const auto& b) {
    return std::pair(a.group, manifest_.tensors[a.tensor].offset) <
           std::pair(b.group, manifest_.tensors[b.tensor].offset);
  });
  return cut_into_slots(items, slot_bytes, manifest_.block_bytes);
}

void StepReader::read_bytes(size_t file, char* memory, int64_t bytes, int64_t offset) const {
  const int error = read_all(*files_, open_[file].descriptor(), memory, bytes, offset);
  if (error != 0) throw_io("read", folder_ + "/" + manifest_.files[file].name, error);
}

void StepReader::read(const Slot& slot, char* memory, bool verify) const {
  for (const auto& run : runs_of(slot, manifest_)) {
    const auto& direct = direct_[run.file];
    const int error =
        read_pages(*files_, direct.get(), open_[run.file], memory + run.at, run.bytes, run.offset);
    if (error != 0) throw_io("read", folder_ + "/" + manifest_.files[run.file].name, error);
  }
  if (!verify) return;
  for (const auto& piece : slot.pieces) {
    const auto& tensor = manifest_.tensors[piece.tensor];
    for (int64_t at = 0; at < piece.bytes; at += manifest_.block_bytes) {
      const auto block = (piece.begin + at) / manifest_.block_bytes;
      const auto size = std::min(manifest_.block_bytes, piece.bytes - at);
      if (block_sum(memory + piece.at + at, size) == tensor.sums[block]) continue;
      damaged(block_name(manifest_, folder_, tensor, piece.begin + at, size) +
              " do not match their sum");
    }
  }
}

VerifyReport verify_step(std::shared_ptr<FileSystem> files, const std::string& folder,
                         bool containers) {
  VerifyReport report;
  const auto noting = [&](const auto& action) {
    try {
      action();
      return true;
    } catch (const StorageError& error) {
      if (error.kind() == StorageError::Kind::kNewerFormat) throw;
      report.problems.push_back(error.what());
      return false;
    }
  };
  auto& manifest = report.manifest;
  if (!noting([&] { manifest = read_manifest(*files, folder); })) return report;
  const auto rests = rest_of_files(manifest);
  // Block by block here, because one bad block must not hide the next.
  for (size_t index = 0; index < manifest.files.size(); ++index) {
    const auto path = folder + "/" + manifest.files[index].name;
    noting([&] {
      const auto open = open_checked(*files, folder, manifest, index);
      noting([&] { check_rest(*files, open, folder, manifest.files[index], rests[index]); });
      std::string buffer;
      for (const auto& tensor : manifest.tensors) {
        if (!tensor.tied_to.empty() || tensor.file != static_cast<int64_t>(index)) continue;
        for (size_t block = 0; block < tensor.sums.size(); ++block) {
          const auto at = static_cast<int64_t>(block) * manifest.block_bytes;
          buffer.resize(std::min(manifest.block_bytes, tensor.bytes - at));
          const auto fault =
              block_fault(*files, open, folder, manifest, tensor, block, buffer.data());
          if (!fault.empty()) report.problems.push_back("[checkpoint] " + fault);
          ++report.blocks;
          report.bytes += static_cast<int64_t>(buffer.size());
        }
      }
    });
    if (containers) {
      for (auto& problem : compare_container(path, manifest)) {
        report.problems.push_back("[checkpoint] " + std::move(problem));
      }
    }
  }
  return report;
}

}  // namespace ounce::ckpt
