// SPDX-License-Identifier: MIT
// p = keep p - lr factor (u q) on Hopper. A warpgroup keeps 64 rows of the left factor (u, or q
// transposed) in registers, whole, and goes along the rows of p in steps of 64 columns; both blocks
// of a cluster share the right factor's. What p it changes comes and goes by the copy engine, each
// warpgroup has stages of its own for that.
//
// Memory is the limit: p is read and written, 4 bytes an element of 16 bits; the products take half
// of that time and the rounding's arithmetic another half, so each step's products run under the
// arithmetic of the step before.
#include <ounce/optim/lowrank_tiles.h>

namespace ounce::optim {
namespace lowrank {
namespace {

constexpr int kBoxBytes = kWarpRows * tma::kRowBytes;

enum class Kind { kNearest16, kStochastic16, kFp32 };

template <int rank, Kind kind>
struct Memory {
  static constexpr bool kWide = kind == Kind::kFp32;
  // Of the factors: 64 rows of the left one for one warpgroup, or 64 columns of the right one.
  static constexpr int kFactorBytes = 64 * rank * 2, kFactors = rank > 128 ? 3 : 4;
  static constexpr int kBoxes = kWide ? 2 : 1;  // side by side in a step
  static constexpr int kWarpBytes = kBoxes * kBoxBytes, kTileBytes = 4 * kWarpBytes;
  static constexpr int kTiles = 65536 / kTileBytes;  // of p, of a warpgroup
  using Factors = Ring<kFactors, kFactorBytes>;
  using Tiles = Ring<kTiles, kTileBytes>;
  static constexpr int kTilesAt = kFactors * kFactorBytes;
  static constexpr int kBarriersAt = kTilesAt + 2 * kTiles * kTileBytes;
  static constexpr int kBytes =
      1024 + kBarriersAt + Factors::kBarrierBytes + 2 * Tiles::kBarrierBytes;
  static_assert(kBytes <= kMemory);

  Factors factors;
  uint32_t base;

