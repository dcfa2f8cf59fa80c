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

// N = 192, bf16 or fp16 (`half`). `add` = 0 overwrites D.
template <bool a_is_transposed = false, bool b_is_transposed = false, bool half = false>
__device__ inline void multiply(float (&d)[96], uint64_t a, uint64_t b, int add) {
// clang-format off
#define OUNCE_MULTIPLY(type)                                                           \
  asm volatile(                                                                        \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, "                                             \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                                         \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                                       \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                                       \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                                       \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                                       \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                                       \
      "%56, %57, %58, %59, %60, %61, %62, %63, "                                       \
      "%64, %65, %66, %67, %68, %69, %70, %71, "                                       \
      "%72, %73, %74, %75, %76, %77, %78, %79, "                                       \
      "%80, %81, %82, %83, %84, %85, %86, %87, "                                       \
      "%88, %89, %90, %91, %92, %93, %94, %95}, "                                      \
      "%96, %97, add, 1, 1, %99, %100;\n}"                                             \
      :                                                                                \
      "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),                                  \
      "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),                                  \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                                \
      "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),                              \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),                              \
      "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                              \
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),                              \
      "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),                              \
      "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                              \
      "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),                              \
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),                              \
      "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                              \
      "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),                              \
      "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),                              \
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                              \
      "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),                              \
      "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]),                              \
      "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),                              \
      "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]),                              \
      "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),                              \
      "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),                              \
      "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),                              \
      "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]),                              \
      "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])                               \
      : "l"(a), "l"(b), "r"(add), "n"(int{a_is_transposed}), "n"(int{b_is_transposed}))
  // clang-format on
  if constexpr (half) {
    OUNCE_MULTIPLY("f16");
  } else {
    OUNCE_MULTIPLY("bf16");
  }
#undef OUNCE_MULTIPLY
}

}  // namespace ounce::wgmma
