// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix products (PTX ISA, wgmma): D[64, N] += A[64, K] * B[N, K]^T, FP32 accumulators
// in registers, K = 16 for BF16 and 32 for e4m3. Operands in shared memory have rows of 128 bytes
// in the 128-byte swizzle: a row is 128 bytes of K, or, of BF16 A with MultiplyMnMajor, the 64 M of
// one K. A may come from registers.
//
// Accumulators of thread t, warp w = t / 32 of the warpgroup, lane l: d[4 * j + 2 * h + i] is row
// 16 * w + 8 * h + l / 4, column 8 * j + 2 * (l % 4) + i. A in registers: a[2 * i + h] holds row
// 16 * w + 8 * h + l / 4; BF16: columns 2 * (l % 4) + 8 * i and the next; e4m3: the four columns
// from 4 * (l % 4) + 16 * i on.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"

namespace hopyard::sm90 {

// A tile whose groups of 8 rows (of M or N, or, MN-major, of K) follow each other every 1024 bytes.
// Addresses need no mask: shared
// memory ends below 2^18.
struct TileDescriptor {
  uint32_t low;  // the start in units of 16 bytes, and a stride that swizzled tiles do not use

  __device__ __forceinline__ explicit TileDescriptor(uint32_t shared)
      : low(shared >> 4 | 1U << 16) {}
  // Moves `bytes` on: 32 are one instruction's K (MN-major: 16 rows), 128 a row.
  __device__ __forceinline__ TileDescriptor Plus(uint32_t bytes) const {
    TileDescriptor moved(*this);
    moved.low += bytes >> 4;
    return moved;
  }
  __device__ __forceinline__ uint64_t Bits() const {
    constexpr uint32_t kStrideBytes = 1024;
    constexpr uint32_t kSwizzle128 = 1;
    return uint64_t{kStrideBytes >> 4 | kSwizzle128 << 30} << 32 | low;
  }
};

// Registers written before are read by the products that follow.
__device__ __forceinline__ void MmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void MmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void MmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses of the accumulators across a wait.
template <int kCount>
__device__ __forceinline__ void Touch(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(values[i])::"memory");
  }
}

// Multiply and MultiplyMnMajor: D = A * B^T, plus D where `accumulate` is not 0.
template <int kN>
struct MmaBf16;
template <int kN>
struct MmaE4m3;

// clang-format off
#define HOPYARD_D_8 "%0, %1, %2, %3"
#define HOPYARD_OUT_8 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define HOPYARD_D_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HOPYARD_OUT_16 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7])
#define HOPYARD_D_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HOPYARD_OUT_32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define HOPYARD_D_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HOPYARD_OUT_64 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31])
#define HOPYARD_D_96 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define HOPYARD_OUT_96 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
  "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
  "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define HOPYARD_D_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HOPYARD_OUT_128 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
  "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
  "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
  "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
  "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// n columns; c = n / 2 accumulators, then the operands' numbers.
#define HOPYARD_MMA_SHARED(name, n, c, a_at, b_at, p_at, suffix, tail)                              \
  __device__ __forceinline__ static void name(float (&d)[c], uint64_t a, uint64_t b,                \
                                              int accumulate) {                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at ", 0;\n"                                \
                 "wgmma.mma_async.sync.aligned.m64n" #n suffix " {" HOPYARD_D_##n "}, %" #a_at ", %"  \
                 #b_at ", p, 1, 1" tail ";\n}\n"                                                    \
                 : HOPYARD_OUT_##n                                                                  \
                 : "l"(a), "l"(b), "r"(accumulate));                                                \
  }
#define HOPYARD_MMA_REGISTERS(n, c, a0, a1, a2, a3, b_at, p_at, suffix, tail)                       \
  __device__ __forceinline__ static void Multiply(float (&d)[c], const uint32_t (&a)[4], uint64_t b, \
                                                  int accumulate) {                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at ", 0;\n"                                \
                 "wgmma.mma_async.sync.aligned.m64n" #n suffix " {" HOPYARD_D_##n "}, {%" #a0 ", %"   \
                 #a1 ", %" #a2 ", %" #a3 "}, %" #b_at ", p, 1, 1" tail ";\n}\n"                     \
                 : HOPYARD_OUT_##n                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));            \
  }
#define HOPYARD_MMA(n, c, n1, n2, n3, n4, n5)                                                       \
  template <>                                                                                       \
  struct MmaBf16<n> {                                                                               \
    HOPYARD_MMA_SHARED(Multiply, n, c, c, n1, n2, "k16.f32.bf16.bf16", ", 0, 0")                    \
    HOPYARD_MMA_SHARED(MultiplyMnMajor, n, c, c, n1, n2, "k16.f32.bf16.bf16", ", 1, 0")             \
    HOPYARD_MMA_REGISTERS(n, c, c, n1, n2, n3, n4, n5, "k16.f32.bf16.bf16", ", 0")                  \
  };                                                                                                \
  template <>                                                                                       \
  struct MmaE4m3<n> {                                                                               \
    HOPYARD_MMA_SHARED(Multiply, n, c, c, n1, n2, "k32.f32.e4m3.e4m3", "")                          \
    HOPYARD_MMA_REGISTERS(n, c, c, n1, n2, n3, n4, n5, "k32.f32.e4m3.e4m3", "")                     \
  };

HOPYARD_MMA(8, 4, 5, 6, 7, 8, 9)
HOPYARD_MMA(16, 8, 9, 10, 11, 12, 13)
HOPYARD_MMA(32, 16, 17, 18, 19, 20, 21)
HOPYARD_MMA(64, 32, 33, 34, 35, 36, 37)
HOPYARD_MMA(96, 48, 49, 50, 51, 52, 53)
HOPYARD_MMA(128, 64, 65, 66, 67, 68, 69)

#undef HOPYARD_MMA
#undef HOPYARD_MMA_REGISTERS
#undef HOPYARD_MMA_SHARED
#undef HOPYARD_D_8
#undef HOPYARD_OUT_8
#undef HOPYARD_D_16
#undef HOPYARD_OUT_16
#undef HOPYARD_D_32
#undef HOPYARD_OUT_32
#undef HOPYARD_D_64
#undef HOPYARD_OUT_64
#undef HOPYARD_D_96
#undef HOPYARD_OUT_96
#undef HOPYARD_D_128
#undef HOPYARD_OUT_128
// clang-format on

}  // namespace hopyard::sm90
