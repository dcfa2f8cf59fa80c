// SPDX-License-Identifier: MIT
// One writer a root. The file LOCK is held by flock(), which ends with the process, and names its
// holder. No Torch here.
#pragma once

#include <string>

namespace ounce::ckpt {

class RootLock {
 public:
  // Takes root/LOCK. Throws StorageError: kBusy with the holder's host and pid when another process
  // (or another writer of this one) has it; kIo when the file cannot be made. A lock whose holder
  // is gone is taken over: the kernel has released it, and the file system is of this machine or
  // the file names this host. On a network file system a lock of another host is refused, because
  // nobody here can tell whether that host is alive.
  explicit RootLock(const std::string& root);
  ~RootLock();
  RootLock(const RootLock&) = delete;
  RootLock& operator=(const RootLock&) = delete;

 private:
  int descriptor_ = -1;
};

}  // namespace ounce::ckpt
