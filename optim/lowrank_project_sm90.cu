// SPDX-License-Identifier: MIT
// a = scale x q^T, and Adam on it, on Hopper. A persistent product of tiles [128, rank], the whole
// rank at once, so that x is read once and a stays in registers. A tile's m and v follow its last
// products through the same stages: 8 rows of a warp's, whole, because columns change places in a
// row. What becomes of them takes their place and goes back to memory from there.
//
// Memory is the limit: 2 bytes an element of x, and 10 (16-bit moments) or 18 an element of a; the
// products take half of that time. While a block works on m and v it reads no x, so the shorter
// that work, the better. Fetching x, m or v into the L2 cache ahead of time made it longer.
#include <ounce/optim/lowrank_tiles.h>

#include <cmath>
#include <type_traits>

namespace ounce::optim {
namespace lowrank {
namespace {

constexpr int kDepth = 64;  // inner indices of a stage
constexpr int kBoxBytes = kRowsAtOnce * tma::kRowBytes;
constexpr uint32_t kNew = 0x8000;  // as the place of a column: it was not there

enum class Finish { kPlain16, kPlain32, kAdam16, kAdam32 };  // bits of the output, of m and v

// Shared memory and its layout.
template <int rank, Finish finish>
struct Memory {
  static constexpr bool kAdam = finish == Finish::kAdam16 || finish == Finish::kAdam32;
  static constexpr bool kWide = finish == Finish::kPlain32 || finish == Finish::kAdam32;
  static constexpr int kLeftBytes = kBlockRows * kDepth * 2, kStageBytes = kLeftBytes + rank * 128;
  static constexpr int kStages = 196608 / kStageBytes;
  // Of m or v, or of a that is not 16 bits: a warp's rows, in boxes side by side.
  static constexpr int kBoxColumns = tma::kRowBytes / (kWide ? 4 : 2);
  static constexpr int kStateBytes = rank / kBoxColumns * kBoxBytes;
  // A warp's part of a stage: m, v, and room for what becomes of m. Then v goes where m was, and
  // the output where v was.
  static constexpr int kVAt = kAdam ? kStateBytes : 0, kRoomAt = 2 * kVAt;
  static constexpr int kWarpBytes = kRoomAt + kStateBytes;
  static constexpr int kOwners = kAdam && kWide ? 2 : 4;  // warps that share a stage
  static_assert(kOwners * kWarpBytes <= kStageBytes);
  static constexpr int kStagesAtOnce = 8 / kOwners;  // in which every warp has its rows

  static constexpr int kTableBytes = rank * 6;  // of a warpgroup: places of columns, new ones' v
  // The stages that hold m and v have barriers of their own, so that no warp waits for others'
  // rows.
  static constexpr int kStates = 2 * kStagesAtOnce;
  using Ring = lowrank::Ring<kStages, kStageBytes>;
  static constexpr int kBytes =
      1024 + kStages * kStageBytes + 2 * kTableBytes + Ring::kBarrierBytes + kStates * 16;
  static_assert(kBytes <= kMemory && kTableBytes % 16 == 0);

  Ring ring;
  uint32_t tables;

