// SPDX-License-Identifier: MIT
// What the programs without Torch share, which profilers and sanitizers run: F_driver.cu.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Of the runtime or of cuBLAS: ends the program where it is no success.
#define CHECK(call)                                                                              \
  do {                                                                                           \
    const auto status_ = (call);                                                                 \
    if (status_ != 0) {                                                                          \
      std::printf("%s:%d %s: error %d\n", __FILE__, __LINE__, #call, static_cast<int>(status_)); \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

namespace ounce::driver {

template <class T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)));
  return static_cast<T*>(memory);
}

}  // namespace ounce::driver