  __device__ explicit Memory(const char* raw) {
    base = (ptx::shared_address(raw) + 1023) / 1024 * 1024;
    factors = {base, base + kBarriersAt};
  }
  __device__ Tiles tiles(int group) const {
    return {base + kTilesAt + group * kTiles * kTileBytes,
            base + kBarriersAt + Factors::kBarrierBytes + group * Tiles::kBarrierBytes};
  }
};

struct Arguments {
  const BackprojectMatrix* matrices;
  const float *lr, *skip;
  float decay, weight_decay, factor;
  int pairs, items, clusters, steps;
  uint32_t columns;
};

// ---- fetching

// The factors' stages of a piece: the left one's for each warpgroup, then each step's of the right
// one. q lies with its outer side in rows, u with the inner one.
template <bool right, int rank, class M>
__device__ void fetch_factors(const Arguments& a, const M& memory, int cluster, uint32_t block) {
  const auto& ring = memory.factors;
  constexpr int kHalf = rank / 2;  // of q's rows, in a box
  typename M::Factors::Place place;
  for (Walk walk{a.pairs, cluster}; walk.item < a.items; walk.item += a.clusters) {
    const BackprojectMatrix& matrix = a.matrices[walk.matrix()];
    for (int group = 0; group < 2; ++group, place.next()) {
      ring.claim(place, M::kFactorBytes);
      const int row = walk.row() + static_cast<int>(block) * kBlockRows + group * kGroupRows;
      const uint32_t to = ring.at(place.stage), full = ring.full(place.stage);
      for (int i = 0; i < (right ? rank / 32 : 2); ++i) {
        if constexpr (right) {
          load(to + i * 4096, &matrix.u, i / 2 * 64, row + i % 2 * 32, full);
        } else {
          load(to + i * kHalf * tma::kRowBytes, &matrix.q, row, i * kHalf, full);
        }
      }
    }
    for (int step = 0; step < a.steps; ++step, place.next()) {
      ring.claim(place, M::kFactorBytes);
      const uint32_t to = ring.at(place.stage), full = ring.full(place.stage);
      const int part = static_cast<int>(block);
      if constexpr (right) {
        load_for_both(to + part * kHalf * tma::kRowBytes, &matrix.q, step * kColumns, part * kHalf,
                      full);
      } else {
        for (int box = 0; box < rank / 64; ++box) {
          load_for_both(to + box * 8192 + part * 4096, &matrix.u, box * 64,
                        step * kColumns + part * 32, full);
        }
      }
    }
  }
}

template <class M>
__device__ void fetch_tiles(const Arguments& a, const M& memory, int cluster, uint32_t block,
                            int group) {
  const auto ring = memory.tiles(group);
  typename M::Tiles::Place place;
  for (Walk walk{a.pairs, cluster}; walk.item < a.items; walk.item += a.clusters) {
    const CUtensorMap* p = &a.matrices[walk.matrix()].p;
    const int row = walk.row() + static_cast<int>(block) * kBlockRows + group * kGroupRows;
    for (int step = 0; step < a.steps; ++step, place.next()) {
      ring.claim(place, M::kTileBytes);
      for (int i = 0; i < 4 * M::kBoxes; ++i) {
        load(ring.at(place.stage) + i * kBoxBytes, p,
             step * kColumns + i % M::kBoxes * (kColumns / M::kBoxes),
             row + i / M::kBoxes * kWarpRows, ring.full(place.stage));
      }
    }
  }
}

template <bool right, int rank, class M>
__device__ void fetch(const Arguments& a, const M& memory, int cluster, uint32_t block, int warp,
                      int lane) {
  if (warp == 3) return;
  // Of all matrices, before the first.
  for (int i = lane; i < a.items / a.pairs; i += 32) {
    const BackprojectMatrix& matrix = a.matrices[i];
    if (warp == 0) {
      refresh(&matrix.u);
      refresh(&matrix.q);
    } else {
      refresh(&matrix.p);
    }
  }
  __syncwarp();
  if (lane != 0) return;
  if (warp == 0) {
    fetch_factors<right, rank>(a, memory, cluster, block);
  } else {
    fetch_tiles(a, memory, cluster, block, warp - 1);
  }
}

// ---- multiplying

// The left factor's rows of a warp, from its warpgroup's stage.
template <bool right, int rank>
__device__ void load_left(wgmma::Fragment (&left)[rank / 16], uint32_t stage, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < rank / 16; ++k) {
    if constexpr (right) {
      const int row = warp * 16 + (lane & 15), chunk = k % 4 * 2 + (lane >> 4);
      load_matrices<false>(
          left[k], stage + k / 4 * 8192 + row * tma::kRowBytes + ((chunk ^ (row & 7)) * 16));
    } else {
      const int row = k * 16 + (lane >> 4) * 8 + (lane & 7), chunk = warp * 2 + (lane >> 3 & 1);
      load_matrices<true>(left[k], stage + row * tma::kRowBytes + ((chunk ^ (row & 7)) * 16));
    }
  }
}

struct Scalars {
  float keep, factor;
  uint32_t stream;  // of the odds of rounding: rounding::row_of()
};

// Two neighbours of the same row -> bf16, rounded by the odds of the first's position.
template <Kind kind>
__device__ inline uint32_t round_pair(float x, float y, uint32_t position, uint32_t stream) {
  if constexpr (kind == Kind::kNearest16) return pack(x, y);
  // An even position and the one after it differ in one bit.
  const uint32_t first = position ^ stream, odds = rounding::spread(first) & 0xFFFF,
                 other = rounding::spread(first ^ 1) & 0xFFFF;
  return __byte_perm(__float_as_uint(x) + odds, __float_as_uint(y) + other, 0x7632);
}

// Of a warp's rows of a tile, in place.
template <Kind kind>
__device__ void change(const float (&d)[32], const Scalars& s, uint32_t tile, uint32_t position,
                       uint32_t columns, int lane) {
  if constexpr (kind == Kind::kFp32) {
#pragma unroll
    for (int g = 0; g < 8; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = h * 8 + lane / 4, chunk = g % 4 * 2 + lane % 4 / 2;
        const uint32_t at = tile + g / 4 * kBoxBytes + row * tma::kRowBytes +
                            ((chunk ^ (row & 7)) * 16) + lane % 2 * 8;
        const float2 p = load_float2(at);
        store_float2(at, {fmaf(p.x, s.keep, -s.factor * d[g * 4 + h * 2]),
                          fmaf(p.y, s.keep, -s.factor * d[g * 4 + h * 2 + 1])});
      }
    }
    return;
  }
  const uint32_t row = tile + (lane & 15) * tma::kRowBytes;
#pragma unroll
  for (int g = 0; g < 8; g += 2) {
    const uint32_t at = row + (((g + (lane >> 4)) ^ (lane & 7)) * 16);
    uint32_t p[4];
    load_matrices<false>(p, at);
    float x[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float old = i % 2 == 0 ? low(p[i / 2]) : high(p[i / 2]);
      x[i] = fmaf(old, s.keep, -s.factor * d[g * 4 + i]);
      sum += x[i];
    }
    uint32_t rounded[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rounded[i] = round_pair<kind>(x[i * 2], x[i * 2 + 1],
                                    position + (g + i / 2) * 8 + i % 2 * 8 * columns, s.stream);
    }
    // Odds added to NaN would make a number of it. Infinities stay.
    if (kind == Kind::kStochastic16 && sum != sum) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (x[i] != x[i]) rounded[i / 2] |= i % 2 == 0 ? 0x7FFFu : 0x7FFF0000u;
      }
    }
    ptx::store_matrices(at, rounded[0], rounded[1], rounded[2], rounded[3]);
  }
}

