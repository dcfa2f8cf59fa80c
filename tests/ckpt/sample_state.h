// SPDX-License-Identifier: MIT
// A Stateful of named values, made from a seed, for the tests of checkpoints.
#pragma once

#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/sums.h>
#include <torch/torch.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace ounce::ckpt {

// A folder of its own that goes away with the object: on the disk, or, for tests that save hundreds
// of times and lose no power, in memory where there is such a file system.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(bool in_memory = false) {
    const std::filesystem::path memory = "/dev/shm", disk = std::filesystem::temp_directory_path();
    in_memory = in_memory && ::access(memory.c_str(), W_OK) == 0;
    auto pattern = ((in_memory ? memory : disk) / "ounce-ckpt-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

inline std::string bytes_of(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

// A manifest with the right sum for whatever it says.
inline std::string signed_text(const std::string& body) {
  const std::string start = "{\"self_xxh3\":\"";
  auto text = start + std::string(32, '0') + "\"," + body;
  RunningSum sum;
  sum.add(text.data(), text.size());
  return text.replace(start.size(), 32, sum.digits());
}

struct NamedTensor {
  std::string name;
  at::Tensor value;
  StateClass cls = StateClass::kStep;
};

struct SampleState : Stateful {
  std::vector<NamedTensor> tensors;
  std::vector<std::pair<std::string, int64_t>> integers;
  std::vector<std::pair<std::string, double>> numbers;
  std::vector<std::pair<std::string, std::string>> texts;

  void visit_state(StateVisitor& visitor) override {
    for (auto& [name, value, cls] : tensors) visitor.tensor(name, value, cls);
    for (auto& [name, value] : integers) visitor.integer(name, value);
    for (auto& [name, value] : numbers) visitor.number(name, value);
    for (auto& [name, value] : texts) visitor.text(name, value);
  }
};

// Whether two tensors have the same dtype, shape and bits (NaN equals itself).
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const auto first = a.contiguous(), second = b.contiguous();
  return a.nbytes() == 0 ||
         std::memcmp(first.const_data_ptr(), second.const_data_ptr(), a.nbytes()) == 0;
}

inline bool same_state(const SampleState& a, const SampleState& b) {
  if (a.tensors.size() != b.tensors.size()) return false;
  for (size_t i = 0; i < a.tensors.size(); ++i) {
    if (!same_bits(a.tensors[i].value, b.tensors[i].value)) return false;
  }
  for (size_t i = 0; i < a.numbers.size(); ++i) {
    if (std::bit_cast<uint64_t>(a.numbers[i].second) !=
        std::bit_cast<uint64_t>(b.numbers[i].second)) {
      return false;
    }
  }
  return a.integers == b.integers && a.texts == b.texts;
}

// Random bits of a dtype (bool: 0 or 1).
inline at::Tensor random_bits(at::IntArrayRef shape, at::ScalarType dtype,
                              at::Generator& generator) {
  auto value = at::empty(shape, dtype);
  const int64_t bytes = static_cast<int64_t>(value.nbytes());
  if (bytes == 0) return value;
  const auto raw =
      at::randint(0, dtype == at::kBool ? 2 : 256, {bytes}, generator, at::dtype(at::kByte));
  std::memcpy(value.data_ptr(), raw.const_data_ptr(), bytes);
  return value;
}

// Small tensors of different sizes, an empty and a scalar one among them; every value follows from
// the seed. `largest` is the number of floats of the largest.
inline SampleState small_state(uint64_t seed, int64_t largest = 3000) {
  auto generator = at::detail::createCPUGenerator(seed);
  SampleState state;
  state.tensors = {{"w", at::randn({largest}, generator)},
                   {"layer/0.weight", at::randn({17, 5}, generator)},
                   {"layer/0.bias", at::randn({}, generator), StateClass::kForward},
                   {"layer/none", at::empty({0, 3})},
                   {"moment", random_bits({33}, at::kBFloat16, generator)},
                   {"rng", random_bits({100}, at::kByte, generator), StateClass::kHost}};
  state.integers = {{"step", static_cast<int64_t>(seed)}};
  state.numbers = {{"loss", 1.0 / (static_cast<double>(seed) + 3)}};
  state.texts = {{"name", "run " + std::to_string(seed)}};
  return state;
}

}  // namespace ounce::ckpt
