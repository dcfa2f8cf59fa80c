// SPDX-License-Identifier: MIT
// The three stages of a transform, and the sums of what comes out of it. Device code only.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include <ounce/optim/dct_butterflies.h>
#include <ounce/optim/dct_rank_parts.h>
#include <ounce/optim/dct_rank_read.h>
#include <ounce/optim/dct_rank_shape.h>

namespace ounce::optim {

template <class S>
__device__ void first_stage_direct(const Places<S>& places, const RankJob& job, int matrix,
                                   int unit) {
  const int i = places.thread;
  if (S::P * S::M1 / 2 < S::T && i >= S::P * S::M1 / 2) return;
  const int pair = S::kRight ? i / (S::M1 / 2) : i % S::P;
  const int c = S::kRight ? i % (S::M1 / 2) : i / S::P;
  const Direct from = {job.batch, static_cast<const float*>(job.batch.gradient[matrix]),
                       int64_t{unit} * S::kUnit + 2 * pair};
  const auto finish = [&](float2* x, int column) {
    Radix<S::R1>::apply(x);
#pragma unroll
    for (int q = 0; q < S::R1; ++q) places.exchange[S::at(pair, q, column)] = x[q];
  };
  using First = Radix<S::R1>;
  if constexpr (S::kRight) {  // an access holds points of both columns
    float2 x[2][S::R1];
#pragma unroll
    for (int j = 0; j < S::R1 / 2; ++j) {
      from.rows(S::N, c + S::M1 * j, x[0][First::place(j)], x[1][First::place(S::R1 - 1 - j)]);
      from.rows(S::N, S::M1 - 1 - c + S::M1 * j, x[1][First::place(j)],
                x[0][First::place(S::R1 - 1 - j)]);
    }
    finish(x[0], c);
    finish(x[1], S::M1 - 1 - c);
  } else {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = side == 0 ? c : S::M1 - 1 - c, other = S::M1 - 1 - column;
      float2 x[S::R1];
#pragma unroll
      for (int j = 0; j < S::R1 / 2; ++j) {
        x[First::place(j)] = from.columns(2 * (column + S::M1 * j));
        x[First::place(S::R1 - 1 - j)] = from.columns(2 * (other + S::M1 * j) + 1);
      }
      finish(x, column);
    }
  }
}

// Columns c and M1 - 1 - c: what the words of two elements hold of either goes to both. add(word,
// row, place in it): what becomes of a word of rows.
template <class S, bool staged, class Add>
__device__ void first_stage(const Places<S>& places, const Add& add) {
  const int i = places.thread;
  if (S::P * S::M1 / 2 < S::T && i >= S::P * S::M1 / 2) return;
  const int pair = S::kRight ? i / (S::M1 / 2) : i % S::P;
  const int c = S::kRight ? i % (S::M1 / 2) : i / S::P;
  uint32_t words[2][2][S::R1 / 2];  // of both vectors, from either column on
  if constexpr (staged && S::kRight) {
    const uint32_t* from = places.staged + pair * S::N;
#pragma unroll
    for (int j = 0; j < S::R1 / 2; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        for (const int side : {0, 1}) {
          const int at = (side == 0 ? c : S::M1 - 1 - c) + S::M1 * j;
          words[v][side][j] = add(from[v * (S::N / 2) + at], 2 * pair + v, at);
        }
      }
    }
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int column = side == 0 ? c : S::M1 - 1 - c, other = S::M1 - 1 - column;
    float2 x[S::R1];
#pragma unroll
    for (int j = 0; j < S::R1; ++j) {
      float2& to = x[Radix<S::R1>::place(j)];
      const bool even = j < S::R1 / 2;
      const int k = even ? j : S::R1 - 1 - j;
      if constexpr (!staged) {
        to = places.exchange[S::at(pair, j, column)];
      } else if constexpr (S::kRight) {
        const uint32_t a = words[0][even ? side : 1 - side][k];
        const uint32_t b = words[1][even ? side : 1 - side][k];
        to = even ? float2{low_half(a), low_half(b)} : float2{high_half(a), high_half(b)};
      } else {
        const int row = even ? column + S::M1 * k : S::N / 2 + other + S::M1 * k;
        const uint32_t word = places.staged[row * S::P + pair];
        to = {low_half(word), high_half(word)};
      }
    }
    Radix<S::R1>::apply(x);
#pragma unroll
    for (int q = 0; q < S::R1; ++q) places.exchange[S::at(pair, q, column)] = x[q];
  }
}

