// SPDX-License-Identifier: MIT
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/storage_error.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace ounce::ckpt {
namespace {

int status(long result) { return result < 0 ? errno : 0; }

class PosixFileSystem : public FileSystem {
 public:
  int open(const std::string& path, Mode mode, int& descriptor) override {
    int flags = O_CLOEXEC | O_NOFOLLOW;
    flags |= mode == Mode::kRead || mode == Mode::kReadDirect ? O_RDONLY : O_RDWR;
    if (mode == Mode::kReadDirect || mode == Mode::kWriteDirect) flags |= O_DIRECT;
    if (mode == Mode::kCreate) flags |= O_CREAT | O_EXCL;
    descriptor = ::open(path.c_str(), flags, 0666);
    return status(descriptor);
  }

  int pwrite(int descriptor, const void* data, size_t size, int64_t offset, size_t& done) override {
    const auto result = ::pwrite(descriptor, data, size, offset);
    done = result < 0 ? 0 : result;
    return status(result);
  }

  int pread(int descriptor, void* data, size_t size, int64_t offset, size_t& done) override {
    const auto result = ::pread(descriptor, data, size, offset);
    done = result < 0 ? 0 : result;
    return status(result);
  }

  // Not posix_fallocate: where the file system cannot reserve, glibc would write to every block.
  int allocate(int descriptor, int64_t size) override {
    return size == 0 ? 0 : status(::fallocate(descriptor, 0, 0, size));
  }

  int sync(int descriptor) override { return status(::fsync(descriptor)); }
  int close(int descriptor) override { return status(::close(descriptor)); }

  void flush_range(int descriptor, int64_t offset, int64_t size) override {
    constexpr unsigned kAll = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE;
    // An error shows in sync() too, which asks the same pages.
    if (::sync_file_range(descriptor, offset, size, kAll | SYNC_FILE_RANGE_WAIT_AFTER) == 0) {
      ::posix_fadvise(descriptor, offset, size, POSIX_FADV_DONTNEED);
    }
  }

  int rename(const std::string& from, const std::string& to) override {
    return status(::rename(from.c_str(), to.c_str()));
  }

  int exchange(const std::string& first, const std::string& second) override {
    return status(::syscall(SYS_renameat2, AT_FDCWD, first.c_str(), AT_FDCWD, second.c_str(),
                            RENAME_EXCHANGE));
  }

  int sync_directory(const std::string& path) override {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return errno;
    const int error = status(::fsync(descriptor));
    ::close(descriptor);
    return error;
  }

  int make_directory(const std::string& path) override {
    return status(::mkdir(path.c_str(), 0777));
  }
  int unlink(const std::string& path) override { return status(::unlink(path.c_str())); }
  int remove_directory(const std::string& path) override { return status(::rmdir(path.c_str())); }

  int list(const std::string& path, std::vector<std::string>& names) override {
    names.clear();
    DIR* directory = ::opendir(path.c_str());
    if (directory == nullptr) return errno;
    errno = 0;
    while (const dirent* entry = ::readdir(directory)) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(name);
    }
    const int error = errno;
    ::closedir(directory);
    std::sort(names.begin(), names.end());
    return error;
  }

  int stat(const std::string& path, FileInfo& info) override {
    struct ::stat found;
    if (::lstat(path.c_str(), &found) != 0) return errno;
    info.size = found.st_size;
    info.kind = S_ISREG(found.st_mode)   ? FileKind::kFile
                : S_ISDIR(found.st_mode) ? FileKind::kDirectory
                : S_ISLNK(found.st_mode) ? FileKind::kLink
                                         : FileKind::kOther;
    return 0;
  }

  int free_bytes(const std::string& path, int64_t& bytes) override {
    struct ::statvfs found;
    if (::statvfs(path.c_str(), &found) != 0) return errno;
    bytes = static_cast<int64_t>(found.f_bavail) * static_cast<int64_t>(found.f_frsize);
    return 0;
  }
};

// A write or read that does nothing again and again is an error, not an endless loop.
constexpr int kMostIdleCalls = 1000;

// `total` is what was done before, and after.
template <class Call>
int until_done(size_t size, size_t& total, const Call& call) {
  for (int idle = 0; total < size && idle < kMostIdleCalls;) {
    size_t done = 0;
    const int error = call(total, done);
    if (error != 0 && error != EINTR && error != EAGAIN) return error;
    idle = done == 0 ? idle + 1 : 0;
    total += done;
    if (error == 0 && done == 0) return EIO;
  }
  return total >= size ? 0 : EIO;
}

template <class Call>
int until_done(size_t size, const Call& call) {
  size_t total = 0;
  return until_done(size, total, call);
}

}  // namespace

void FileSystem::flush_range(int, int64_t, int64_t) {}

std::shared_ptr<FileSystem> posix_file_system() {
  static const auto files = std::make_shared<PosixFileSystem>();
  return files;
}

int write_all(FileSystem& files, int descriptor, const void* data, size_t size, int64_t offset) {
  return until_done(size, [&](size_t total, size_t& done) {
    return files.pwrite(descriptor, static_cast<const char*>(data) + total, size - total,
                        offset + static_cast<int64_t>(total), done);
  });
}

int read_all(FileSystem& files, int descriptor, void* data, size_t size, int64_t offset) {
  return until_done(size, [&](size_t total, size_t& done) {
    return files.pread(descriptor, static_cast<char*>(data) + total, size - total,
                       offset + static_cast<int64_t>(total), done);
  });
}

