// SPDX-License-Identifier: MIT
// What lowrank_driver.cu checks on: tensors with gaps between them, on both sides, and products of
// them in double precision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include <ounce/kernels/common/driver.h>
#include <ounce/optim/lowrank_kernels.h>

namespace ounce::optim {
namespace {

using ounce::driver::allocate;
using ounce::driver::download;
using ounce::driver::upload;

using bf16 = __nv_bfloat16;
bool failed = false;

__host__ __device__ float noise(uint64_t i, uint64_t seed) {  // N(0, 1)
  const auto mix = [](uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
  };
  const uint64_t r = mix(i * 0x9E3779B97F4A7C15ull + seed * 0xD6E8FEB86659FD93ull + 1);
  const float u = ((r >> 40) + 0.5f) / 16777216.f, v = (r & 0xFFFFFF) / 16777216.f;
  return sqrtf(-2 * logf(u)) * cosf(6.2831853f * v);
}

// `count` tensors of `size` elements with gaps between them, on both sides.
template <class T>
struct Batch {
  int64_t size, stride;
  int count;
  std::vector<T> host;
  T* device;

  static constexpr int kGap = 64;
  Batch(int count_, int64_t size_, const std::function<float(int64_t)>& value)
      : size(size_), stride((size_ + 7) / 8 * 8 + kGap), count(count_) {
    host.resize(stride * count + kGap);
    for (size_t i = 0; i < host.size(); ++i) host[i] = T(value(static_cast<int64_t>(i)));
    device = upload(host);
  }
  ~Batch() { cudaFree(device); }
  Batch(const Batch&) = delete;
  void push() {
    CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  T* at(int i) { return device + kGap + i * stride; }
  const T* of(int i) const { return host.data() + kGap + i * stride; }
  bool in_gap(int64_t i) const { return i < kGap || (i - kGap) % stride >= size; }
  std::vector<T> pull() const { return download(device, static_cast<int64_t>(host.size())); }
  // Compared with `expected` inside and with what was there in the gaps: the relative error.
  void compare(const char* what, const std::vector<double>& expected, double limit) const {
    const auto got = pull();
    double error = 0, value = 0;
    int64_t stray = 0, at = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (in_gap(static_cast<int64_t>(i))) {
        stray += std::memcmp(&got[i], &host[i], sizeof(T)) != 0;
        continue;
      }
      const double x = expected[at++], y = static_cast<double>(static_cast<float>(got[i]));
      error += std::isnan(y) ? 1e30 : (x - y) * (x - y);
      value += x * x;
    }
    const double relative = std::sqrt(error) / std::max(std::sqrt(value), 1e-30);
    report(what, relative, relative <= limit && stray == 0, stray);
  }
  void same(const char* what) const {
    const auto got = pull();
    const bool equal = std::memcmp(got.data(), host.data(), got.size() * sizeof(T)) == 0;
    report(what, 0, equal, 0);
  }
  static void report(const char* what, double error, bool good, int64_t stray) {
    std::printf(" %s %.1e", what, error);
    if (stray > 0) std::printf(" (%lld written outside)", static_cast<long long>(stray));
    if (!good) std::printf(" WRONG");
    failed |= !good;
  }
};

// Through a graph, as every launch can be captured in one.
void run_captured(const std::function<cudaError_t(cudaStream_t)>& f) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t run;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK(f(stream));
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&run, graph, 0));
  CHECK(cudaGraphLaunch(run, stream));
  CHECK(cudaStreamSynchronize(stream));
  CHECK(cudaGraphExecDestroy(run));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
}

std::vector<float> floats(const bf16* from, int64_t count) {
  return std::vector<float>(from, from + count);
}

// u q as it lies in p, of one matrix.
std::vector<double> product(const LowRankShape& s, const bf16* from_u, const bf16* from_q) {
  const auto u = floats(from_u, s.longer() * s.rank), q = floats(from_q, s.rank * s.n());
  std::vector<double> all(s.rows * s.columns);
  const int64_t along = s.right ? 1 : s.columns, across = s.right ? s.columns : 1;
  for (int64_t outer = 0; outer < s.longer(); ++outer) {
    for (int64_t j = 0; j < s.rank; ++j) {
      const double x = u[outer * s.rank + j];
      double* to = all.data() + outer * across;
      for (int64_t k = 0; k < s.n(); ++k) to[k * along] += x * q[j * s.n() + k];
    }
  }
  return all;
}

// Chosen vectors, of about unit length.
Batch<bf16> vectors_of(const LowRankShape& s) {
  const auto size = 1 / std::sqrt(static_cast<float>(s.n()));
  return Batch<bf16>(s.count, s.rank * s.n(), [=](int64_t i) { return noise(i, 3) * size; });
}

// Where matrices go in 8 bits, with gaps between them.
struct Bytes {
  LowRankShape shape;
  int64_t blocks = (shape.columns + 127) / 128;
  int64_t stride = (shape.rows * shape.columns + 15) / 16 * 16 + 64;
  Batch<float> scales;
  int8_t* device;

  explicit Bytes(const LowRankShape& s)
      : shape(s), scales(s.count, s.rows * blocks, [](int64_t) { return -1; }) {
    device = upload(std::vector<int8_t>(stride * s.count, kUnset));
  }
  ~Bytes() { cudaFree(device); }
  Bytes(const Bytes&) = delete;
  int8_t* at(int i) { return device + i * stride; }
  std::vector<int8_t> pull() const { return download(device, stride * shape.count); }
  void untouched() const {
    scales.same("scales");
    const auto bytes = pull();
    failed |= std::any_of(bytes.begin(), bytes.end(), [](int8_t x) { return x != kUnset; });
  }
  // With p - u q; poisoned: p's first block is not finite.
  void compare(const Batch<bf16>& p, const Batch<bf16>& u, const Batch<bf16>& q,
               bool poisoned) const {
    const auto& s = shape;
    std::vector<double> largest;
    const auto bytes = pull();
    const auto got = scales.pull();
    double worst = 0;
    int64_t stray = 0;
    bool kept = true;
    for (int i = 0; i < s.count; ++i) {
      auto x = product(s, u.of(i), q.of(i));
      std::vector<double> most(s.rows * blocks);
      for (int64_t k = 0; k < s.rows * s.columns; ++k) {
        x[k] = static_cast<float>(p.of(i)[k]) - x[k];
        double& of = most[k / s.columns * blocks + k % s.columns / 128];
        of = std::max(of, std::fabs(x[k]));
      }
      for (int64_t k = 0; k < s.rows * s.columns; ++k) {
        const int64_t block = k / s.columns * blocks + k % s.columns / 128;
        const float scale = got[64 + i * scales.stride + block];
        // Of columns, one that is not finite is in the first block of every row.
        if (poisoned && i == 0 && (s.right ? block == 0 : block % blocks == 0)) {
          kept = kept && std::isnan(scale);
          continue;
        }
        worst = std::max(worst, std::fabs(scale * bytes[i * stride + k] - x[k]) / scale);
      }
      for (int64_t k = s.rows * s.columns; k < stride; ++k)
        stray += bytes[i * stride + k] != kUnset;
      for (const double of : most) largest.push_back(of / 127);
    }
    if (!poisoned) scales.compare("scales", largest, 1e-5);
    std::printf(" off by %.3f steps%s", worst, worst > 0.501 || stray > 0 ? " WRONG" : "");
    failed |= worst > 0.501 || stray > 0 || (poisoned && !kept);
  }

 private:
  static constexpr int8_t kUnset = 99;
};

}  // namespace
}  // namespace ounce::optim
