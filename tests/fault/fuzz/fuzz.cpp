// SPDX-License-Identifier: MIT
#include "fuzz.h"

#include <malloc.h>
#include <ounce/ckpt/storage_error.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <tuple>

namespace {

size_t held = 0, most_held = 0;  // bytes of operator new; one thread

}  // namespace

// Inlined into each other's callers they would look to g++ like a new that is freed.
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  void* memory = std::malloc(size);
  if (memory != nullptr) most_held = std::max(most_held, held += malloc_usable_size(memory));
  return memory;
}

[[gnu::noinline]] void* operator new(size_t size) {
  void* memory = operator new(size, std::nothrow);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

[[gnu::noinline]] void operator delete(void* memory) noexcept {
  held -= malloc_usable_size(memory);
  std::free(memory);
}

void operator delete(void* memory, size_t) noexcept { operator delete(memory); }

namespace ounce::ckpt::fuzz {

// A JSON value of two bytes takes 16 and a container of three bytes 80; vectors double, and the
// records stand beside the JSON.
constexpr size_t kBytesHeldPerByte = 100;
constexpr size_t kBytesHeldAnyway = 64 << 10;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz: expected that %s\n", what.c_str());
  std::abort();
}

bool parses(size_t size, const std::function<void()>& parse) {
  const auto before = most_held = held;
  bool good = true;
  try {
    parse();
  } catch (const StorageError& error) {
    good = false;
    expect(error.kind() == StorageError::Kind::kDamaged ||
               error.kind() == StorageError::Kind::kNewerFormat,
           std::string("bad bytes are called damaged, not: ") + error.what());
  }
  expect(most_held - before <= kBytesHeldAnyway + kBytesHeldPerByte * size,
         std::to_string(size) + " bytes take less memory than " +
             std::to_string(most_held - before) + " bytes");
  return good;
}

void expect_apart(const std::vector<TensorRecord>& tensors, const std::vector<FileRecord>& files,
                  int64_t begin) {
  std::vector<std::tuple<std::string, int64_t, int64_t>> extents;
  for (const auto& tensor : tensors) {
    if (!tensor.tied_to.empty()) continue;
    int64_t bytes = dtype_bytes(tensor.dtype);
    for (const auto size : tensor.shape) {
      expect(size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes), "a shape has a size");
    }
    expect(tensor.bytes == bytes, "a tensor has as many bytes as its shape says");
    const auto& file = files.at(tensor.file);
    expect(
        tensor.offset >= begin && tensor.offset <= file.size && bytes <= file.size - tensor.offset,
        "an extent lies inside its file");
    if (bytes > 0) extents.emplace_back(file.name, tensor.offset, bytes);
  }
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i) {
    const auto& [name, offset, bytes] = extents[i - 1];
    expect(name != std::get<0>(extents[i]) || offset + bytes <= std::get<1>(extents[i]),
           "extents lie apart");
  }
}

}  // namespace ounce::ckpt::fuzz