  __device__ explicit Memory(const char* raw) {
    ring.data = (ptx::shared_address(raw) + 1023) / 1024 * 1024;
    tables = ring.data + kStages * kStageBytes;
    ring.barriers = tables + 2 * kTableBytes;
  }
  __device__ uint32_t left(int stage) const { return ring.at(stage); }
  __device__ uint32_t right(int stage) const { return ring.at(stage) + kLeftBytes; }
  __device__ uint32_t state_full(int i) const {
    return ring.barriers + Ring::kBarrierBytes + i * 16;
  }
  __device__ uint32_t state_empty(int i) const { return state_full(i) + 8; }
  __device__ int state_stage(const typename Ring::Place& place, int i) const {
    return (place.stage + i) % kStages;
  }
  __device__ void init() const {
    ring.init();
    for (int i = 0; i < kStates; ++i) {
      ptx::init(state_full(i), 1);
      ptx::init(state_empty(i), (32 + 1) * kOwners);  // lanes here, and warps of the other block
    }
  }
  __device__ uint32_t table(int group) const { return tables + group * kTableBytes; }
};

template <int n>
using Number = std::integral_constant<int, n>;

struct Arguments {
  const ProjectMatrix* matrices;
  const float *scale, *skip;
  float beta1, beta2, rest1, root_rest2, log_beta1, log_beta2, eps;  // rest: 1 - beta
  float longer;
  int pairs, items, clusters, steps, rank;
  int boxes, wide;  // copies of a warp's rows of m or v, and the boxes in each
  int out_boxes;
  int64_t out_bytes, a_bytes;  // of a matrix; 0: not written
};

// ---- fetching

template <bool right>
__device__ void each_box_of_x(const Walk& walk, int step, uint32_t block,
                              const auto& f) {  // f(place in the stage, column, row)
  const int outer = walk.row() + static_cast<int>(block) * kBlockRows, inner = step * kDepth;
  for (int i = 0; i < 2; ++i) {
    const int at = outer + i * kGroupRows;
    f(i * kGroupRows * tma::kRowBytes, right ? inner : at, right ? at : inner);
  }
}

template <bool right, class M>
__device__ void fetch_tile(const Arguments& a, const M& memory, typename M::Ring::Place& place,
                           const Walk& walk, uint32_t turn, uint32_t block) {
  const ProjectMatrix& matrix = a.matrices[walk.matrix()];
  constexpr int kHalf = (M::kStageBytes - M::kLeftBytes) / 2;  // of q
  const int block_row = walk.row() + static_cast<int>(block) * kBlockRows;
  for (int step = 0; step < a.steps; ++step, place.next()) {
    // The last of the tile before that was in this stage.
    if (step < M::kStages && step < M::kStates) {
      const int state = step + (M::kStates - 1 - step) / M::kStages * M::kStages;
      ptx::wait(memory.state_empty(state), turn ^ 1);
    }
    memory.ring.claim(place, M::kStageBytes);
    const uint32_t full = memory.ring.full(place.stage);
    each_box_of_x<right>(walk, step, block, [&](int at, int column, int row) {
      load(memory.left(place.stage) + at, &matrix.gradient, column, row, full);
    });
    load_for_both(memory.right(place.stage) + block * kHalf, &matrix.q, step * kDepth,
                  static_cast<int>(block) * (kHalf / tma::kRowBytes), full);
  }
  // The rows of m and v that the epilogue takes at once, the warpgroups in turn.
  const uint32_t bytes = M::kAdam ? 2 * M::kOwners * a.boxes * a.wide * kBoxBytes : 0;
  for (int i = 0; i < M::kStates; ++i) ptx::wait(memory.state_empty(i), turn ^ 1);
  auto there = place;
  for (int i = 0; i < M::kStates; ++i, there.next()) {
    const int h = i / M::kStagesAtOnce, group = i % 2, part = i % M::kStagesAtOnce / 2;
    if (i >= M::kStages) ptx::wait(memory.state_empty(i - M::kStages), turn);
    if (i < M::kStages) memory.ring.wait_empty(there);
    ptx::arrive_and_expect(memory.state_full(i), bytes);
    if constexpr (!M::kAdam) continue;
    const uint32_t full = memory.state_full(i);
    for (int owner = 0; owner < M::kOwners; ++owner) {
      const uint32_t to = memory.ring.at(there.stage) + owner * M::kWarpBytes;
      const int row =
          block_row + group * kGroupRows + (part * M::kOwners + owner) * 16 + h * kRowsAtOnce;
      for (int box = 0; box < a.boxes; ++box) {
        load(to + box * kBoxBytes, &matrix.m, box * M::kBoxColumns, row, full);
        load(to + M::kVAt + box * kBoxBytes, &matrix.v, box * M::kBoxColumns, row, full);
      }
    }
  }
}

template <bool right, class M>
__device__ void fetch(const Arguments& a, const M& memory, int cluster, uint32_t block, int lane) {
  for (Walk walk{a.pairs, cluster + lane * a.clusters}; walk.item < a.items;
       walk.item += 32 * a.clusters) {
    const ProjectMatrix& matrix = a.matrices[walk.matrix()];
    refresh(&matrix.gradient);
    refresh(&matrix.q);
    refresh(&matrix.out);
    refresh(&matrix.a);
    refresh(&matrix.m);
    refresh(&matrix.v);
  }
  __syncwarp();
  if (lane != 0) return;
  typename M::Ring::Place place;
  uint32_t turn = 0;
  for (Walk walk{a.pairs, cluster}; walk.item < a.items; walk.item += a.clusters, turn ^= 1) {
    fetch_tile<right>(a, memory, place, walk, turn, block);
  }
}

// ---- multiplying

// Of a warp: where its lane's rows and columns are. d[4g + 2h + c] is of row 8h + lane / 4 and
// column 8g + 2 (lane % 4) + c; the rows of one h are in shared memory together.
struct Lane {
  int lane;

