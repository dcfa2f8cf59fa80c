// SPDX-License-Identifier: MIT
// Discrete Fourier transforms of a few points in registers, with the twiddles of a larger transform
// in their additions: X_q = sum_j x_j w^j e^(-2 pi i j q / R). Device code only.
#pragma once

#include <bit>
#include <cstdint>

namespace ounce::optim {

// e^(-2 pi i numerator / denominator) to rounding: the remainder of the quotient is put back. At
// most 2^23 each, so that floats hold them.
__device__ inline float2 root_of_unity(int numerator, int denominator) {
  const auto p = static_cast<float>(2 * (numerator % denominator));
  const auto q = static_cast<float>(denominator);
  const float x = p / q, rest = fmaf(-x, q, p) / q * 3.14159265f;
  float s, c;
  sincospif(x, &s, &c);
  return {fmaf(-rest, s, c), -fmaf(rest, c, s)};
}
// The quotient is exact for powers of two.
template <int denominator>
__device__ inline float2 root_of_unity(int numerator) {
  if constexpr ((denominator & (denominator - 1)) != 0) {
    return root_of_unity(numerator, denominator);
  } else {
    float s, c;
    sincospif(static_cast<float>(numerator % denominator) * (2.f / denominator), &s, &c);
    return {c, -s};
  }
}

// Cosine and sine of 2 pi k / 32 for k <= 8, and from them the roots of unity that registers need.
__device__ constexpr float root_re(int k, int n) {  // 0 <= k <= n / 4, n a divisor of 32
  constexpr float cosine[9] = {1.f,          0.980785280f, 0.923879533f, 0.831469612f, 0.707106781f,
                               0.555570233f, 0.382683432f, 0.195090322f, 0.f};
  return cosine[k * (32 / n)];
}
__device__ constexpr float root_im(int k, int n) { return -root_re(n / 4 - k, n); }

__device__ inline float2 multiply(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}

// u, v = u + w v, u - w v; `quarter` turns w by another -i.
__device__ inline void butterfly(float2& u, float2& v, float2 w, bool quarter) {
  float2 sum;
  if (quarter) {
    sum.x = fmaf(w.x, v.y, fmaf(w.y, v.x, u.x));
    sum.y = fmaf(-w.x, v.x, fmaf(w.y, v.y, u.y));
  } else {
    sum.x = fmaf(w.x, v.x, fmaf(-w.y, v.y, u.x));
    sum.y = fmaf(w.x, v.y, fmaf(w.y, v.x, u.y));
  }
  v = {fmaf(2, u.x, -sum.x), fmaf(2, u.y, -sum.y)};
  u = sum;
}
__device__ inline void butterfly(float2& u, float2& v, bool quarter) {
  const float2 other = quarter ? float2{v.y, -v.x} : v;
  v = {u.x - other.x, u.y - other.y};
  u = {u.x + other.x, u.y + other.y};
}

// A twiddle of a transform of R points is w^power e^(-2 pi i turn / R).
struct Twiddle {
  int power, turn;
};

// R a power of two. Input j goes to place(j), output q comes at q. Level L of log2 R joins pairs of
// transforms of L / 2 points and has L / 4 twiddles: another quarter turn gives the second half.
template <int R>
struct Radix {
  static constexpr int kTwiddles = R / 2;

  __host__ __device__ static constexpr int place(int j) {
    int to = 0;
    for (int bit = 1; bit < R; bit *= 2) to = to * 2 + (j / bit) % 2;
    return to;
  }
  __device__ static Twiddle twiddle(int i) {
    int level = 2;
    for (; i >= level / 2; level *= 2) {
    }
    return {R / level, level == 2 ? 0 : (i - level / 4) * (R / level)};
  }
  // The twiddles of w' = e^(-2 pi i / R) / w out of those of w, if |w| = 1.
  __device__ static void mirror(const float2 (&w)[kTwiddles], float2 (&out)[kTwiddles]) {
    out[0] = {-w[0].x, w[0].y};
#pragma unroll
    for (int i = 1; i < kTwiddles; ++i) {
      const float2 from = w[3 * std::bit_floor(unsigned(i)) - 1 - i];
      out[i] = {-from.y, -from.x};
    }
  }
  template <int half = 1>
  __device__ static void apply(float2* x, const float2* w) {
    constexpr int kQuarter = half == 1 ? 1 : half / 2;
#pragma unroll
    for (int k = 0; k < R / 2; ++k) {
      const int i = k % half, at = k / half * 2 * half + i;
      const bool quarter = i >= kQuarter;
      butterfly(x[at], x[at + half], w[half / 2 + i % kQuarter], quarter);
    }
    if constexpr (2 * half < R) apply<2 * half>(x, w);
  }
  // w = 1.
  template <int half = 1>
  __device__ static void apply(float2* x) {
    constexpr int kQuarter = half == 1 ? 1 : half / 2;
#pragma unroll
    for (int k = 0; k < R / 2; ++k) {
      const int i = k % half, at = k / half * 2 * half + i;
      const bool quarter = i >= kQuarter;
      const int turn = i % kQuarter;
      if (turn == 0) {
        butterfly(x[at], x[at + half], quarter);
      } else {
        const float2 w = {root_re(turn, 2 * half), root_im(turn, 2 * half)};
        butterfly(x[at], x[at + half], w, quarter);
      }
    }
    if constexpr (2 * half < R) apply<2 * half>(x);
  }
};

__device__ inline void dft3(float2& a, float2& b, float2& c) {
  constexpr float kSine = 0.866025404f;
  const float2 sum = {b.x + c.x, b.y + c.y}, turned = {kSine * (b.y - c.y), kSine * (c.x - b.x)};
  const float2 middle = {fmaf(-0.5f, sum.x, a.x), fmaf(-0.5f, sum.y, a.y)};
  a = {a.x + sum.x, a.y + sum.y};
  b = {middle.x + turned.x, middle.y + turned.y};
  c = {middle.x - turned.x, middle.y - turned.y};
}

// R = 3 H, H a power of two: three transforms of H points, then H of three.
template <int H>
struct Radix3 {
  static constexpr int kInner = Radix<H>::kTwiddles, kTwiddles = kInner + 2 * H;

  __host__ __device__ static constexpr int place(int j) {
    return j % 3 * H + Radix<H>::place(j / 3);
  }
  __device__ static Twiddle twiddle(int i) {
    if (i < kInner) {
      const auto inner = Radix<H>::twiddle(i);
      return {3 * inner.power, 3 * inner.turn};
    }
    const int q = (i - kInner) / 2, s = (i - kInner) % 2 + 1;
    return {s, s * q};
  }
  __device__ static void apply(float2* x, const float2* w) {
#pragma unroll
    for (int s = 0; s < 3; ++s) Radix<H>::apply(x + s * H, w);
#pragma unroll
    for (int q = 0; q < H; ++q) {
      x[H + q] = multiply(x[H + q], w[kInner + 2 * q]);
      x[2 * H + q] = multiply(x[2 * H + q], w[kInner + 2 * q + 1]);
      dft3(x[q], x[H + q], x[2 * H + q]);
    }
  }
};
template <>
struct Radix<6> : Radix3<2> {};
template <>
struct Radix<12> : Radix3<4> {};

}  // namespace ounce::optim
