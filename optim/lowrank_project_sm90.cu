// SPDX-License-Identifier: MIT
// a = x q^T on Hopper. A persistent product of tiles [128, rank], the whole rank at once, so that x
// is read once; q comes from the L2 cache, half of each stage for both blocks of a cluster.
//
// Where what a leaves of x is asked for, x comes again behind a tile's last product, backwards, as
// the L2 cache has most of its end. Of rows, a is in registers then, as the left factor of a q. Of
// columns, both warpgroups lay theirs into shared memory, as the right factor of q^T a^T, and take
// turns: so a warp has whole rows of what shares a scale.
//
// Memory is the limit: 2 bytes an element of x; the products take half of that time. What leaves
// has shared memory of its own, so that the next tile's x comes meanwhile.
#include <ounce/optim/lowrank_rest.h>
#include <ounce/optim/lowrank_tiles.h>

namespace ounce::optim {
namespace lowrank {
namespace {

constexpr int kDepth = 64;  // inner indices of a stage
constexpr int kBoxBytes = kRowsAtOnce * tma::kRowBytes;

// Shared memory and its layout. With `whole` a lies there whole, in boxes of 64 columns.
template <int rank, bool whole>
struct Memory {
  static constexpr int kLeftBytes = kBlockRows * kDepth * 2, kStageBytes = kLeftBytes + rank * 128;
  static constexpr int kWholeBoxBytes = kBlockRows * tma::kRowBytes;
  static constexpr int kWholeBytes = whole ? rank / 64 * kWholeBoxBytes : 0;
  // Of a warp: bytes of what is left, or, side by side, its rows of a that leave together.
  static constexpr int kRestBytes = kWarpRows * tma::kRowBytes, kWarps = 2 * kGroup / 32;
  static constexpr int kOutBytes = rank > 128 && !whole ? rank / 64 * kBoxBytes : kRestBytes;
  static constexpr int kRoom = kMemory - 1024 - 256 - kWholeBytes - kWarps * kOutBytes;
  static constexpr int kStages = kRoom / kStageBytes;
  using Ring = lowrank::Ring<kStages, kStageBytes>;
  static constexpr int kWholeAt = kStages * kStageBytes, kOutAt = kWholeAt + kWholeBytes;
  static constexpr int kBarriersAt = kOutAt + kWarps * kOutBytes;
  static constexpr int kBytes = 1024 + kBarriersAt + Ring::kBarrierBytes;
  static_assert(kBytes <= kMemory && (whole || kOutBytes >= rank / 64 * kBoxBytes));

  Ring ring;