int write_pages(FileSystem& files, const OpenFile* direct, const OpenFile& buffered,
                const char* data, int64_t size, int64_t offset) {
  size_t done = 0;
  if (direct != nullptr) {
    const auto whole = static_cast<size_t>(size / kPageBytes * kPageBytes);
    const int error = until_done(whole, done, [&](size_t total, size_t& count) {
      return files.pwrite(direct->descriptor(), data + total, whole - total,
                          offset + static_cast<int64_t>(total), count);
    });
    if (error != 0 && error != EINVAL) return error;
  }
  const auto left = size - static_cast<int64_t>(done);
  if (left == 0) return 0;
  const auto from = offset + static_cast<int64_t>(done);
  return write_all(files, buffered.descriptor(), data + done, left, from);
}

int read_pages(FileSystem& files, const OpenFile* direct, const OpenFile& buffered, char* data,
               int64_t size, int64_t offset) {
  size_t done = 0;
  const auto wanted = static_cast<size_t>(size);
  if (direct != nullptr) {
    // Asks for whole pages; the end of the file cuts the last one short.
    const auto whole = (wanted + kPageBytes - 1) / kPageBytes * kPageBytes;
    const int error = until_done(wanted, done, [&](size_t total, size_t& count) {
      return files.pread(direct->descriptor(), data + total, whole - total,
                         offset + static_cast<int64_t>(total), count);
    });
    if (error != 0 && error != EINVAL) return error;
  }
  if (done >= wanted) return 0;
  return read_all(files, buffered.descriptor(), data + done, wanted - done,
                  offset + static_cast<int64_t>(done));
}

void throw_io(const std::string& what, const std::string& path, int error) {
  throw StorageError(error == ENOENT ? StorageError::Kind::kMissing : StorageError::Kind::kIo,
                     "[checkpoint] cannot " + what + " '" + path + "': " + std::strerror(error),
                     error);
}

OpenFile open_file(FileSystem& files, const std::string& path, FileSystem::Mode mode) {
  int descriptor = -1;
  int error = 0;
  do {
    error = files.open(path, mode, descriptor);
  } while (error == EINTR);
  if (error != 0) throw_io(mode == FileSystem::Mode::kCreate ? "create" : "open", path, error);
  return OpenFile(files, descriptor);
}

void write_file_durably(FileSystem& files, const std::string& folder, const std::string& name,
                        const std::string& content, SyncPolicy sync) {
  const auto path = folder + "/" + name;
  const auto temporary = path + ".tmp";
  if (const int error = files.unlink(temporary); error != 0 && error != ENOENT) {
    throw_io("remove", temporary, error);
  }
  auto file = open_file(files, temporary, FileSystem::Mode::kCreate);
  int error = write_all(files, file.descriptor(), content.data(), content.size(), 0);
  if (error == 0 && sync != SyncPolicy::kOff) error = files.sync(file.descriptor());
  const int closed = file.close();
  if (error == 0) error = closed;
  if (error != 0) throw_io("write", temporary, error);
  error = files.rename(temporary, path);
  if (error != 0) throw_io("rename to", path, error);
  if (sync == SyncPolicy::kFull) error = files.sync_directory(folder);
  if (error != 0) throw_io("sync the folder", folder, error);
}

std::string read_file(FileSystem& files, const std::string& path, int64_t limit) {
  FileInfo info;
  if (const int error = files.stat(path, info); error != 0) throw_io("read", path, error);
  if (info.kind != FileKind::kFile || info.size > limit) {
    throw StorageError(StorageError::Kind::kDamaged,
                       "[checkpoint] expected a file of at most " + std::to_string(limit) +
                           " bytes at '" + path + "', got " +
                           (info.kind == FileKind::kFile ? std::to_string(info.size) + " bytes"
                                                         : "something that is no file"));
  }
  const auto file = open_file(files, path, FileSystem::Mode::kRead);
  std::string content(info.size, '\0');
  const int error = read_all(files, file.descriptor(), content.data(), content.size(), 0);
  if (error != 0) throw_io("read", path, error);
  return content;
}

void make_directories(FileSystem& files, const std::string& path) {
  const int error = files.make_directory(path);
  if (error == EEXIST) return;
  const auto slash = path.find_last_of('/');
  const auto parent = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  if (error == ENOENT && slash != std::string::npos && slash != 0) {
    make_directories(files, parent);
    const int again = files.make_directory(path);
    if (again != 0 && again != EEXIST) throw_io("make the folder", path, again);
  } else if (error != 0) {
    throw_io("make the folder", path, error);
  }
  if (const int synced = files.sync_directory(parent); synced != 0) {
    throw_io("sync the folder", parent, synced);
  }
}

int remove_tree(FileSystem& files, const std::string& path) {
  FileInfo info;
  if (const int error = files.stat(path, info); error != 0) return error == ENOENT ? 0 : error;
  if (info.kind != FileKind::kDirectory) return files.unlink(path);
  std::vector<std::string> names;
  int first = files.list(path, names);
  for (const auto& name : names) {
    const int error = files.unlink(path + "/" + name);
    if (first == 0) first = error;
  }
  const int error = files.remove_directory(path);
  return first != 0 ? first : error;
}

std::string random_id() {
  unsigned char bytes[16];
  for (size_t done = 0; done < sizeof(bytes);) {
    const auto got = ::getrandom(bytes + done, sizeof(bytes) - done, 0);
    if (got > 0) done += got;
  }
  std::string text;
  for (const auto byte : bytes) {
    text.push_back("0123456789abcdef"[byte >> 4]);
    text.push_back("0123456789abcdef"[byte & 15]);
  }
  return text;
}

}  // namespace ounce::ckpt
