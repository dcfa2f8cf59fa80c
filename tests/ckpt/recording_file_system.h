// SPDX-License-Identifier: MIT
// A file system that logs what changes it, and a disk that replays such a log and loses power.
// Paths in the log begin below a base folder.
#pragma once

#include "ckpt/faulty_file_system.h"
#include "ckpt/sample_state.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ounce::ckpt {

struct Call {
  std::string kind, path, to;
  int64_t offset = 0;
  std::string data;
};

class RecordingFileSystem : public FaultyFileSystem {
 public:
  explicit RecordingFileSystem(std::string base) : base_(std::move(base)) {}
  std::vector<Call> log;

  size_t logged() {
    const Lock lock(order_);
    return log.size();
  }

  int open(const std::string& path, Mode mode, int& descriptor) override {
    const Lock lock(order_);
    // The syncs of the hint come after the commit and would stand in for missing ones.
    if (path.ends_with("/LATEST.tmp")) return EACCES;
    // Replayed call by call: nothing goes past the log, and no two writers mix theirs.
    if (mode == Mode::kReadDirect || mode == Mode::kWriteDirect) return EINVAL;
    const int error = FaultyFileSystem::open(path, mode, descriptor);
    if (error != 0 || mode == Mode::kRead) return error;
    paths_[descriptor] = path;
    note(0, "create", path);
    // libhdf5 has written its part by itself.
    if (mode == Mode::kWrite) log.push_back({"write", inside(path), "", 0, bytes_of(path)});
    return 0;
  }
  int pwrite(int descriptor, const void* data, size_t size, int64_t offset, size_t& done) override {
    const Lock lock(order_);
    const int error = FaultyFileSystem::pwrite(descriptor, data, size, offset, done);
    log.push_back({"write", inside(paths_.at(descriptor)), "", offset,
                   std::string(static_cast<const char*>(data), done)});
    return error;
  }
  int sync(int descriptor) override {
    const Lock lock(order_);
    return note(0, "sync", paths_.at(descriptor));
  }
  int sync_directory(const std::string& path) override {
    const Lock lock(order_);
    return note(0, "sync_directory", path);
  }
  int rename(const std::string& from, const std::string& to) override {
    const Lock lock(order_);
    return note(FaultyFileSystem::rename(from, to), "rename", from, to);
  }
  int exchange(const std::string& first, const std::string& second) override {
    const Lock lock(order_);
    return note(FaultyFileSystem::exchange(first, second), "exchange", first, second);
  }
  int make_directory(const std::string& path) override {
    const Lock lock(order_);
    return note(FaultyFileSystem::make_directory(path), "make_directory", path);
  }
  int unlink(const std::string& path) override {
    const Lock lock(order_);
    return note(FaultyFileSystem::unlink(path), "remove", path);
  }
  int remove_directory(const std::string& path) override {
    const Lock lock(order_);
    return note(FaultyFileSystem::remove_directory(path), "remove", path);
  }

 private:
  using Lock = std::lock_guard<std::mutex>;
  std::string inside(const std::string& path) const { return path.substr(base_.size()); }
  int note(int error, const char* kind, const std::string& path, const std::string& to = "") {
    if (error == 0) log.push_back({kind, inside(path), to.empty() ? to : inside(to)});
    return error;
  }

  std::string base_;
  std::mutex order_;  // a call and its place in the log
  std::map<int, std::string> paths_;
};

// A file or a folder, as it is and as it was last synced.
struct Node {
  bool folder = false;
  std::string data, synced_data;
  std::map<std::string, std::shared_ptr<Node>> entries, synced_entries;
};

// What a crash spares although it was not synced: contents of files, entries of the folders below
// `root`, entries of the root and the folders above it.
struct Kept {
  std::string root;
  bool contents, inner, outer;
};

class Disk {
 public:
  Disk() { base_->folder = true; }

  void apply(const Call& call) {
    if (call.kind == "create" || call.kind == "make_directory") {
      auto& slot = entry(call.path) = std::make_shared<Node>();
      slot->folder = call.kind == "make_directory";
    } else if (call.kind == "write") {
      auto& data = find(call.path)->data;
      data.resize(std::max(data.size(), call.offset + call.data.size()));
      data.replace(call.offset, call.data.size(), call.data);
    } else if (call.kind == "sync") {
      find(call.path)->synced_data = find(call.path)->data;
    } else if (call.kind == "sync_directory") {
      find(call.path)->synced_entries = find(call.path)->entries;
    } else if (call.kind == "rename") {
      entry(call.to) = find(call.path);
      remove(call.path);
    } else if (call.kind == "exchange") {
      std::swap(entry(call.path), entry(call.to));
    } else if (call.kind == "remove") {
      remove(call.path);
    }
  }

  // Path -> content; nothing for a folder.
  using Picture = std::map<std::string, std::optional<std::string>>;
  Picture after_crash(const Kept& kept) const {
    Picture picture;
    collect(*base_, "", kept, picture);
    return picture;
  }

 private:
  static std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }
  std::shared_ptr<Node> find(const std::string& path) { return path.empty() ? base_ : entry(path); }
  std::map<std::string, std::shared_ptr<Node>>& siblings(const std::string& path) {
    return find(path.substr(0, path.rfind('/')))->entries;
  }
  std::shared_ptr<Node>& entry(const std::string& path) { return siblings(path)[name_of(path)]; }
  void remove(const std::string& path) { siblings(path).erase(name_of(path)); }

  static void collect(const Node& node, const std::string& path, const Kept& kept, Picture& out) {
    const bool is_outer = path.size() <= kept.root.size();
    for (const auto& [name, child] :
         (is_outer ? kept.outer : kept.inner) ? node.entries : node.synced_entries) {
      auto& content = out[path + "/" + name];
      if (child->folder) {
        collect(*child, path + "/" + name, kept, out);
      } else {
        content = kept.contents ? child->data : child->synced_data;
        content->resize(child->data.size());  // a size may be kept without the bytes
      }
    }
  }

  std::shared_ptr<Node> base_ = std::make_shared<Node>();
};

}  // namespace ounce::ckpt
