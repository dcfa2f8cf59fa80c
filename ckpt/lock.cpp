// SPDX-License-Identifier: MIT
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <ounce/ckpt/file_system.h>
#include <ounce/ckpt/lock.h>
#include <ounce/ckpt/storage_error.h>
#include <sys/file.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

namespace ounce::ckpt {
namespace {

struct Holder {
  std::string host;
  std::string boot;
  int64_t pid = 0;
};

Holder this_process() {
  Holder holder;
  char host[256] = "unknown";
  ::gethostname(host, sizeof(host) - 1);
  holder.host = host;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> holder.boot;
  holder.pid = ::getpid();
  return holder;
}

// An empty or unreadable file names nobody: released, or cut short by a crash.
Holder read_holder(int descriptor) {
  std::string text(4096, '\0');
  const auto size = ::pread(descriptor, text.data(), text.size(), 0);
  text.resize(std::max<ssize_t>(size, 0));
  const auto json = nlohmann::json::parse(text, nullptr, false);
  Holder holder;
  if (!json.is_object()) return holder;
  const auto text_of = [&](const char* key) {
    return json.contains(key) && json[key].is_string() ? json[key].get<std::string>() : "";
  };
  holder.host = text_of("host");
  holder.boot = text_of("boot");
  if (json.contains("pid") && json["pid"].is_number_integer()) holder.pid = json["pid"];
  return holder;
}

// File systems that only one machine mounts: there flock() alone is the truth.
bool is_local(int descriptor) {
  constexpr long kXfs = 0x58465342, kZfs = 0x2fc12fc1, kF2fs = 0xF2F52010;
  const long local[] = {EXT4_SUPER_MAGIC,
                        BTRFS_SUPER_MAGIC,
                        TMPFS_MAGIC,
                        RAMFS_MAGIC,
                        kXfs,
                        OVERLAYFS_SUPER_MAGIC,
                        kZfs,
                        kF2fs};
  struct ::statfs found;
  return ::fstatfs(descriptor, &found) == 0 &&
         std::find(std::begin(local), std::end(local), found.f_type) != std::end(local);
}

[[noreturn]] void refuse(const std::string& root, const Holder& holder) {
  throw StorageError(
      StorageError::Kind::kBusy,
      "[checkpoint] '" + root + "' is being written by process " + std::to_string(holder.pid) +
          " on host '" + holder.host +
          "'; wait for it, use another folder, or, when it is surely gone, remove '" + root +
          "/LOCK'");
}

}  // namespace

RootLock::RootLock(const std::string& root) {
  const auto path = root + "/LOCK";
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (descriptor_ < 0) throw_io("make the lock", path, errno);
  const bool taken = ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0;
  const int error = taken ? 0 : errno;
  const auto holder = read_holder(descriptor_);
  const auto self = this_process();
  const bool same_machine = holder.host.empty() || holder.boot == self.boot ||
                            holder.host == self.host || is_local(descriptor_);
  if (error == EWOULDBLOCK || (taken && !same_machine)) {
    ::close(descriptor_);
    refuse(root, holder);
  }
  const auto text =
      nlohmann::json{{"host", self.host}, {"pid", self.pid}, {"boot", self.boot}}.dump() + "\n";
  if (!taken || ::ftruncate(descriptor_, 0) != 0 ||
      ::pwrite(descriptor_, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
    const int code = taken ? errno : error;
    ::close(descriptor_);
    throw_io("take the lock", path, code);
  }
}

RootLock::~RootLock() {
  // The kernel's lock decides; a name that stays behind costs nothing.
  [[maybe_unused]] const int ignored = ::ftruncate(descriptor_, 0);
  ::close(descriptor_);
}

}  // namespace ounce::ckpt
