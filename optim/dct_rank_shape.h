// SPDX-License-Identifier: MIT
// How a block of the ranking kernel divides a transform, and what stands in its shared memory.
// Device code only.
#pragma once

#include <cuda_runtime.h>
#include <ounce/kernels/common/ptx.h>

#include <cstdint>

#include <ounce/optim/dct_butterflies.h>
#include <ounce/optim/rounding_streams.h>

namespace ounce::optim {

constexpr int64_t kSharedLimit = 227 * 1024;

// Point (q, c) of R1 x n / R1 lies at place q kStride + c of an exchange; where vectors are
// columns, a place holds the P pairs' points, so that neighbours stay neighbours.
// added: bytes of an addend's element, 1 (then n is a multiple of 512) or 2; 0: there is none.
template <int n, int r1, int r2, int r3, bool right, int pairs, int groups, int added = 0>
struct Shape {
  static_assert(r1 * r2 * r3 == n);
  static constexpr int N = n, R1 = r1, R2 = r2, R3 = r3, P = pairs;
  static constexpr bool kRight = right;
  static constexpr int M1 = n / r1, M2 = r3, M3 = n / r3;
  static constexpr int kUnit = 2 * pairs;                                       // vectors
  static constexpr int T = right && pairs * M1 / 2 < 32 ? 32 : pairs * M1 / 2;  // of a group
  static constexpr int I2 = (pairs * n / r2 + T - 1) / T, I3 = (pairs * M3 / 2 + T - 1) / T;
  static constexpr int kStride = M1 + (right ? 2 : 1);
  static constexpr int kExchange = r1 * kStride * pairs;  // complex numbers
  static constexpr int kStaged = n * pairs;               // words of two bf16
  static constexpr int kAdded = added, kScales = added == 1 ? n / kInt8Block : 0;  // of a row
  static constexpr int kAddedRow = added * n + 4 * kScales;                        // bytes
  // Four rows apart must not share banks.
  static constexpr int kTwiddles2 = (Radix<r2>::kTwiddles + 1) / 2 * 2 + (right ? 2 : 0);
  static constexpr int kTwiddles3 = Radix<r3>::kTwiddles;

  // One after another in shared memory, in bytes.
  static constexpr int64_t kOfGroup = kExchange * 8 + kStaged * 4 + kUnit * kAddedRow;
  static constexpr int64_t kTables = r1 * kTwiddles2 * 8 + M3 / 2 * kTwiddles3 * 8 + n / 2 * 4;
  // With an addend, as many groups as find room.
  static constexpr int kRoom = static_cast<int>((kSharedLimit - kTables) / (kOfGroup + 8));
  static constexpr int G = added > 0 && kRoom < groups ? kRoom : groups, kThreads = T * G;
  static constexpr int64_t kTable2 = kOfGroup * G, kTable3 = kTable2 + r1 * kTwiddles2 * 8;
  static constexpr int64_t kTangents = kTable3 + M3 / 2 * kTwiddles3 * 8;
  static constexpr int64_t kBarriers = kTangents + n / 2 * 4, kShared = kBarriers + 8 * G;
  static_assert(kShared <= kSharedLimit && kThreads <= 1024 && kOfGroup % 16 == 0);
  static_assert(right ? T % 32 == 0 && G < 16 || T == 32 : T % 32 == 0);

  __device__ static int at(int pair, int q, int c) {
    return right ? (pair * r1 + q) * kStride + c : (q * kStride + c) * pairs + pair;
  }
};

// What stands where in a block's shared memory.
template <class S>
struct Places {
  float2* exchange;  // of the group
  uint32_t* staged;
  unsigned char* addend;  // then its scales
  const float2* table2;   // [R1, kTwiddles2]
  const float2* table3;   // [kTwiddles3 / 2, M3 / 2, 2]
  const float* tangents;  // [R3 / 4, M3 / 2, 4]
  uint32_t landed;        // barrier: the copy of `staged` is there
  int group, thread;

  __device__ explicit Places(unsigned char* shared)
      : group(threadIdx.x / S::T), thread(threadIdx.x % S::T) {
    exchange = reinterpret_cast<float2*>(shared + group * S::kOfGroup);
    staged = reinterpret_cast<uint32_t*>(exchange + S::kExchange);
    addend = reinterpret_cast<unsigned char*>(staged + S::kStaged);
    table2 = reinterpret_cast<const float2*>(shared + S::kTable2);
    table3 = reinterpret_cast<const float2*>(shared + S::kTable3);
    tangents = reinterpret_cast<const float*>(shared + S::kTangents);
    landed = ptx::shared_address(shared + S::kBarriers + group * 8);
  }
  __device__ float* scales() const {
    return reinterpret_cast<float*>(addend + S::kUnit * S::N * S::kAdded);
  }
  __device__ void wait() const {
    if constexpr (S::T == 32) {
      __syncwarp();
    } else if constexpr (S::G == 1) {
      __syncthreads();
    } else {
      ptx::named_wait(1 + group, S::T);
    }
  }
};

// Slot i of column pair h holds frequencies low and n - low; the second column of pair 0 is M3 / 2,
// and its slot 0 holds 0 and n / 2.
template <class S>
__device__ int low_frequency(int h, int i) {
  const int second = h == 0 ? S::M3 / 2 : S::M3 - h;
  return i < S::R3 / 2 ? h + S::M3 * i : second + S::M3 * (S::R3 - 1 - i);
}

template <class S>
__device__ void make_tables(unsigned char* shared) {
  auto* table2 = reinterpret_cast<float2*>(shared + S::kTable2);
  auto* table3 = reinterpret_cast<float2*>(shared + S::kTable3);
  auto* tangents = reinterpret_cast<float*>(shared + S::kTangents);
  for (int i = threadIdx.x; i < S::R1 * S::kTwiddles2; i += S::kThreads) {
    if (i % S::kTwiddles2 >= Radix<S::R2>::kTwiddles) continue;
    const auto [power, turn] = Radix<S::R2>::twiddle(i % S::kTwiddles2);
    table2[i] = root_of_unity<S::R1 * S::R2>(i / S::kTwiddles2 * power + turn * S::R1);
  }
  for (int i = threadIdx.x; i < S::M3 / 2 * S::kTwiddles3; i += S::kThreads) {
    const int h = i / 2 % (S::M3 / 2), twiddle = i / 2 / (S::M3 / 2) * 2 + i % 2;
    const auto [power, turn] = Radix<S::R3>::twiddle(twiddle);
    table3[i] = root_of_unity<S::N>(h * power + turn * S::M3);
  }
  for (int i = threadIdx.x; i < S::N / 2; i += S::kThreads) {
    const int h = i / 4 % (S::M3 / 2), slot = i / 4 / (S::M3 / 2) * 4 + i % 4;
    const float2 turn = root_of_unity<4 * S::N>(low_frequency<S>(h, slot));
    tangents[i] = -turn.y / turn.x;
  }
}

}  // namespace ounce::optim
