// SPDX-License-Identifier: MIT
// A file system that fails on purpose: call number k, counted from 0 over every call that can fail,
// or short writes and interrupted calls all the time. Nothing is really synced: no power is lost in
// these tests, and thousands of saves would wait for the disk. Calls may come from several threads.
#pragma once

#include <errno.h>
#include <ounce/ckpt/file_system.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace ounce::ckpt {

class FaultyFileSystem : public FileSystem {
 public:
  int error = EIO;
  int64_t fail_at = -1;          // the call that fails; -1 = none
  bool persistent = false;       // all calls after it fail as well
  std::string only;              // only calls of this kind count ("sync", ...); empty = all
  bool short_transfers = false;  // every read and write does a part, every other one is interrupted
  bool no_allocate = false;      // allocate() is not supported
  bool no_exchange = false;      // nor is exchange()
  std::atomic<int64_t> calls{0};
  std::string failed;             // the kind of the call that failed
  std::function<void()> instead;  // runs once before the call that would fail, which then does not
  std::function<void(const std::string& kind)> before;  // runs before every call; may wait

  int open(const std::string& path, Mode mode, int& descriptor) override {
    if (fails("open")) return error;
    return real_->open(path, mode, descriptor);
  }
  int pwrite(int descriptor, const void* data, size_t size, int64_t offset, size_t& done) override {
    done = 0;
    if (fails("pwrite")) return error;
    if (interrupted()) return EINTR;
    return real_->pwrite(descriptor, data, part(size), offset, done);
  }
  int pread(int descriptor, void* data, size_t size, int64_t offset, size_t& done) override {
    done = 0;
    if (fails("pread")) return error;
    if (interrupted()) return EINTR;
    return real_->pread(descriptor, data, part(size), offset, done);
  }
  int allocate(int descriptor, int64_t size) override {
    if (fails("allocate")) return error;
    return no_allocate ? EOPNOTSUPP : real_->allocate(descriptor, size);
  }
  int sync(int) override { return fails("sync") ? error : 0; }
  int close(int descriptor) override {
    const int result = real_->close(descriptor);
    return fails("close") ? error : result;
  }
  int rename(const std::string& from, const std::string& to) override {
    if (fails("rename")) return error;
    return real_->rename(from, to);
  }
  int exchange(const std::string& first, const std::string& second) override {
    if (fails("exchange")) return error;
    return no_exchange ? EINVAL : real_->exchange(first, second);
  }
  int sync_directory(const std::string&) override { return fails("sync_directory") ? error : 0; }
  int make_directory(const std::string& path) override {
    if (fails("make_directory")) return error;
    return real_->make_directory(path);
  }
  int unlink(const std::string& path) override {
    if (fails("unlink")) return error;
    return real_->unlink(path);
  }
  int remove_directory(const std::string& path) override {
    if (fails("remove_directory")) return error;
    return real_->remove_directory(path);
  }
  int list(const std::string& path, std::vector<std::string>& names) override {
    if (fails("list")) return error;
    return real_->list(path, names);
  }
  int stat(const std::string& path, FileInfo& info) override {
    if (fails("stat")) return error;
    return real_->stat(path, info);
  }
  int free_bytes(const std::string& path, int64_t& bytes) override {
    return real_->free_bytes(path, bytes);
  }

 private:
  bool fails(const char* kind) {
    if (before) before(kind);
    if (!only.empty() && only != kind) return false;
    const auto call = calls++;
    if (fail_at < 0 || call < fail_at || (call > fail_at && !persistent)) return false;
    const std::lock_guard lock(mutex_);
    if (failed.empty()) failed = kind;
    if (!instead) return true;
    std::exchange(instead, nullptr)();
    fail_at = -1;
    return false;
  }
  bool interrupted() { return short_transfers && (++transfers_ % 2 == 0); }
  size_t part(size_t size) const { return short_transfers ? (size + 2) / 3 : size; }

  std::shared_ptr<FileSystem> real_ = posix_file_system();
  std::atomic<int64_t> transfers_{0};
  std::recursive_mutex mutex_;
};

}  // namespace ounce::ckpt
