// SPDX-License-Identifier: MIT
// What the programs without Torch share, which profilers and sanitizers run: F_driver.cu.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

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
template <class T>
T* upload(const std::vector<T>& from) {
  T* to = allocate<T>(static_cast<int64_t>(from.size()));
  CHECK(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  return to;
}
template <class T>
std::vector<T> download(const T* from, int64_t count) {
  std::vector<T> to(count);
  CHECK(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
  return to;
}

}  // namespace ounce::driver