  __device__ explicit Memory(const char* raw) {
    ring.data = (ptx::shared_address(raw) + 1023) / 1024 * 1024;
    ring.barriers = ring.data + kBarriersAt;
  }
  __device__ uint32_t left(int stage) const { return ring.at(stage); }
  __device__ uint32_t right(int stage) const { return ring.at(stage) + kLeftBytes; }
  __device__ uint32_t whole_a() const { return ring.data + kWholeAt; }
  __device__ uint32_t out(int warp) const { return ring.data + kOutAt + warp * kOutBytes; }
};

struct Arguments {
  const ProjectMatrix* matrices;
  const float* skip;
  int pairs, items, clusters, steps;
  int boxes;   // copies of a warp's rows of a
  int blocks;  // of a row of what is left
  uint32_t rows, columns;
};

template <bool right, bool rest, class M>
__device__ void fetch(const Arguments& a, const M& memory, int cluster, uint32_t block, int lane) {
  for (int i = lane; i < a.items / a.pairs; i += 32) {
    refresh(&a.matrices[i].gradient);
    refresh(&a.matrices[i].q);
    refresh(&a.matrices[i].out);
    refresh(&a.matrices[i].rest);
  }
  __syncwarp();
  if (lane != 0) return;
  constexpr int kHalf = (M::kStageBytes - M::kLeftBytes) / 2;  // of q
  typename M::Ring::Place place;
  for (Walk walk{a.pairs, cluster}; walk.item < a.items; walk.item += a.clusters) {
    const ProjectMatrix& matrix = a.matrices[walk.matrix()];
    const int outer = walk.row() + static_cast<int>(block) * kBlockRows;
    const auto fetch_step = [&](int step) {
      memory.ring.claim(place, M::kStageBytes);
      const uint32_t full = memory.ring.full(place.stage);
      const int inner = step * kDepth;
      for (int i = 0; i < 2; ++i) {
        const int at = outer + i * kGroupRows;
        load(memory.left(place.stage) + i * kGroupRows * tma::kRowBytes, &matrix.gradient,
             right ? inner : at, right ? at : inner, full);
      }
      load_for_both(memory.right(place.stage) + block * kHalf, &matrix.q, inner,
                    static_cast<int>(block) * (kHalf / tma::kRowBytes), full);
      place.next();
    };
    for (int step = 0; step < a.steps; ++step) fetch_step(step);
    for (int step = rest ? a.steps - 1 : -1; step >= 0; --step) fetch_step(step);
  }
}

template <bool right, class M, int size>
__device__ void multiply_tile(float (&d)[size], const M& memory, typename M::Ring::Place& place,
                              int steps, int group, uint32_t block) {
  int previous = 0;
  for (int step = 0; step < steps; ++step, place.next()) {
    memory.ring.wait(place);
    const auto x =
        wgmma::descriptor(memory.left(place.stage) + group * kGroupRows * tma::kRowBytes);
    const auto q = wgmma::descriptor(memory.right(place.stage));
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      wgmma::multiply<!right, false>(d, x + (right ? 2 : 128) * k, q + 2 * k, 1);
    }
    wgmma::commit();
    if (step > 0) {
      wgmma::wait<1>();
      memory.ring.release(previous, block);
    }
    previous = place.stage;
  }
  wgmma::wait<0>();
  wgmma::arrived(d);
  memory.ring.release(previous, block);
}

// d[4g + 2h + c] is of row 8h + lane / 4 and column 8g + 2 (lane % 4) + c; the rows of one h leave
// together.
template <int size>
__device__ void send(const Arguments& a, const CUtensorMap* map, const float (&d)[size],
                     uint32_t out, int row, int lane) {
  const uint32_t line = lane / 4 * tma::kRowBytes + lane % 4 * 4, swizzle = lane / 4 * 16;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (lane == 0) wait_stores_read<0>();
    __syncwarp();
#pragma unroll
    for (int g = 0; g < size / 4; ++g) {
      store_u32(out + g / 8 * kBoxBytes + line + ((g % 8 * 16) ^ swizzle),
                pack(d[g * 4 + h * 2], d[g * 4 + h * 2 + 1]));
    }
    ptx::fence_shared_for_async();
    __syncwarp();
    if (lane != 0) continue;
    for (int box = 0; box < a.boxes; ++box) {
      store(map, out + box * kBoxBytes, box * 64, row + h * kRowsAtOnce);
    }
    tma::commit_stores();
  }
}

// A warp's rows of what is left, that share scales, as bytes.
__device__ void send_rest(const ProjectMatrix& matrix, const float (&first)[32],
                          const float (&second)[32], float (&largest)[2], const Scales& scales,
                          uint32_t out, int row, int block, int lane) {
  float inverse[2];
  scale_rows(largest, inverse, scales, row, block, lane);
  if (lane == 0) wait_stores_read<0>();
  __syncwarp();
  narrow(first, second, inverse, out, lane);
  ptx::fence_shared_for_async();
  __syncwarp();
  if (lane == 0) {
    store(&matrix.rest, out, block * static_cast<int>(kInt8Block), row);
    tma::commit_stores();
  }
}

// x - a q of a warp's rows of the tile that gave the sums d.
template <int rank, class M>
__device__ void keep_rest(const Arguments& a, const ProjectMatrix& matrix, const M& memory,
                          typename M::Ring::Place& place, const float (&d)[rank / 2], uint32_t out,
                          int row, int group, uint32_t block) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  wgmma::Fragment left[rank / 16];
#pragma unroll
  for (int i = 0; i < rank / 4; ++i) left[i / 4][i % 4] = pack(d[i * 2], d[i * 2 + 1]);
  const auto begin = [&](float(&x)[32]) {
    memory.ring.wait(place);
    multiply_step<true, rank>(x, left, memory.right(place.stage));
    const int stage = place.stage;
    place.next();
    return stage;
  };
  float first[32], second[32], next[32], largest[2] = {};
  const auto end = [&](float(&x)[32], int stage) {
    subtract(x, largest,
             memory.left(stage) + (group * kGroupRows + warp * kWarpRows) * tma::kRowBytes, lane);
    __syncwarp();
    memory.ring.release(stage, block);
  };
  const auto keep = [&](int pair) {  // the second step of it comes first
    send_rest(matrix, second, first, largest, {matrix.scales, a.rows, a.blocks}, out, row, pair,
              lane);
  };
  // A step's products run under the arithmetic of the step before.
  int stage = begin(first);
  wgmma::wait<0>();
  wgmma::arrived(first);
  for (int pair = a.steps / 2 - 1; pair > 0; --pair) {
    const int second_stage = begin(second);
    end(first, stage);
    wgmma::wait<0>();
    wgmma::arrived(second);
    stage = begin(next);
    end(second, second_stage);
    keep(pair);
    wgmma::wait<0>();
    wgmma::arrived(next);
#pragma unroll
    for (int i = 0; i < 32; ++i) first[i] = next[i];
  }
  const int second_stage = begin(second);
  end(first, stage);
  wgmma::wait<0>();
  wgmma::arrived(second);
  end(second, second_stage);
  keep(0);
}

