// SPDX-License-Identifier: Apache-2.0
// Reductions over the 32 lanes of a warp, every lane gets the result.
#pragma once

#include <cstdint>

namespace hopyard::sm90 {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;
inline constexpr int kWarpSize = 32;

__device__ __forceinline__ int LaneId() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

// The halving tree 16, 8, 4, 2, 1 that the routing definition prescribes (route/score.h): lane i
// adds the value of lane i + width. Where lanes from 2 * widest on hold +0, beginning with a
// smaller `widest` leaves out additions that change nothing.
__device__ __forceinline__ float TreeSum(float value, int widest = kWarpSize / 2) {
  for (int width = widest; width > 0; width /= 2) {
    value = __fadd_rn(value, __shfl_down_sync(kAllLanes, value, width));
  }
  return __shfl_sync(kAllLanes, value, 0);
}

__device__ __forceinline__ int Sum(int value) {
  return __reduce_add_sync(kAllLanes, value);
}
__device__ __forceinline__ int Max(int value) {
  return __reduce_max_sync(kAllLanes, value);
}
// Largest value; NaN is ignored, -inf where there is nothing else. Of zeros +0 is the larger one.
__device__ __forceinline__ float MaxIgnoringNan(float value) {
  const int bits = __float_as_int(value == value ? value : -INFINITY);
  // Orders like the number, and is its own inverse.
  const int max = Max(bits ^ ((bits >> 31) & 0x7FFFFFFF));
  return __int_as_float(max ^ ((max >> 31) & 0x7FFFFFFF));
}
__device__ __forceinline__ unsigned Min(unsigned value) {
  return __reduce_min_sync(kAllLanes, value);
}

// threadIdx.x where it is asked for: what follows from it is not computed ahead of a long loop,
// where it would take registers.
__device__ __forceinline__ uint32_t ThreadHere() {
  uint32_t thread = 0;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

}  // namespace hopyard::sm90
