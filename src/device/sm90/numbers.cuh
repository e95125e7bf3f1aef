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

// Tokens of this call: the count on the device clamped to [0, max_tokens], or all where it is null.
__device__ __forceinline__ int64_t LiveTokens(const int32_t* num_tokens, int64_t max_tokens) {
  if (num_tokens == nullptr) {
    return max_tokens;
  }
  const int64_t given = *num_tokens;
  return given < 0 ? 0 : (given < max_tokens ? given : max_tokens);
}

}  // namespace hopyard::sm90