// The same of the columns from `column` on, both warpgroups'.
template <int rank, class M>
__device__ void keep_rest_of_columns(const Arguments& a, const ProjectMatrix& matrix,
                                     const M& memory, typename M::Ring::Place& place,
                                     const float (&d)[rank / 2], int column, int group,
                                     uint32_t block) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t whole = memory.whole_a(), out = memory.out(group * 4 + warp);
  const auto together = [] { ptx::named_wait(1, 2 * kGroup); };
  // Nobody multiplies by the tile before or copies it any more.
  if (lane == 0) wait_stores_read<0>();
  together();
  const uint32_t to = whole + (group * kGroupRows + warp * kWarpRows) * tma::kRowBytes;
#pragma unroll
  for (int g = 0; g < rank / 8; g += 2) {
    const int row = lane & 15, chunk = g % 8 + (lane >> 4);
    ptx::store_matrices(
        to + g / 8 * M::kWholeBoxBytes + row * tma::kRowBytes + ((chunk ^ (row & 7)) * 16),
        pack(d[g * 4], d[g * 4 + 1]), pack(d[g * 4 + 2], d[g * 4 + 3]),
        pack(d[g * 4 + 4], d[g * 4 + 5]), pack(d[g * 4 + 6], d[g * 4 + 7]));
  }
  ptx::fence_shared_for_async();
  together();
  if (lane == 0) {
    for (int box = 0; box < a.boxes; ++box) {
      store(&matrix.out, to + box * M::kWholeBoxBytes, box * 64,
            column + group * kGroupRows + warp * kWarpRows);
    }
    tma::commit_stores();
  }
  const Scales scales = {matrix.scales, static_cast<uint32_t>(column) < a.columns ? a.rows : 0,
                         a.blocks};
  float x[64], largest[2] = {};
  auto& first = reinterpret_cast<float(&)[32]>(x);
  auto& second = reinterpret_cast<float(&)[32]>(x[32]);
  for (int step = a.steps - 1; step >= 0; --step, place.next()) {
    memory.ring.wait(place);
    if (step % 2 == group) {
      wgmma::fence();
#pragma unroll
      for (int k = 0; k < rank / 16; ++k) {
        wgmma::multiply<true>(
            x, wgmma::descriptor(memory.right(place.stage)) + k * 128,
            wgmma::descriptor(whole) + k / 4 * (M::kWholeBoxBytes / 16) + k % 4 * 2, k);
      }
      wgmma::commit();
      wgmma::wait<0>();
      wgmma::arrived(x);
      const uint32_t tile = memory.left(place.stage) + warp * kWarpRows * tma::kRowBytes;
      subtract(first, largest, tile, lane);
      subtract(second, largest, tile + kGroupRows * tma::kRowBytes, lane);
      __syncwarp();
    }
    memory.ring.release(place.stage, block);
    if (step % 2 != group) continue;
    send_rest(matrix, first, second, largest, scales, out, step * kDepth + warp * kWarpRows,
              column / static_cast<int>(kInt8Block), lane);
  }
}