__device__ inline void split(float4 both, float2& a, float2& b) {
  a = {both.x, both.y};
  b = {both.z, both.w};
}
// Two numbers an access, `step` between those of one and the next.
template <int step, int count>
__device__ void load_two(const float2* from, float2 (&to)[count]) {
#pragma unroll
  for (int j = 0; j < count; j += 2) {
    split(*reinterpret_cast<const float4*>(from + j / 2 * step), to[j], to[j + 1]);
  }
}

// Of 8 points across, rows 4 apart lie in different banks. Bits of a row move: of rows without
// common bits, the sum goes to the sum.
template <class S>
__device__ constexpr int row_of(int r) {
  return S::kRight && S::M2 == 8 ? r % 2 * 4 + r / 2 % 4 + r / 8 * 8 : r;
}

// between(): called once among the work.
template <class S, class Between>
__device__ void second_stage(const Places<S>& places, Between between) {
  constexpr int kOfPair = S::N / S::R2, kItems = S::P * kOfPair;
#pragma unroll(S::R2 > 16 ? 1 : S::I2)
  for (int item = 0; item < S::I2; ++item) {
    const int i = item * S::T + places.thread;
    if (kItems % S::T != 0 && i >= kItems) break;
    int pair = S::kRight ? i / kOfPair : i % S::P;
    int r = S::kRight ? i % kOfPair : i / S::P, c = r % S::M2, q = row_of<S>(r / S::M2);
    // The rows of a thread: known distances, which cost no arithmetic.
    constexpr int kDown = S::T / (S::M2 * (S::kRight ? 1 : S::P));
    if constexpr (kItems % S::T == 0 &&
                  (S::kRight ? S::P == 1 && std::has_single_bit(unsigned(kDown))
                             : S::T % (S::M2 * S::P) == 0)) {
      const int first = S::kRight ? places.thread : places.thread / S::P;
      pair = S::kRight ? 0 : places.thread % S::P;
      c = first % S::M2;
      q = row_of<S>(first / S::M2) + row_of<S>(item * kDown);
    }
    float2 x[S::R2];
    float2* at = places.exchange + S::at(pair, q, c);
    constexpr int kStep = S::M2 * (S::kRight ? 1 : S::P);
#pragma unroll
    for (int j = 0; j < S::R2; ++j) x[Radix<S::R2>::place(j)] = at[j * kStep];
    float2 w[(Radix<S::R2>::kTwiddles + 1) / 2 * 2];
    load_two<2>(places.table2 + q * S::kTwiddles2, w);
    Radix<S::R2>::apply(x, w);
#pragma unroll
    for (int j = 0; j < S::R2; ++j) at[j * kStep] = x[j];
    if (item == 0) between();
  }
}

template <class S>
__device__ void load_column(const Places<S>& places, int pair, int column, float2 (&x)[S::R3]) {
  const float2* at = places.exchange + S::at(pair, column % S::R1, column / S::R1 * S::M2);
  if constexpr (S::kRight) {
    float2 in_order[S::R3];
    load_two<2>(at, in_order);
#pragma unroll
    for (int j = 0; j < S::R3; ++j) x[Radix<S::R3>::place(j)] = in_order[j];
  } else {
#pragma unroll
    for (int j = 0; j < S::R3; ++j) x[Radix<S::R3>::place(j)] = at[j * S::P];
  }
}

// Column 0 pairs with itself, as does M3 / 2: brings their points where other columns' points lie.
// Those that are alone, 0 and n / 2, share a slot whose tangent is 0.
template <int R>
__device__ void pair_own(float2 (&x)[R], float2 (&y)[R]) {
  const float2 zero = x[0], half = x[R / 2];
#pragma unroll
  for (int j = R / 2; j < R; ++j) {
    const float2 next = j + 1 < R ? x[j + 1] : zero;
    x[j] = y[j];
    y[j] = next;
  }
  x[0] = {zero.x - half.x, zero.y + half.y};
  y[R - 1] = {zero.x + half.x, zero.y - half.y};
}

