// SPDX-License-Identifier: MIT
#include <ounce/ckpt/commit.h>
#include <ounce/ckpt/data_file.h>
#include <ounce/ckpt/host_pool.h>
#include <ounce/ckpt/levels.h>
#include <ounce/ckpt/reader.h>

#include <algorithm>

namespace ounce::ckpt {
namespace {

constexpr int64_t kCopyBytes = int64_t{16} << 20;

class StepCopy {
 public:
  StepCopy(std::shared_ptr<FileSystem> files, const std::string& folder, SyncPolicy sync,
           bool direct)
      : files_(*files), source_(std::move(files), folder, direct), sync_(sync), direct_(direct) {
    memory_ = allocate_pages(std::max(kCopyBytes, whole_pages(source_.manifest().block_bytes)));
  }

  std::vector<std::string> to(const std::string& root) {
    const auto& manifest = source_.manifest();
    int64_t bytes = kPageBytes;
    for (const auto& file : manifest.files) bytes += whole_pages(file.size);
    const auto text = read_file(files_, source_.folder() + "/" + kManifestName, kMostManifestBytes);
    bytes += static_cast<int64_t>(text.size());
    check_space(files_, root, manifest.step, bytes);
    Commit commit(files_, root, manifest.step, manifest.uuid, sync_);
    const auto rests = rest_of_files(manifest);
    for (size_t i = 0; i < manifest.files.size(); ++i) copy_file(i, rests[i], commit.folder());
    commit.write_manifest(text);
    commit.publish();
    commit.write_hint();
    return commit.warnings();
  }

 private:
  void copy_file(size_t index, const ByteRanges& rest, const std::string& folder) {
    const auto& file = source_.manifest().files[index];
    const auto path = folder + "/" + file.name;
    auto buffered = open_file(files_, path, FileSystem::Mode::kCreate);
    if (const int error = reserve_blocks(files_, buffered.descriptor(), file.size); error != 0) {
      throw_io("reserve", path, error);
    }
    auto direct = direct_ ? open_direct(files_, path, FileSystem::Mode::kWriteDirect) : nullptr;
    const auto write = [&](int64_t at, int64_t bytes, int64_t offset) {
      const int error =
          write_pages(files_, direct.get(), buffered, memory_.get() + at, bytes, offset);
      if (error != 0) throw_io("write", path, error);
    };
    copy_tensors(index, write);
    copy_rest(index, rest, path, buffered);
    const int synced = sync_ == SyncPolicy::kOff ? 0 : files_.sync(buffered.descriptor());
    const int closed = buffered.close();
    if (synced != 0 || closed != 0) throw_io("make durable", path, synced != 0 ? synced : closed);
  }

  template <class Write>
  void copy_tensors(size_t index, const Write& write) {
    const auto& tensors = source_.manifest().tensors;
    std::vector<size_t> held;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].tied_to.empty() && tensors[i].file == static_cast<int64_t>(index)) {
        held.push_back(i);
      }
    }
    for (const auto& slot : source_.slots_of(held, kCopyBytes)) {
      source_.read(slot, memory_.get(), /*verify=*/true);
      for (const auto& run : runs_of(slot, source_.manifest())) {
        write(run.at, run.bytes, run.offset);
      }
    }
  }

  // Between the tensors; verified when the source was opened.
  void copy_rest(size_t index, const ByteRanges& rest, const std::string& path,
                 const OpenFile& buffered) {
    for (const auto& [begin, end] : rest) {
      for (auto at = begin; at < end; at += kCopyBytes) {
        const auto bytes = std::min(kCopyBytes, end - at);
        source_.read_bytes(index, memory_.get(), bytes, at);
        const int error = write_all(files_, buffered.descriptor(), memory_.get(), bytes, at);
        if (error != 0) throw_io("write", path, error);
      }
    }
  }

  FileSystem& files_;
  const StepReader source_;
  const SyncPolicy sync_;
  const bool direct_;
  Pages memory_;
};

}  // namespace

std::vector<std::string> copy_step(std::shared_ptr<FileSystem> files, const std::string& folder,
                                   const std::string& root, SyncPolicy sync, bool direct) {
  return StepCopy(std::move(files), folder, sync, direct).to(root);
}

}  // namespace ounce::ckpt
