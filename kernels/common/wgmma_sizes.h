// SPDX-License-Identifier: MIT
// More sizes of the product of wgmma.h: N = 64, 128, 256 (D of N / 2 registers), and N = 64 with A
// in registers.
#pragma once

#include <cstdint>

namespace ounce::wgmma {

// A as one thread holds it: of every 16 inner indices four registers, each of two neighbours along
// the inner dimension, in the order of ldmatrix: rows l / 4 and l / 4 + 8 of inner 2 (l % 4), then
// the same rows of inner 2 (l % 4) + 8.
using Fragment = uint32_t[4];

// clang-format off
#define OUNCE_WGMMA_D8(i)                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),         \
  "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUNCE_WGMMA_D32(i) \
  OUNCE_WGMMA_D8(i), OUNCE_WGMMA_D8(i + 8), OUNCE_WGMMA_D8(i + 16), OUNCE_WGMMA_D8(i + 24)
#define OUNCE_WGMMA_PLACES0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define OUNCE_WGMMA_PLACES32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define OUNCE_WGMMA_PLACES64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define OUNCE_WGMMA_PLACES96 \
  "%96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

// `a`, `b`, `add`, `ta`, `tb`: the numbers of the operands after D's.
#define OUNCE_WGMMA_OF(type, n, places, a, b, add, ta, tb)                                       \
  "{\n.reg .pred add;\nsetp.ne.b32 add, %" #add                                                  \
  ", 0;\n"                                                                                       \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" places "}, %" #a ", %" #b \
  ", add, 1, 1, %" #ta ", %" #tb ";\n}"
#define OUNCE_WGMMA(n, places, a, b, add, ta, tb) \
  OUNCE_WGMMA_OF("bf16", n, places, a, b, add, ta, tb)

// bf16, or of N = 128 fp16 (`half`). `add` = 0 overwrites D.
template <bool a_is_transposed = false, bool b_is_transposed = false>
__device__ inline void multiply(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile(OUNCE_WGMMA(64, OUNCE_WGMMA_PLACES0, 32, 33, 34, 35, 36)
               : OUNCE_WGMMA_D32(0)
               : "l"(a), "l"(b), "r"(add), "n"(int{a_is_transposed}), "n"(int{b_is_transposed}));
}
template <bool a_is_transposed = false, bool b_is_transposed = false, bool half = false>
__device__ inline void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) {
#define OUNCE_MULTIPLY(type)                                                                       \
  asm volatile(                                                                                    \
      OUNCE_WGMMA_OF(type, 128, OUNCE_WGMMA_PLACES0 ", " OUNCE_WGMMA_PLACES32, 64, 65, 66, 67, 68) \
      : OUNCE_WGMMA_D32(0), OUNCE_WGMMA_D32(32)                                                    \
      : "l"(a), "l"(b), "r"(add), "n"(int{a_is_transposed}), "n"(int{b_is_transposed}))
  if constexpr (half) {
    OUNCE_MULTIPLY("f16");
  } else {
    OUNCE_MULTIPLY("bf16");
  }
#undef OUNCE_MULTIPLY
}
template <bool a_is_transposed = false, bool b_is_transposed = false>
__device__ inline void multiply(float (&d)[128], uint64_t a, uint64_t b, int add) {
  asm volatile(OUNCE_WGMMA(256,
                           OUNCE_WGMMA_PLACES0 ", " OUNCE_WGMMA_PLACES32 ", " OUNCE_WGMMA_PLACES64
                                               ", " OUNCE_WGMMA_PLACES96,
                           128, 129, 130, 131, 132)
               : OUNCE_WGMMA_D32(0), OUNCE_WGMMA_D32(32), OUNCE_WGMMA_D32(64), OUNCE_WGMMA_D32(96)
               : "l"(a), "l"(b), "r"(add), "n"(int{a_is_transposed}), "n"(int{b_is_transposed}));
}
// The registers of `a` stay as they are until the product is done.
template <bool b_is_transposed = false>
__device__ inline void multiply(float (&d)[32], const Fragment& a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" OUNCE_WGMMA_PLACES0
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}"
      : OUNCE_WGMMA_D32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int{b_is_transposed}));
}

#undef OUNCE_WGMMA
#undef OUNCE_WGMMA_OF
#undef OUNCE_WGMMA_PLACES0
#undef OUNCE_WGMMA_PLACES32
#undef OUNCE_WGMMA_PLACES64
#undef OUNCE_WGMMA_PLACES96
#undef OUNCE_WGMMA_D32
#undef OUNCE_WGMMA_D8

// After wait(): no use of D moves before it.
template <int n>
__device__ inline void arrived(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace ounce::wgmma