  __device__ uint32_t row() const { return lane / 4 * tma::kRowBytes; }
  __device__ uint32_t swizzle() const { return lane / 4 * 16; }
  // From the first byte of the rows to columns 8 (first + i) + 2 (lane % 4), first a multiple of 8:
  // the part that is the same for all `first` apart.
  __device__ uint32_t pair16(int first, int i) const {
    return first / 8 * kBoxBytes + (row() + lane % 4 * 4 + ((i * 16) ^ swizzle()));
  }
  __device__ uint32_t pair32(int first, int i) const {
    return (first / 4 + i / 4) * kBoxBytes +
           (row() + lane % 2 * 8 + ((i % 4 * 32 + lane % 4 / 2 * 16) ^ swizzle()));
  }
};

template <bool wide>
__device__ void store_pair(uint32_t rows, const Lane& at, int first, int i, float2 x) {
  if constexpr (wide) {
    store_float2(rows + at.pair32(first, i), x);
  } else {
    store_u32(rows + at.pair16(first, i), pack(x.x, x.y));
  }
}

// What a column needs of the choice before: where in a warp's rows it was, and if it was not, v.
struct Column {
  int source;
  float squares;

  __device__ void ask(const ProjectMatrix& matrix, int j, int rank) {
    source = -1;
    squares = 0;
    if (j >= rank) return;
    source = matrix.source == nullptr ? j : matrix.source[j];
    if (matrix.squares == nullptr) return;
    squares = matrix.squares[matrix.chosen == nullptr ? j : matrix.chosen[j]];
  }
  __device__ bool fresh(int rank) const { return source < 0 || source >= rank; }
  template <class M>
  __device__ uint32_t place(int rank) const {
    if (fresh(rank)) return kNew;
    constexpr int size = M::kWide ? 4 : 2;
    return source / M::kBoxColumns * kBoxBytes + source % M::kBoxColumns * size;
  }
};

template <bool wide>
__device__ float2 load_pair(uint32_t rows, const Lane& at, int first, int i) {
  if constexpr (wide) return load_float2(rows + at.pair32(first, i));
  const uint32_t pair = load_u32(rows + at.pair16(first, i));
  return {low(pair), high(pair)};
}

// So many g at a time, of which a lane takes two columns each: their places and new ones' v lie
// together.
constexpr int kTaken = 8, kColumnsTaken = 2 * kTaken;
__device__ inline int in_table(int column) {
  const int g = column / 8;
  return (g / kTaken * 4 + column % 8 / 2) * kColumnsTaken + g % kTaken * 2 + column % 2;
}

__device__ inline bool is_new(uint32_t places, int i) {
  return (places & (i % 2 == 0 ? kNew : kNew << 16)) != 0;
}

// m or v of the columns that a lane takes, from where they were; zeros where they were not.
template <bool wide>
__device__ void gather(float (&x)[kColumnsTaken], uint32_t rows, uint32_t places, const Lane& at) {
  const uint32_t base = rows + at.row(), swizzle = at.swizzle();
  uint32_t pairs[kTaken];
#pragma unroll
  for (int i = 0; i < kTaken; i += 4) load_four(pairs + i, places + i * 4);
#pragma unroll
  for (int i = 0; i < kColumnsTaken; ++i) {
    const uint32_t place = i % 2 == 0 ? pairs[i / 2] : pairs[i / 2] >> 16;
    const uint32_t address = base + ((place & (kNew - 1)) ^ swizzle);
    x[i] = wide ? load_float(address) : low(load_u16(address));
  }
#pragma unroll
  for (int i = 0; i < kColumnsTaken; ++i) {
    if (is_new(pairs[i / 2], i)) x[i] = 0;
  }
}

__device__ void send(const CUtensorMap* map, uint32_t from, int row, int boxes, int box_columns) {
  for (int box = 0; box < boxes; ++box) {
    store(map, from + box * kBoxBytes, box * box_columns, row);
  }
}

// Of a warp that wrote them; then their shared memory may be used again.
__device__ void send_rows(const Lane& at, const auto& send_all) {
  ptx::fence_shared_for_async();
  __syncwarp();
  if (at.lane == 0) {
    send_all();
    tma::commit_stores();
    wait_stores_read<0>();
  }
  __syncwarp();
}

struct AdamScalars {
  float scale;
  float of_m, of_v;       // times a: what is added to m; whose square is added to v
  float inverse1, root2;  // 1 / (1 - beta1^t); the root of 1 / (1 - beta2^t)
  uint32_t m_row, v_row;  // of how they are rounded: rounding::row_of()
};

// A pair of m or v; `position`: of the row's first element.
template <bool wide>
__device__ void keep_pair(uint32_t rows, const Lane& at, int first, int i, float2 x, uint32_t row,
                          uint32_t position) {
  if constexpr (wide) {
    store_pair<true>(rows, at, first, i, x);
  } else {
    const uint32_t here = position + 8 * (first + i) + at.lane % 4 * 2;
    store_u32(rows + at.pair16(first, i),
              rounding::to_bf16(x.x, row, here) | rounding::to_bf16(x.y, row, here + 1) << 16);
  }
}

__device__ inline float direction_of(const Arguments& a, const AdamScalars& s, float m, float v) {
  float root, inverse;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaf(root, s.root2, a.eps)));
  return m * s.inverse1 * inverse;
}

// To the zeros of columns' v what new ones begin with.
__device__ inline void add_fresh(float (&v)[kColumnsTaken], uint32_t fresh) {
  uint32_t x[kColumnsTaken];
#pragma unroll
  for (int i = 0; i < kColumnsTaken; i += 4) load_four(x + i, fresh + i * 4);
#pragma unroll
  for (int i = 0; i < kColumnsTaken; ++i) v[i] += __uint_as_float(x[i]);
}

// a times `scale` of the columns that a lane takes from g = first on. Registers have no addresses:
// a case for each.
template <int h, int size>
__device__ void pick(float (&x)[kColumnsTaken], const float (&d)[size], float scale, int first) {
  const auto take = [&](auto part) {
    constexpr int at = decltype(part)::value % (size / 4 / kTaken) * kTaken * 4;
#pragma unroll
    for (int i = 0; i < kColumnsTaken; ++i) x[i] = d[at + i / 2 * 4 + h * 2 + i % 2] * scale;
  };
  switch (first / kTaken) {
    case 0:
      take(Number<0>{});
      break;
    case 1:
      take(Number<1>{});
      break;
    case 2:
      take(Number<2>{});
      break;
    default:
      take(Number<3>{});
  }
}

// Of one h, with a in d: what m and v become, then the direction. Loops, as the code of all columns
// at once would not fit into the instruction cache.
template <class M, int h, int size>
__device__ void adam(const Arguments& a, const AdamScalars& s, const float (&d)[size],
                     uint32_t rows, uint32_t table, uint32_t position, const Lane& at) {
  constexpr int kPairs = size / 4;
  const uint32_t m = rows, v = rows + M::kVAt, room = rows + M::kRoomAt;
  const uint32_t places = table + at.lane % 4 * (kColumnsTaken * 2),
                 fresh = table + size * 4 + at.lane % 4 * (kColumnsTaken * 4);
#pragma unroll 1
  for (int first = 0; first < kPairs; first += kTaken) {
    float x[kColumnsTaken], old[kColumnsTaken];
    gather<M::kWide>(old, m, places + first * 16, at);
    pick<h>(x, d, s.of_m, first);
#pragma unroll
    for (int i = 0; i < kColumnsTaken; ++i) old[i] = fmaf(a.beta1, old[i], x[i]);
#pragma unroll
    for (int i = 0; i < kTaken; ++i) {
      keep_pair<M::kWide>(room, at, first, i, {old[i * 2], old[i * 2 + 1]}, s.m_row, position);
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < kPairs; first += kTaken) {
    float x[kColumnsTaken], old[kColumnsTaken];
    gather<M::kWide>(old, v, places + first * 16, at);
    add_fresh(old, fresh + first * 32);
    pick<h>(x, d, s.of_v, first);
#pragma unroll
    for (int i = 0; i < kColumnsTaken; ++i) old[i] = fmaf(x[i], x[i], a.beta2 * old[i]);
#pragma unroll
    for (int i = 0; i < kTaken; ++i) {
      keep_pair<M::kWide>(m, at, first, i, {old[i * 2], old[i * 2 + 1]}, s.v_row, position);
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < kPairs; first += kTaken) {
    float2 new_m[kTaken], new_v[kTaken];
#pragma unroll
    for (int i = 0; i < kTaken; ++i) {
      new_m[i] = load_pair<M::kWide>(room, at, first, i);
      new_v[i] = load_pair<M::kWide>(m, at, first, i);
    }
#pragma unroll
    for (int i = 0; i < kTaken; ++i) {
      store_pair<false>(
          v, at, first, i,
          {direction_of(a, s, new_m[i].x, new_v[i].x), direction_of(a, s, new_m[i].y, new_v[i].y)});
    }
  }
}

template <bool wide, int h, int size>
__device__ void send_a(const Arguments& a, const CUtensorMap* map, float scale,
                       const float (&d)[size], uint32_t out, int row, const Lane& at) {
#pragma unroll
  for (int g = 0; g < size / 4; ++g) {
    store_pair<wide>(out, at, g / 8 * 8, g % 8,
                     {d[g * 4 + h * 2] * scale, d[g * 4 + h * 2 + 1] * scale});
  }
  send_rows(at, [&] { send(map, out, row, a.out_boxes, wide ? 32 : 64); });
}

// Of one h: everything up to where the results are in memory. Each warp goes its own way.
template <class M, int h, int size>
__device__ void finish_rows(const Arguments& a, const M& memory,
                            const typename M::Ring::Place& place, const ProjectMatrix& matrix,
                            const AdamScalars& s, const float (&d)[size], int group, int thread,
                            int first_row, uint32_t turn, uint32_t block) {
  const int warp = thread / 32, i = h * M::kStagesAtOnce + warp / M::kOwners * 2 + group;
  const Lane at{thread % 32};
  ptx::wait(memory.state_full(i), turn);
  const uint32_t rows =
      memory.ring.at(memory.state_stage(place, i)) + warp % M::kOwners * M::kWarpBytes;
  const int row = first_row + warp * 16 + h * kRowsAtOnce;
  const uint32_t room = rows + M::kRoomAt;
  if constexpr (M::kAdam) {
    if (a.a_bytes > 0) send_a<false, h>(a, &matrix.a, s.scale, d, room, row, at);
    adam<M, h>(a, s, d, rows, memory.table(group),
               static_cast<uint32_t>(row + at.lane / 4) * a.rank, at);
    send_rows(at, [&] {
      send(&matrix.m, room, row, a.boxes, M::kBoxColumns);
      send(&matrix.v, rows, row, a.boxes, M::kBoxColumns);
      send(&matrix.out, rows + M::kVAt, row, a.out_boxes, 64);
    });
  } else {
    send_a<M::kWide, h>(a, &matrix.out, s.scale, d, room, row, at);
  }
  ptx::arrive(memory.state_empty(i));
  if (at.lane == 0) ptx::arrive_at(memory.state_empty(i), block ^ 1);
}

// Of the named barriers: what a warpgroup's own threads wait for.
__device__ void wait_for_group(int group) { ptx::named_wait(1 + group, kGroup); }

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
      wgmma::multiply<!right, false>(d, x + (right ? 2 : 128) * k, q + 2 * k, step | k);
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

template <bool right, int rank, class M>
__device__ void multiply(const Arguments& a, const M& memory, int cluster, uint32_t block,
                         int group, int thread) {
  float d[rank / 2];
  typename M::Ring::Place place;
  uint32_t turn = 0;
  for (Walk walk{a.pairs, cluster}; walk.item < a.items; walk.item += a.clusters, turn ^= 1) {
    const ProjectMatrix& matrix = a.matrices[walk.matrix()];
    AdamScalars s{};
    s.scale = scalar(a.scale, 1);
    constexpr int kColumns = (rank + kGroup - 1) / kGroup;
    Column columns[kColumns];  // asked for early: they come under the products
    float step = 0;
    if constexpr (M::kAdam) {
      step = *matrix.step;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) columns[i].ask(matrix, thread + i * kGroup, a.rank);
    }
    multiply_tile<right>(d, memory, place, a.steps, group, block);
    if constexpr (M::kAdam) {
      s.inverse1 = __fdividef(-1, expm1f((step + 1) * a.log_beta1));
      s.root2 = rsqrtf(-expm1f((step + 1) * a.log_beta2));
      s.of_m = a.rest1 * s.scale;
      s.of_v = a.root_rest2 * s.scale;
      const auto t = static_cast<uint32_t>(step + 1);
      s.m_row = rounding::row_of(rounding::stream_of(t, matrix.seed + kExpAvgSeed), 0);
      s.v_row = rounding::row_of(rounding::stream_of(t, matrix.seed + kExpAvgSqSeed), 0);
      const float seen = -expm1f(step * a.log_beta2) * s.scale * s.scale / a.longer;
      const uint32_t table = memory.table(group);
      wait_for_group(group);  // the tile before is through with it
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int j = thread + i * kGroup;
        if (j >= rank) continue;
        const float fresh = columns[i].fresh(a.rank) ? columns[i].squares * seen : 0;
        store_u16(table + in_table(j) * 2, columns[i].template place<M>(a.rank));
        store_u32(table + rank * 2 + in_table(j) * 4, __float_as_uint(fresh));
      }
      wait_for_group(group);
    }
    const int row = walk.row() + static_cast<int>(block) * kBlockRows + group * kGroupRows;
    finish_rows<M, 0>(a, memory, place, matrix, s, d, group, thread, row, turn, block);
    finish_rows<M, 1>(a, memory, place, matrix, s, d, group, thread, row, turn, block);
  }
  if (thread % 32 == 0) tma::wait_stores();
}

// Where the step is skipped.
__device__ void clear(const Arguments& a) {
  const int64_t out = a.out_bytes / 16, all = out + a.a_bytes / 16;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int i = 0; i < a.items / a.pairs; ++i) {
    const ProjectMatrix& matrix = a.matrices[i];
    for (int64_t j = first; j < all; j += stride) {
      auto* to = j < out ? static_cast<int4*>(matrix.out_data) + j
                         : static_cast<int4*>(matrix.a_data) + (j - out);
      *to = {0, 0, 0, 0};
    }
  }
}

