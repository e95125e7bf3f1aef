// SPDX-License-Identifier: Apache-2.0
// Scalar definitions of the number formats, for host and device: every other implementation
// (vectorised, the GPU's own conversions) equals these bit for bit. All rounding is to nearest,
// ties to even, unless said otherwise.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"
#include "core/ieee.h"

namespace hopyard::formats {

inline constexpr float kE4m3Max = 448.0F;
inline constexpr float kE2m1Max = 6.0F;
inline constexpr uint8_t kE4m3Nan = 0x7F;
inline constexpr uint8_t kE8m0Nan = 0xFF;

inline constexpr uint32_t kSignBit = 0x80000000U;
inline constexpr uint32_t kInfinityBits = 0x7F800000U;
inline constexpr uint32_t kQuietNanBits = 0x7FC00000U;

HOPYARD_HOST_DEVICE float DecodeBf16(uint16_t bits) {
  return ieee::FromBits(static_cast<uint32_t>(bits) << 16);
}

// NaN stays NaN (quiet, sign kept); overflow goes to infinity.
HOPYARD_HOST_DEVICE uint16_t EncodeBf16(float value) {
  const uint32_t bits = ieee::Bits(value);
  if (ieee::IsNan(value)) {
    return static_cast<uint16_t>((bits >> 16) | 0x40U);
  }
  const uint32_t rounding = 0x7FFFU + ((bits >> 16) & 1U);
  return static_cast<uint16_t>((bits + rounding) >> 16);
}

HOPYARD_HOST_DEVICE float RoundToBf16(float value) {
  return DecodeBf16(EncodeBf16(value));
}

float DecodeFp16(uint16_t bits);
uint16_t EncodeFp16(float value);

// Exponent field and mantissa, as one integer, of the nearest value with `kMantissa` mantissa bits
// whose smallest normal is 2^kMinExponent. `magnitude` is the FP32 bit pattern of |value|, finite.
template <int kMantissa, int kMinExponent>
HOPYARD_HOST_DEVICE uint32_t RoundToGrid(uint32_t magnitude) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + kMinExponent) << 23;
  if (magnitude >= kMinNormal) {
    const uint32_t odd = (magnitude >> kShift) & 1U;
    const uint32_t rounded = magnitude + ((1U << (kShift - 1)) - 1U) + odd;
    return (rounded >> kShift) - (static_cast<uint32_t>(126 + kMinExponent) << kMantissa);
  }
  // An FP32 number whose last place is the grid's subnormal step: the addition rounds.
  constexpr uint32_t kMagic = static_cast<uint32_t>(127 + kMinExponent - kMantissa + 23) << 23;
  return ieee::Bits(ieee::Add(ieee::FromBits(magnitude), ieee::FromBits(kMagic))) - kMagic;
}

// The magnitude `bits` without its sign, at most `largest`.
HOPYARD_HOST_DEVICE uint32_t CappedMagnitude(uint32_t bits, float largest) {
  const uint32_t magnitude = bits & ~kSignBit;
  const uint32_t cap = ieee::Bits(largest);
  return magnitude < cap ? magnitude : cap;
}

// e4m3fn: no infinities; 0x7F and 0xFF are NaN.
HOPYARD_HOST_DEVICE float DecodeE4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80U) << 24;
  const uint32_t magnitude = code & 0x7FU;
  if (magnitude == kE4m3Nan) {
    return ieee::FromBits(sign | kQuietNanBits);
  }
  if (magnitude < 8U) {
    const float value = static_cast<float>(magnitude) * 0x1p-9F;
    return ieee::FromBits(sign | ieee::Bits(value));
  }
  return ieee::FromBits(sign | ((magnitude << 20) + (120U << 23)));
}
// Saturates to +-448 (infinities too); NaN gives 0x7F.
HOPYARD_HOST_DEVICE uint8_t EncodeE4m3(float value) {
  if (ieee::IsNan(value)) {
    return kE4m3Nan;
  }
  const uint32_t bits = ieee::Bits(value);
  return static_cast<uint8_t>(((bits & kSignBit) >> 24) |
                              RoundToGrid<3, -6>(CappedMagnitude(bits, kE4m3Max)));
}

// Bit 3 of a nibble is the sign, the others the magnitude: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
HOPYARD_HOST_DEVICE float DecodeE2m1(uint8_t nibble) {
  const uint32_t magnitude = nibble & 7U;
  const uint32_t normal = (magnitude << 22) + (126U << 23);
  const uint32_t subnormal = magnitude == 0 ? 0U : 126U << 23;
  const uint32_t sign = static_cast<uint32_t>(nibble & 8U) << 28;
  return ieee::FromBits(sign | (magnitude < 2U ? subnormal : normal));
}
// Saturates to +-6. NaN has no code: callers put it into the block scale; here it gives 0.
HOPYARD_HOST_DEVICE uint8_t EncodeE2m1(float value) {
  if (ieee::IsNan(value)) {
    return 0;
  }
  const uint32_t bits = ieee::Bits(value);
  return static_cast<uint8_t>(((bits & kSignBit) >> 28) |
                              RoundToGrid<1, 0>(CappedMagnitude(bits, kE2m1Max)));
}

// e8m0: 2^(code - 127); 255 is NaN, 0 is 2^-127.
HOPYARD_HOST_DEVICE float DecodeE8m0(uint8_t code) {
  // 2^-127 is subnormal, 255 is NaN: both are the exponent field with the top mantissa bit set.
  const uint32_t quirk = code == 0 || code == kE8m0Nan ? 0x00400000U : 0U;
  return ieee::FromBits((static_cast<uint32_t>(code) << 23) | quirk);
}
// Smallest code whose value is >= value, for value >= 0; 0 gives 0, NaN and infinity give 255.
HOPYARD_HOST_DEVICE uint8_t EncodeE8m0RoundUp(float value) {
  const uint32_t bits = ieee::Bits(value) & ~kSignBit;
  if (bits >= kInfinityBits) {
    return kE8m0Nan;
  }
  constexpr uint32_t kSmallest = 0x00400000U;  // 2^-127, a subnormal FP32
  if (bits <= kSmallest) {
    return 0;
  }
  const uint32_t exponent = bits >> 23;
  const uint32_t code = exponent + ((bits & 0x7FFFFFU) == 0 ? 0U : 1U);
  return static_cast<uint8_t>(code < 254U ? code : 254U);
}

// Two's-complement nibble, -8 .. 7.
HOPYARD_HOST_DEVICE float DecodeInt4(uint8_t nibble) {
  return static_cast<float>(static_cast<int8_t>(static_cast<uint8_t>(nibble << 4U)) >> 4);
}

}  // namespace hopyard::formats
