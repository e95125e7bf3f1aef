// SPDX-License-Identifier: Apache-2.0
// Small facts that kernels of several stages share.
#pragma once

#include <cstdint>

namespace hopyard::sm90 {

__device__ __forceinline__ float WidenBf16(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}

// Round to nearest even; NaN keeps its sign and becomes quiet (formats::EncodeBf16).
__device__ __forceinline__ uint16_t NarrowBf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40U
                                              : (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

// Two values to e4m3 codes, `low` in the low byte: formats::EncodeE4m3 of each (PTX ISA, cvt).
__device__ __forceinline__ uint32_t EncodeE4m3Pair(float low, float high) {
  uint16_t codes = 0;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// The values of two e4m3 codes, exactly; a NaN code is some NaN.
__device__ __forceinline__ float2 DecodeE4m3Pair(uint32_t codes) {
  uint32_t halves = 0;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  float2 values;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}\n"
      : "=f"(values.x), "=f"(values.y)
      : "r"(halves));
  return values;
}

// Two values rounded to nearest even, `low` in the low half. A NaN is some NaN.
__device__ __forceinline__ uint32_t NarrowBf16Pair(float low, float high) {
  uint32_t pair = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Tokens of this call: the count on the device clamped to [0, max_tokens], or all where it is null.
__device__ __forceinline__ int64_t LiveTokens(const int32_t* num_tokens, int64_t max_tokens) {
  if (num_tokens == nullptr) {
    return max_tokens;
  }
  const int64_t given = *num_tokens;
  return given < 0 ? 0 : (given < max_tokens ? given : max_tokens);
}

}  // namespace hopyard::sm90
