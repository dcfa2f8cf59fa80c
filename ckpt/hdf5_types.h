// SPDX-License-Identifier: MIT
// What the files that call libhdf5 share: owners of its objects, its errors as StorageError, and
// its types for our dtypes. Internal: only hdf5_*.cpp include this.
#pragma once

#include <hdf5.h>

#include <string>
#include <utility>

namespace ounce::ckpt {

// Owns an HDF5 identifier of any kind.
class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle(hid_t id, Close close) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&&) = delete;
  ~Handle() { close(); }

  operator hid_t() const { return id_; }
  bool close() { return id_ < 0 || close_(std::exchange(id_, -1)) >= 0; }

 private:
  hid_t id_;
  Close close_;
};

// Keeps libhdf5 from printing its errors; they are read from its stack instead.
class QuietErrors {
 public:
  QuietErrors() {
    // A file that libhdf5 could not close would be written again at exit, and crash it. All files
    // are closed by hand.
    [[maybe_unused]] static const herr_t once = H5dont_atexit();
    H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  ~QuietErrors() { H5Eset_auto2(H5E_DEFAULT, function_, data_); }

 private:
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

// The innermost message, which holds errno and its text when a file call failed.
std::string last_error();

// Throws StorageError (kIo) "libhdf5 cannot `what`: ...".
[[noreturn]] void fail_hdf5(const std::string& what);

inline hid_t valid(hid_t id, const std::string& what) {
  if (id < 0) fail_hdf5(what);
  return id;
}

inline void done(herr_t result, const std::string& what) {
  if (result < 0) fail_hdf5(what);
}

// The type of a dataset that holds `dtype` (FORMAT.md, "rank00000.h5").
Handle type_of(const std::string& dtype);

}  // namespace ounce::ckpt
