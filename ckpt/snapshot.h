// SPDX-License-Identifier: MIT
// What the objects of a save or a load present: names, shapes, and the tensors themselves.
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
  // Walks the objects, each under its prefix (an empty prefix adds none). Throws ounce::Error
  // (kUsage) for names that are used twice or cannot be stored, and tensors that are undefined,
  // sparse, on the meta device, of an unknown dtype or of more than 32 dimensions.
  explicit Snapshot(const Objects& objects);

  // Names, dtypes, shapes, classes and ties; tensors that are the same memory in the same layout
  // are stored once. No extents yet.
  const std::vector<TensorRecord>& tensors() const { return records_; }
  const std::map<std::string, Scalar>& scalars() const { return scalars_; }
  // Shares the owner's memory until materialize().
  const at::Tensor& tensor(size_t index) const { return tensors_[index]; }

  // Copies what may not be copied later: kHost to host memory, kForward on its device, and what is
  // not contiguous or a lazy conjugate. From here on tensor(i) holds its bytes in row-major order,
  // and shared(i) says whether they are still the owner's memory. Tied ones are left as they are.
  void materialize();
  bool shared(size_t index) const { return shared_[index]; }
  // Drops the tensors.
  void release() { tensors_.clear(); }

 private:
  class Collector;

  std::vector<TensorRecord> records_;
  std::vector<at::Tensor> tensors_;
  std::vector<bool> shared_;
  std::map<std::string, Scalar> scalars_;
};

}  // namespace ounce::ckpt