template <Kind kind>
__device__ Scalars scalars_of(const Arguments& a, const BackprojectMatrix& matrix) {
  const float lr = scalar(a.lr, 1);
  Scalars s{a.decay - lr * a.weight_decay, lr * a.factor, 0};
  if constexpr (kind == Kind::kStochastic16) {
    const auto step = static_cast<uint32_t>(static_cast<int64_t>(*matrix.step) + 1);
    s.stream = rounding::row_of(rounding::stream_of(step, matrix.seed), 0);
  }
  return s;
}

// A warp's tiles, one a step.
template <Kind kind, class M>
struct Tiles {
  typename M::Tiles ring;
  typename M::Tiles::Place place;
  int warp, lane, last = -1;  // the stage whose store may be under way

  __device__ void change(const float (&d)[32], const Scalars& s, const CUtensorMap* map,
                         uint32_t columns, int first_row, int column) {
    const uint32_t tile = ring.at(place.stage) + warp * M::kWarpBytes;
    const int row = first_row + warp * kWarpRows;
    ring.wait(place);
    const uint32_t position =
        static_cast<uint32_t>(row + lane / 4) * columns + column + lane % 4 * 2;
    lowrank::change<kind>(d, s, tile, position, columns, lane);
    ptx::fence_shared_for_async();
    __syncwarp();
    if (lane == 0) {
      for (int box = 0; box < M::kBoxes; ++box) {
        store(map, tile + box * kBoxBytes, column + box * (kColumns / M::kBoxes), row);
      }
      tma::commit_stores();
      wait_stores_read<1>();
      if (last >= 0) ptx::arrive(ring.empty(last));
    }
    last = place.stage;
    place.next();
  }
};