template <int rank, bool right, Finish finish>
__global__ void __cluster_dims__(2) __launch_bounds__(kThreads, 1)
    project_tiles(const __grid_constant__ Arguments a) {
  using M = Memory<rank, finish>;
  let_next_come();
  wait_for_previous();
  if (a.skip != nullptr && *a.skip != 0) {
    clear(a);
    return;
  }
  extern __shared__ char raw[];
  const M memory(raw);
  const uint32_t block = ptx::block_in_cluster();
  const int cluster = blockIdx.x / 2;
  if (threadIdx.x == 0) {
    memory.init();
    ptx::fence_init();
  }
  run_block(
      [&](int warp, int lane) {
        if (warp == 0) fetch<right>(a, memory, cluster, block, lane);
      },
      [&](int group, int thread) {
        multiply<right, rank>(a, memory, cluster, block, group, thread);
      });
}

template <int rank, bool right, Finish finish>
cudaError_t launch(const Arguments& a, cudaStream_t stream) {
  return launch_clusters(project_tiles<rank, right, finish>, a, Memory<rank, finish>::kBytes,
                         stream);
}
template <int rank, bool right>
cudaError_t launch(const ProjectHow& how, const Arguments& a, cudaStream_t stream) {
  if (how.adam) {
    return how.state == Element::kFp32 ? launch<rank, right, Finish::kAdam32>(a, stream)
                                       : launch<rank, right, Finish::kAdam16>(a, stream);
  }
  return how.out == Element::kFp32 ? launch<rank, right, Finish::kPlain32>(a, stream)
                                   : launch<rank, right, Finish::kPlain16>(a, stream);
}
template <int rank>
cudaError_t launch(const Project& p, const Arguments& a, cudaStream_t stream) {
  return p.shape.right ? launch<rank, true>(p.how, a, stream)
                       : launch<rank, false>(p.how, a, stream);
}

}  // namespace
}  // namespace lowrank