template <class S, bool absolutes>
struct Sums {
  float squares[S::I3][S::R3][2], sums[absolutes ? S::I3 : 1][absolutes ? S::R3 : 1][2];
};

template <class S, bool absolutes>
__device__ void third_stage(const Places<S>& places, Sums<S, absolutes>& sums) {
  constexpr int R = S::R3, kItems = S::P * S::M3 / 2, K = S::kTwiddles3;
#pragma unroll
  for (int item = 0; item < S::I3; ++item) {
    const int i = item * S::T + places.thread;
    if (kItems % S::T != 0 && i >= kItems) break;
    const int pair = S::kRight ? i / (S::M3 / 2) : i % S::P;
    const int h = S::kRight ? i % (S::M3 / 2) : i / S::P;
    float2 x[R], y[R], w[K], mirrored[K];
    load_two<S::M3>(places.table3 + 2 * h, w);
    Radix<R>::mirror(w, mirrored);
    if (h == 0) {
#pragma unroll
      for (int j = 0; j < K; ++j) {  // e^(-2 pi i / 2R) to the powers
        const int level = j == 0 ? 2 : j == 1 ? 4 : j < 4 ? 8 : 16;
        const int k = j == 0 ? 0 : j - level / 4;
        const int turn = 32 / (2 * level) * (2 * k + 1);  // of 32
        mirrored[j] = {root_re(turn, 32), root_im(turn, 32)};
      }
    }
    load_column(places, pair, h, x);
    Radix<R>::apply(x, w);
    load_column(places, pair, h == 0 ? S::M3 / 2 : S::M3 - h, y);
    Radix<R>::apply(y, mirrored);
    if (h == 0) pair_own(x, y);
#pragma unroll
    for (int four = 0; four < R; four += 4) {
      const float4 t =
          *reinterpret_cast<const float4*>(places.tangents + (four / 4 * (S::M3 / 2) + h) * 4);
      const float tangents[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int s = four + j, o = R - 1 - s;
        add_pair<absolutes>(s < R / 2 ? x[s] : y[o], s < R / 2 ? y[o] : x[s], tangents[j],
                            sums.squares[item][s],
                            sums.sums[absolutes ? item : 0][absolutes ? s : 0]);
      }
    }
  }
}

// The block's sums of one matrix, over its groups and pairs in order, into their slot. scale_of()
// is left to sum_slots().
template <class S, bool absolutes>
__device__ void flush(const Places<S>& places, unsigned char* shared,
                      const Sums<S, absolutes>& sums, float* slot) {
  constexpr int kItems = S::P * S::M3 / 2;
  auto* parts = reinterpret_cast<float*>(places.exchange);  // [P, n] of a group
#pragma unroll
  for (int kind = 0; kind < (absolutes ? 2 : 1); ++kind) {
#pragma unroll
    for (int item = 0; item < S::I3; ++item) {
      const int i = item * S::T + places.thread;
      if (kItems % S::T != 0 && i >= kItems) break;
      const int pair = S::kRight ? i / (S::M3 / 2) : i % S::P;
      const int h = S::kRight ? i % (S::M3 / 2) : i / S::P;
#pragma unroll
      for (int s = 0; s < S::R3; ++s) {
        const int low = low_frequency<S>(h, s), high = low == 0 ? S::N / 2 : S::N - low;
        const auto& from =
            kind == 0 ? sums.squares[item][s] : sums.sums[absolutes ? item : 0][absolutes ? s : 0];
        parts[pair * S::N + low] = from[0];
        parts[pair * S::N + high] = from[1];
      }
    }
    __syncthreads();
    for (int k = 4 * threadIdx.x; k < S::N; k += 4 * S::kThreads) {
      float4 sum = {};
#pragma unroll
      for (int part = 0; part < S::G * S::P; ++part) {
        const auto* of_group = reinterpret_cast<const float*>(shared + part / S::P * S::kOfGroup);
        const auto x = *reinterpret_cast<const float4*>(of_group + part % S::P * S::N + k);
        sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
      }
      *reinterpret_cast<float4*>(slot + kind * S::N + k) = sum;
    }
    __syncthreads();
  }
}

}  // namespace ounce::optim