template <bool right, int rank, Kind kind, class M>
__device__ void multiply(const Arguments& a, const M& memory, int cluster, uint32_t block,
                         int group, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const auto& ring = memory.factors;
  Tiles<kind, M> tiles{memory.tiles(group), {}, warp, lane};
  typename M::Factors::Place place;
  wgmma::Fragment left[rank / 16];
  float even[32], odd[32];
  for (Walk walk{a.pairs, cluster}; walk.item < a.items; walk.item += a.clusters) {
    const BackprojectMatrix& matrix = a.matrices[walk.matrix()];
    const Scalars s = scalars_of<kind>(a, matrix);
    const int row = walk.row() + static_cast<int>(block) * kBlockRows + group * kGroupRows;
    for (int of = 0; of < 2; ++of, place.next()) {
      ring.wait(place);
      if (of == group) load_left<right, rank>(left, ring.at(place.stage), warp, lane);
      __syncwarp();
      ring.release(place.stage, block);
    }
    const auto begin = [&](float(&d)[32]) {
      ring.wait(place);
      multiply_step<right, rank>(d, left, ring.at(place.stage));
    };
    const auto end = [&](float(&d)[32]) {
      wgmma::wait<0>();
      wgmma::arrived(d);
      ring.release(place.stage, block);
      place.next();
    };
    // A step's products run while the tile of the step before is changed.
    const auto both = [&](float(&before)[32], float(&d)[32], int step) {
      begin(d);
      tiles.change(before, s, &matrix.p, a.columns, row, (step - 1) * kColumns);
      end(d);
    };
    begin(even);
    end(even);
    int step = 1;
    for (; step + 1 < a.steps; step += 2) {
      both(even, odd, step);
      both(odd, even, step + 1);
    }
    both(even, odd, step);
    tiles.change(odd, s, &matrix.p, a.columns, row, step * kColumns);
  }
  if (lane == 0) tma::wait_stores();
}

template <int rank, bool right, Kind kind>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    backproject_tiles(const __grid_constant__ Arguments a) {
  using M = Memory<rank, kind>;
  let_next_come();
  wait_for_previous();
  if (a.skip != nullptr && *a.skip != 0) return;
  extern __shared__ char raw[];
  const M memory(raw);
  const uint32_t block = ptx::block_in_cluster();
  const int cluster = blockIdx.x / 2;
  if (threadIdx.x == 0) {
    memory.factors.init();
    for (int group = 0; group < 2; ++group) memory.tiles(group).init(4);
    ptx::fence_init();
  }
  run_block([&](int warp, int lane) { fetch<right, rank>(a, memory, cluster, block, warp, lane); },
            [&](int group, int thread) {
              multiply<right, rank, kind>(a, memory, cluster, block, group, thread);
            });
}

template <int rank, bool right, Kind kind>
cudaError_t launch(const Arguments& a, cudaStream_t stream) {
  return launch_clusters(backproject_tiles<rank, right, kind>, a, Memory<rank, kind>::kBytes,
                         stream);
}
template <int rank, bool right>
cudaError_t launch(const Backproject& p, const Arguments& a, cudaStream_t stream) {
  if (p.p == Element::kFp32) return launch<rank, right, Kind::kFp32>(a, stream);
  return p.rounding == Rounding::kStochastic ? launch<rank, right, Kind::kStochastic16>(a, stream)
                                             : launch<rank, right, Kind::kNearest16>(a, stream);
}
template <int rank>
cudaError_t launch(const Backproject& p, const Arguments& a, cudaStream_t stream) {
  return p.shape.right ? launch<rank, true>(p, a, stream) : launch<rank, false>(p, a, stream);
}

}  // namespace
}  // namespace lowrank

cudaError_t backproject(const Backproject& p, cudaStream_t stream) {
  using namespace lowrank;
  const auto& shape = p.shape;
  if (!is_valid(shape) || p.matrices == nullptr || p.p == Element::kInt8) {
    return cudaErrorInvalidValue;
  }
  Arguments a{};
  a.matrices = p.matrices;
  a.lr = p.lr;
  a.skip = p.skip;
  a.decay = p.decay;
  a.weight_decay = p.weight_decay;
  a.factor = p.factor;
  a.pairs = static_cast<int>((shape.rows + kPairRows - 1) / kPairRows);
  a.items = a.pairs * shape.count;
  // An even number: what lies outside is read as 0 and not written.
  a.steps = static_cast<int>((shape.columns + 2 * kColumns - 1) / (2 * kColumns) * 2);
  a.columns = static_cast<uint32_t>(shape.columns);
  const auto error = count_clusters(a.items, &a.clusters);
  if (error != cudaSuccess) return error;
  const int rank = padded(shape.rank);
  return rank == 64    ? launch<64>(p, a, stream)
         : rank == 128 ? launch<128>(p, a, stream)
                       : launch<256>(p, a, stream);
}

}  // namespace ounce::optim
