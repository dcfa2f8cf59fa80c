// SPDX-License-Identifier: MIT
#include <errno.h>
#include <ounce/ckpt/data_file.h>
#include <ounce/ckpt/hdf5_file.h>
#include <ounce/ckpt/reader.h>
#include <ounce/ckpt/storage_error.h>
#include <ounce/ckpt/sums.h>

#include <algorithm>

namespace ounce::ckpt {

DataFile::DataFile(FileSystem& files, const std::string& path, Manifest& manifest, bool direct,
                   SyncPolicy sync)
    : files_(files), path_(path), manifest_(manifest), sync_(sync) {
  create_container(path, manifest);
  FileInfo info;
  if (const int error = files.stat(path, info); error != 0) throw_io("look at", path, error);
  manifest.files = {{path.substr(path.find_last_of('/') + 1), info.size, ""}};
  for (auto& tensor : manifest.tensors) {
    const auto block = manifest.block_bytes;
    tensor.sums.assign(tensor.tied_to.empty() ? (tensor.bytes + block - 1) / block : 0, 0);
  }
  buffered_.emplace(open_file(files, path, FileSystem::Mode::kWrite));
  const int error = reserve_blocks(files, buffered_->descriptor(), info.size);
  if (error != 0) throw_io("reserve", path, error);
  // Between the tensors lie the ends of their last pages: zeros now, and after writing.
  manifest.files[0].rest_sum = rest_sum(files, *buffered_, rest_of_files(manifest)[0], path);
  if (direct) direct_ = open_direct(files, path, FileSystem::Mode::kWriteDirect);
}

void DataFile::write(const Slot& slot, const char* data) {
  for (const auto& piece : slot.pieces) {
    auto& tensor = manifest_.tensors[piece.tensor];
    for (int64_t at = 0; at < piece.bytes; at += manifest_.block_bytes) {
      tensor.sums[(piece.begin + at) / manifest_.block_bytes] =
          block_sum(data + piece.at + at, std::min(manifest_.block_bytes, piece.bytes - at));
    }
  }
  const auto size = manifest_.files[0].size;
  for (const auto& run : runs_of(slot, manifest_)) {
    // Whole pages, but never past the end of the file.
    const auto bytes = std::min(whole_pages(run.bytes), size - run.offset);
    const int error =
        write_pages(files_, direct_.get(), *buffered_, data + run.at, bytes, run.offset);
    if (error != 0) throw_io("write", path_, error);
    if (!direct_ && sync_ != SyncPolicy::kOff) {
      files_.flush_range(buffered_->descriptor(), run.offset, bytes);
    }
  }
}

void DataFile::finish() {
  const int synced = sync_ == SyncPolicy::kOff ? 0 : files_.sync(buffered_->descriptor());
  const int closed = buffered_->close();
  const int also = direct_ ? direct_->close() : 0;
  for (const int error : {synced, closed, also}) {
    if (error != 0) throw_io("make durable", path_, error);
  }
}

int64_t needed_bytes(const Manifest& manifest) {
  int64_t bytes = 1 << 20;
  for (const auto& [name, text] : manifest.notes) bytes += 3 * static_cast<int64_t>(text.size());
  for (const auto& tensor : manifest.tensors) {
    int64_t size = tensor.tied_to.empty() ? dtype_bytes(tensor.dtype) : 0;
    for (const auto extent : tensor.shape) size *= extent;
    bytes += whole_pages(size) + 4096;
  }
  return bytes;
}

int reserve_blocks(FileSystem& files, int descriptor, int64_t size) {
  int error = 0;
  do {
    error = files.allocate(descriptor, size);
  } while (error == EINTR);
  return error == EOPNOTSUPP || error == ENOSYS ? 0 : error;
}

std::unique_ptr<OpenFile> open_direct(FileSystem& files, const std::string& path,
                                      FileSystem::Mode mode) {
  int descriptor = -1, error = 0;
  do {
    error = files.open(path, mode, descriptor);
  } while (error == EINTR);
  return error != 0 ? nullptr : std::make_unique<OpenFile>(files, descriptor);
}

}  // namespace ounce::ckpt
