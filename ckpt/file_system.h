// SPDX-License-Identifier: MIT
// Every file call of the checkpoints goes through this interface, so that tests can make any of
// them fail and an asynchronous writer can replace the way bytes reach the disk. (libhdf5 alone
// creates its file by itself; from then on only this interface touches it.) No Torch here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ounce::ckpt {

inline constexpr int64_t kPageBytes = 4096;  // alignment of every tensor in its file

enum class SyncPolicy {
  kFull,  // files and folders are synced: what is announced survives a power cut
  kData,  // files only: it survives the end of the process, and a power cut if the folder does
  kOff,   // nothing: for memory, or where a later level is the durable one
};

enum class FileKind { kFile, kDirectory, kLink, kOther };

struct FileInfo {
  FileKind kind = FileKind::kOther;
  int64_t size = 0;
};

// Every call returns 0 or a positive errno value and throws nothing. Paths are used as given; the
// last component is never followed when it is a symbolic link. Descriptors are close-on-exec.
class FileSystem {
 public:
  enum class Mode {
    kRead,
    kWrite,   // an existing file, for reading and writing
    kCreate,  // a new file, for reading and writing; EEXIST when there is one
    // The same as kRead and kWrite, past the page cache: offsets, sizes and memory are then whole
    // pages. EINVAL where the file system cannot.
    kReadDirect,
    kWriteDirect,
  };

  virtual ~FileSystem() = default;

  virtual int open(const std::string& path, Mode mode, int& descriptor) = 0;
  // May write or read less than asked for, as the system calls do; `done` is what was done.
  virtual int pwrite(int descriptor, const void* data, size_t size, int64_t offset,
                     size_t& done) = 0;
  virtual int pread(int descriptor, void* data, size_t size, int64_t offset, size_t& done) = 0;
  // Reserves the blocks of [0, size). EOPNOTSUPP where the file system cannot.
  virtual int allocate(int descriptor, int64_t size) = 0;
  virtual int sync(int descriptor) = 0;
  // Writes a range that the page cache holds to the disk, waits for that and drops it from the
  // cache: bounds the memory that writing takes; makes nothing durable. Best effort.
  virtual void flush_range(int descriptor, int64_t offset, int64_t size);
  virtual int close(int descriptor) = 0;

  virtual int rename(const std::string& from, const std::string& to) = 0;
  // Swaps two entries in one step. EINVAL or ENOSYS where the file system cannot.
  virtual int exchange(const std::string& first, const std::string& second) = 0;
  virtual int sync_directory(const std::string& path) = 0;
  virtual int make_directory(const std::string& path) = 0;
  virtual int unlink(const std::string& path) = 0;
  virtual int remove_directory(const std::string& path) = 0;
  // Names in a folder, sorted, without "." and "..".
  virtual int list(const std::string& path, std::vector<std::string>& names) = 0;
  virtual int stat(const std::string& path, FileInfo& info) = 0;  // of the link itself
  virtual int free_bytes(const std::string& path, int64_t& bytes) = 0;
};

// The operating system's file system.
std::shared_ptr<FileSystem> posix_file_system();

// Loops over short results and EINTR until all is done. read_all: EIO when the file ends before.
int write_all(FileSystem& files, int descriptor, const void* data, size_t size, int64_t offset);
int read_all(FileSystem& files, int descriptor, void* data, size_t size, int64_t offset);

// Owns a descriptor. close() reports what close() says; the destructor closes silently.
class OpenFile {
 public:
  OpenFile(FileSystem& files, int descriptor) : files_(&files), descriptor_(descriptor) {}
  OpenFile(OpenFile&& other) noexcept
      : files_(other.files_), descriptor_(std::exchange(other.descriptor_, -1)) {}
  OpenFile& operator=(OpenFile&&) = delete;
  ~OpenFile() { close(); }

  int descriptor() const { return descriptor_; }
  int close() { return descriptor_ < 0 ? 0 : files_->close(std::exchange(descriptor_, -1)); }

 private:
  FileSystem* files_;
  int descriptor_;
};

// The same with a StorageError (kIo, or kMissing for ENOENT) that names `what` and the path.
OpenFile open_file(FileSystem& files, const std::string& path, FileSystem::Mode mode);
[[noreturn]] void throw_io(const std::string& what, const std::string& path, int error);

// Whole pages go through `direct`, an open file or null; what it refuses, and what is no whole
// page, goes through `buffered`. `data` and `offset` are at pages. read_pages() reads `size` bytes
// into memory of whole pages.
int write_pages(FileSystem& files, const OpenFile* direct, const OpenFile& buffered,
                const char* data, int64_t size, int64_t offset);
int read_pages(FileSystem& files, const OpenFile* direct, const OpenFile& buffered, char* data,
               int64_t size, int64_t offset);

// Writes a small file and makes it durable under its final name: `path`.tmp, sync, close, rename,
// sync of `folder`, which holds it; the syncs as far as `sync` asks for them. Throws StorageError.
void write_file_durably(FileSystem& files, const std::string& folder, const std::string& name,
                        const std::string& content, SyncPolicy sync = SyncPolicy::kFull);

// Reads a regular file of at most `limit` bytes. Throws StorageError.
std::string read_file(FileSystem& files, const std::string& path, int64_t limit);

// Makes a folder and its missing parents, and makes the new entries durable. Throws StorageError.
void make_directories(FileSystem& files, const std::string& path);

// Removes a folder of plain files, or a single entry. Returns 0 or the first error.
int remove_tree(FileSystem& files, const std::string& path);

// 32 random hexadecimal digits.
std::string random_id();

}  // namespace ounce::ckpt
