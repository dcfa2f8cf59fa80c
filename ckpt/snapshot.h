// SPDX-License-Identifier: MIT
// What a save writes, collected from the objects. Today the copies to the host happen when a writer
// asks for the bytes; state of class kHost, which its owner may change at any time, is copied at
// once.
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/manifest.h>
#include <ounce/core/stateful.h>

#include <string>
#include <utility>
#include <vector>

namespace ounce::ckpt {

// PyTorch's name of a dtype, and back; "" and nullopt-like ScalarType::Undefined when it cannot be
// stored (quantised types).
std::string dtype_name(at::ScalarType dtype);
at::ScalarType dtype_of_name(const std::string& name);

class Snapshot {
 public:
  // Walks the objects, each under its prefix (an empty prefix adds none). Holds references to the
  // tensors: nothing may change them while the snapshot is in use. Throws ounce::Error (kUsage) for
  // names that are used twice or cannot be stored, and tensors that are undefined, sparse, on the
  // meta device, of an unknown dtype or of more than 32 dimensions.
  explicit Snapshot(const Objects& objects);

  // Names, dtypes, shapes, classes and ties; tensors that are the same memory in the same layout
  // are stored once. No extents yet.
  const std::vector<TensorRecord>& tensors() const { return records_; }
  const std::map<std::string, Scalar>& scalars() const { return scalars_; }
  // The tensor's values on the host, contiguous; shares the memory where it already is that.
  at::Tensor host(size_t index) const;

 private:
  class Collector;

  std::vector<TensorRecord> records_;
  std::vector<at::Tensor> tensors_;
  std::map<std::string, Scalar> scalars_;
};

}  // namespace ounce::ckpt
