// SPDX-License-Identifier: Apache-2.0
// Scalar definitions of the number formats: every other implementation (vectorised, CUDA) equals
// these bit for bit. All rounding is to nearest, ties to even, unless said otherwise.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace hopyard::formats {

inline constexpr float kE4m3Max = 448.0F;
inline constexpr float kE2m1Max = 6.0F;
inline constexpr uint8_t kE4m3Nan = 0x7F;
inline constexpr uint8_t kE8m0Nan = 0xFF;

inline float DecodeBf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// NaN stays NaN (quiet, sign kept); overflow goes to infinity.
inline uint16_t EncodeBf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) {
    return static_cast<uint16_t>((bits >> 16) | 0x40U);
  }
  const uint32_t rounding = 0x7FFFU + ((bits >> 16) & 1U);
  return static_cast<uint16_t>((bits + rounding) >> 16);
}

inline float RoundToBf16(float value) {
  return DecodeBf16(EncodeBf16(value));
}

float DecodeFp16(uint16_t bits);
uint16_t EncodeFp16(float value);

// e4m3fn: no infinities; 0x7F and 0xFF are NaN.
float DecodeE4m3(uint8_t code);
// Saturates to +-448 (infinities too); NaN gives 0x7F.
uint8_t EncodeE4m3(float value);

// e2m1 magnitudes by the low three bits; bit 3 is the sign.
inline constexpr std::array<float, 8> kE2m1Magnitudes = {0.0F, 0.5F, 1.0F, 1.5F,
                                                         2.0F, 3.0F, 4.0F, 6.0F};
inline float DecodeE2m1(uint8_t nibble) {
  const float magnitude = kE2m1Magnitudes[nibble & 7U];
  return (nibble & 8U) != 0 ? -magnitude : magnitude;
}
// Saturates to +-6. NaN has no code: callers put it into the block scale; here it gives 0.
uint8_t EncodeE2m1(float value);

// e8m0: 2^(code - 127); 255 is NaN, 0 is 2^-127.
inline float DecodeE8m0(uint8_t code) {
  // 2^-127 is subnormal, 255 is NaN: both are the exponent field with the top mantissa bit set.
  const uint32_t quirk = code == 0 || code == kE8m0Nan ? 0x00400000U : 0U;
  return std::bit_cast<float>((static_cast<uint32_t>(code) << 23) | quirk);
}
// Smallest code whose value is >= value, for value >= 0; 0 gives 0, NaN and infinity give 255.
uint8_t EncodeE8m0RoundUp(float value);

// Two's-complement nibble, -8 .. 7.
inline float DecodeInt4(uint8_t nibble) {
  return static_cast<float>(static_cast<int8_t>(static_cast<uint8_t>(nibble << 4U)) >> 4);
}

}  // namespace hopyard::formats