template <bool right, bool rest, int rank, class M>
__device__ void multiply(const Arguments& a, const M& memory, int cluster, uint32_t block,
                         int group, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  typename M::Ring::Place place;
  for (Walk walk{a.pairs, cluster}; walk.item < a.items; walk.item += a.clusters) {
    float d[rank / 2] = {};  // set, so that its registers are free from one tile to the next
    multiply_tile<right>(d, memory, place, a.steps, group, block);
    const int first = walk.row() + static_cast<int>(block) * kBlockRows;
    const ProjectMatrix& matrix = a.matrices[walk.matrix()];
    if constexpr (rest && !right) {
      keep_rest_of_columns<rank>(a, matrix, memory, place, d, first, group, block);
      continue;
    }
    const int row = first + group * kGroupRows + warp * kWarpRows;
    const uint32_t out = memory.out(group * 4 + warp);
    send(a, &matrix.out, d, out, row, lane);
    if constexpr (rest) keep_rest<rank>(a, matrix, memory, place, d, out, row, group, block);
  }
  if (lane == 0) tma::wait_stores();
}

template <int rank, bool right, bool rest>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    project_tiles(const __grid_constant__ Arguments a) {
  using M = Memory<rank, rest && !right>;
  let_next_come();
  wait_for_previous();
  if (a.skip != nullptr && *a.skip != 0) return;
  extern __shared__ char raw[];
  const M memory(raw);
  const uint32_t block = ptx::block_in_cluster();
  const int cluster = blockIdx.x / 2;
  if (threadIdx.x == 0) {
    memory.ring.init();
    ptx::fence_init();
  }
  run_block(
      [&](int warp, int lane) {
        if (warp == 0) fetch<right, rest>(a, memory, cluster, block, lane);
      },
      [&](int group, int thread) {
        multiply<right, rest, rank>(a, memory, cluster, block, group, thread);
      });
}

template <int rank, bool right, bool rest>
cudaError_t launch(const Arguments& a, cudaStream_t stream) {
  using M = Memory<rank, rest && !right>;
  return launch_clusters(project_tiles<rank, right, rest>, a, M::kBytes, stream);
}
template <int rank>
cudaError_t launch(const Project& p, const Arguments& a, cudaStream_t stream) {
  if (p.shape.right)
    return p.rest ? launch<rank, true, true>(a, stream) : launch<rank, true, false>(a, stream);
  return p.rest ? launch<rank, false, true>(a, stream) : launch<rank, false, false>(a, stream);
}

}  // namespace
}  // namespace lowrank

cudaError_t project(const Project& p, cudaStream_t stream) {
  using namespace lowrank;
  const auto& shape = p.shape;
  if (!is_valid(shape) || p.matrices == nullptr || (p.rest && !can_keep_rest(shape))) {
    return cudaErrorInvalidValue;
  }
  Arguments a{};
  a.matrices = p.matrices;
  a.skip = p.skip;
  a.rows = static_cast<uint32_t>(shape.rows);
  a.columns = static_cast<uint32_t>(shape.columns);
  a.blocks = static_cast<int>((shape.columns + kInt8Block - 1) / kInt8Block);
  a.pairs = static_cast<int>((shape.longer() + kPairRows - 1) / kPairRows);
  a.items = a.pairs * shape.count;
  const auto error = count_clusters(a.items, &a.clusters);
  if (error != cudaSuccess) return error;
  a.steps = static_cast<int>((shape.n() + kDepth - 1) / kDepth);
  // Whole blocks: what lies outside is read as 0 and not written.
  if (p.rest && shape.right) a.steps = 2 * a.blocks;
  a.boxes = p.rest && !shape.right ? (shape.rank + 63) / 64 : copies_of(shape.rank).count;
  const int rank = padded(shape.rank);
  return rank == 64    ? launch<64>(p, a, stream)
         : rank == 128 ? launch<128>(p, a, stream)
                       : launch<256>(p, a, stream);
}

}  // namespace ounce::optim
