// SPDX-License-Identifier: MIT
// Warpgroup matrix products: D [64, N] fp32 in the registers of 128 threads += A [64, 16] B [N,
// 16]^T, both in shared memory in the swizzle of tma.h: rows of 64 elements of 16 bits along the
// inner dimension, or, transposed, along the outer one.
//
// Thread t of the warpgroup, of warp w = t / 32 and lane l = t % 32, holds for every 8 columns g
// the elements d[4g + 2h + c] of row 16w + 8h + l / 4 and column 8g + 2 (l % 4) + c; h, c in {0,
// 1}.
#pragma once

#include <cstdint>

namespace ounce::wgmma {

// Of an operand whose first row lies at a multiple of 1024 bytes: where it is, 1024 bytes from one
// 8 rows to the next, 128-byte swizzle. 16 elements further is + 2; 64 rows further is + 512.
// Of a transposed one: rows of 64 outer for one inner index each; the next 64 outer are `next`
// bytes on, 16 inner indices further is + 128.
__device__ inline uint64_t descriptor(uint32_t rows, uint32_t next = 16) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{next >> 4} << 16) |
         ((rows & 0x3FFFF) >> 4);
}

// Before the first product, and whenever registers of D were written by other instructions.
__device__ inline void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` groups are under way.
template <int pending>
__device__ inline void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

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
// fp16 or bf16: by `half`. Behind the operands: the registers of D.
#define OUNCE_WGMMA_EITHER(n, places, a_, b_, add_, ta, tb, ...)         \
  if constexpr (half) {                                                  \
    asm volatile(OUNCE_WGMMA_OF("f16", n, places, a_, b_, add_, ta, tb)  \
                 : __VA_ARGS__                                           \
                 : "l"(a), "l"(b), "r"(add), "n"(int{a_is_transposed}),  \
                   "n"(int{b_is_transposed}));                           \
  } else {                                                               \
    asm volatile(OUNCE_WGMMA_OF("bf16", n, places, a_, b_, add_, ta, tb) \
                 : __VA_ARGS__                                           \
                 : "l"(a), "l"(b), "r"(add), "n"(int{a_is_transposed}),  \
                   "n"(int{b_is_transposed}));                           \
  }

// bf16, or of N = 128 and 192 fp16 (`half`). `add` = 0 overwrites D.
template <bool a_is_transposed = false, bool b_is_transposed = false>
__device__ inline void multiply(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile(OUNCE_WGMMA(64, OUNCE_WGMMA_PLACES0, 32, 33, 34, 35, 36)
               : OUNCE_WGMMA_D32(0)
               : "l"(a), "l"(b), "r"(add), "n"(int{a_is_transposed}), "n"(int{b_is_transposed}));
}
template <bool a_is_transposed = false, bool b_is_transposed = false, bool half = false>
__device__ inline void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) {
  OUNCE_WGMMA_EITHER(128, OUNCE_WGMMA_PLACES0 ", " OUNCE_WGMMA_PLACES32, 64, 65, 66, 67, 68,
                     OUNCE_WGMMA_D32(0), OUNCE_WGMMA_D32(32))
}
template <bool a_is_transposed = false, bool b_is_transposed = false, bool half = false>
__device__ inline void multiply(float (&d)[96], uint64_t a, uint64_t b, int add) {
  OUNCE_WGMMA_EITHER(192, OUNCE_WGMMA_PLACES0 ", " OUNCE_WGMMA_PLACES32 ", " OUNCE_WGMMA_PLACES64,
                     96, 97, 98, 99, 100, OUNCE_WGMMA_D32(0), OUNCE_WGMMA_D32(32),
                     OUNCE_WGMMA_D32(64))
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
#undef OUNCE_WGMMA_EITHER
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