cudaError_t project(const Project& p, cudaStream_t stream) {
  using namespace lowrank;
  const auto& shape = p.shape;
  if (!is_valid(shape) || p.matrices == nullptr) return cudaErrorInvalidValue;
  Arguments a{};
  a.matrices = p.matrices;
  a.scale = p.scale;
  a.skip = p.skip;
  a.beta1 = static_cast<float>(p.beta1);
  a.beta2 = static_cast<float>(p.beta2);
  a.rest1 = static_cast<float>(1 - p.beta1);
  a.root_rest2 = static_cast<float>(std::sqrt(1 - p.beta2));
  // Times no step at all it is 0, for beta = 0 too.
  a.log_beta1 = static_cast<float>(std::max(std::log(p.beta1), -1e30));
  a.log_beta2 = static_cast<float>(std::max(std::log(p.beta2), -1e30));
  a.eps = static_cast<float>(p.eps);
  a.longer = static_cast<float>(shape.longer());
  a.pairs = static_cast<int>((shape.longer() + kPairRows - 1) / kPairRows);
  a.items = a.pairs * shape.count;
  const auto error = count_clusters(a.items, &a.clusters);
  if (error != cudaSuccess) return error;
  a.steps = static_cast<int>((shape.n() + kDepth - 1) / kDepth);
  a.rank = shape.rank;
  const auto out = p.how.adam ? Element::kBf16 : p.how.out;
  const Copies states = copies_of(shape.rank, p.how.state), outs = copies_of(shape.rank, out);
  a.boxes = states.count;
  a.wide = states.wide;
  a.out_boxes = outs.count;
  const int64_t elements = shape.longer() * shape.rank;
  a.out_bytes = elements * (out == Element::kFp32 ? 4 : 2);
  a.a_bytes = p.how.adam && p.how.keep_a ? elements * 2 : 0;
  const int rank = padded(shape.rank);
  return rank == 64    ? launch<64>(p, a, stream)
         : rank == 128 ? launch<128>(p, a, stream)
                       : launch<256>(p, a, stream);
}

}  // namespace ounce::optim
