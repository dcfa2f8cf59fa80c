// SPDX-License-Identifier: MIT
// What persistent GEMMs share: a ring of stages that one warp fills with the copy engine, and two
// warpgroups that multiply tiles of 128 rows in turn, so that one's epilogue runs under the other's
// products. Blocks come in clusters of two. For .cu files.
#pragma once

#include <cuda_runtime.h>
#include <ounce/kernels/common/ptx.h>
#include <ounce/kernels/common/wgmma.h>

#include <cstdint>

namespace ounce::tiles {

constexpr int kGroup = 128;  // threads
constexpr int kThreads = 3 * kGroup;
constexpr int kRows = 128, kDepth = 64;         // of a tile; of a stage
constexpr int kLanes = 2;                       // warpgroups of a block that take its tiles in turn
constexpr int kBoxColumns = 64;                 // of a tile, copied at once
constexpr int kLeftBytes = kRows * kDepth * 2;  // of a stage: A

// A place in the ring, and the parity of its turn.
template <int stages>
struct Place {
  int stage;
  uint32_t phase;

  __device__ explicit Place(int position)
      : stage(position % stages), phase(static_cast<uint32_t>(position / stages) & 1) {}
  __device__ void next() {
    if (++stage < stages) return;
    stage = 0;
    phase ^= 1;
  }
};

// A block's shared memory: stages of the two operands, `out_bytes` of output, the stages' barriers.
template <int columns, int stages, int out_bytes>
struct Ring {
  static constexpr int kRightBytes = columns * kDepth * 2;  // of a stage: B
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kOutAt = stages * kStageBytes;
  static constexpr int kFullAt = kOutAt + out_bytes;
  static constexpr int kEmptyAt = kFullAt + stages * 8;
  static constexpr int kBytes = kEmptyAt + stages * 8 + 1024;  // to begin at a multiple of 1024
  using Place = tiles::Place<stages>;

  uint32_t base;

  __device__ explicit Ring(const char* memory)
      : base((ptx::shared_address(memory) + 1023) / 1024 * 1024) {}

  __device__ uint32_t left(int stage) const { return base + stage * kStageBytes; }
  __device__ uint32_t right(int stage) const { return left(stage) + kLeftBytes; }
  __device__ uint32_t out() const { return base + kOutAt; }
  __device__ uint32_t full(int stage) const { return base + kFullAt + stage * 8; }
  __device__ uint32_t empty(int stage) const { return base + kEmptyAt + stage * 8; }

  // By all threads of the cluster.
  __device__ void start() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        ptx::init(full(i), 1);
        ptx::init(empty(i), 2);
      }
      ptx::fence_init();
    }
    ptx::cluster_sync();
  }
  // Until a stage is empty in both blocks; then it waits for all of its bytes.
  __device__ void claim(const Place& place) const {
    ptx::wait(empty(place.stage), place.phase ^ 1);
    ptx::arrive_and_expect(full(place.stage), kStageBytes);
  }
};

// A thread's four rows of a tile: [half of 64 rows][8 rows further].
using Rows = float[2][2];
template <int columns>
using Accumulators = float[2][columns / 2];

struct Lane {
  int warp, lane;
  __device__ int row(int half, int h) const { return half * 64 + warp * 16 + h * 8 + lane / 4; }
  __device__ int column(int g, int c) const { return g * 8 + (lane & 3) * 2 + c; }
};

template <int n, class F>
__device__ void each_element(float (&d)[2][n], const F& f) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int g = 0; g < n / 4; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int c = 0; c < 2; ++c) f(d[half][g * 4 + h * 2 + c], half, g, h, c);
      }
    }
  }
}

// A block's work: one thread runs fetch(), two warpgroups run multiply().
template <class Memory, class Fetch, class Multiply>
__device__ void run_block(Memory memory, const Fetch& fetch, const Multiply& multiply) {
  memory.start();
  // Together what the block was launched with: 3 x 168.
  if (threadIdx.x < kGroup) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) fetch();
  } else {
    ptx::take_registers<232>();
    multiply();
  }
  // A block's memory and barriers are used by the other one until both are through.
  ptx::cluster_sync();
}

template <class Memory, class Arguments>
cudaError_t launch_clusters(void (*kernel)(Arguments), const Arguments& a, int clusters,
                            cudaStream_t stream) {
  // An attribute is of the current device.
  const auto allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Memory::kBytes);
  if (allowed != cudaSuccess) return allowed;
  kernel<<<2 * clusters, kThreads, Memory::kBytes, stream>>>(a);
  return cudaGetLastError();
}

// Of the named barriers: the turn of a warpgroup to multiply.
constexpr int kMultiplyTurn = 1;

// One tile's products, over `steps` stages in ring order from `position` on; none leaves d alone.
// multiply_stage(stage, add) issues those of a stage.
template <int n, class Memory, class F>
__device__ void multiply_tile(float (&d)[2][n], Memory memory, int position, int steps,
                              uint32_t block, const F& multiply_stage) {
  const int thread = threadIdx.x % kGroup;
  typename Memory::Place place(position);
  int previous = 0;
  // To the blocks that fetch into this stage.
  const auto release = [&] {
    if (thread == 0) ptx::arrive(memory.empty(previous));
    if (thread == 32) ptx::arrive_at(memory.empty(previous), block ^ 1);
  };
  for (int step = 0; step < steps; ++step) {
    ptx::wait(memory.full(place.stage), place.phase);
    wgmma::fence();
    multiply_stage(place.stage, step > 0);
    wgmma::commit();
    if (step > 0) {
      wgmma::wait<1>();
      release();
    }
    previous = place.stage;
    place.next();
  }
  const int other = 2 - threadIdx.x / kGroup;
  ptx::named_arrive(kMultiplyTurn + other, 2 * kGroup);
  wgmma::wait<0>();
  if (steps > 0) release();
}

}  // namespace ounce::tiles
