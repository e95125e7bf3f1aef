// SPDX-License-Identifier: Apache-2.0
#include "formats/codes.h"

#include <algorithm>

namespace hopyard::formats {
namespace {

constexpr uint32_t kSignBit = 0x80000000U;
constexpr uint32_t kInfinityBits = 0x7F800000U;
constexpr uint32_t kQuietNanBits = 0x7FC00000U;

// Exponent field and mantissa, as one integer, of the nearest value with `kMantissa` mantissa bits
// whose smallest normal is 2^kMinExponent. `magnitude` is the FP32 bit pattern of |value|, finite.
template <int kMantissa, int kMinExponent>
uint32_t RoundToGrid(uint32_t magnitude) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + kMinExponent) << 23;
  if (magnitude >= kMinNormal) {
    const uint32_t odd = (magnitude >> kShift) & 1U;
    const uint32_t rounded = magnitude + ((1U << (kShift - 1)) - 1U) + odd;
    return (rounded >> kShift) - (static_cast<uint32_t>(126 + kMinExponent) << kMantissa);
  }
  // An FP32 number whose last place is the grid's subnormal step: the addition rounds.
  constexpr uint32_t kMagic = static_cast<uint32_t>(127 + kMinExponent - kMantissa + 23) << 23;
  const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kMagic);
  return std::bit_cast<uint32_t>(sum) - kMagic;
}

}  // namespace

float DecodeFp16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t magnitude = bits & 0x7FFFU;
  if (magnitude > 0x7C00U) {
    return std::bit_cast<float>(sign | kQuietNanBits | (magnitude << 13));
  }
  if (magnitude == 0x7C00U) {
    return std::bit_cast<float>(sign | kInfinityBits);
  }
  if (magnitude < 0x0400U) {
    const float value = static_cast<float>(magnitude) * 0x1p-24F;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112U << 23)));
}

uint16_t EncodeFp16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits & kSignBit) >> 16;
  const uint32_t magnitude = bits & ~kSignBit;
  if (magnitude > kInfinityBits) {
    return static_cast<uint16_t>(sign | 0x7E00U | ((magnitude >> 13) & 0x3FFU));
  }
  // 65536 and everything above round to infinity, whose code follows the largest number's.
  const uint32_t capped = std::min(magnitude, std::bit_cast<uint32_t>(65536.0F));
  return static_cast<uint16_t>(sign | RoundToGrid<10, -14>(capped));
}

float DecodeE4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80U) << 24;
  const uint32_t magnitude = code & 0x7FU;
  if (magnitude == kE4m3Nan) {
    return std::bit_cast<float>(sign | kQuietNanBits);
  }
  if (magnitude < 8U) {
    const float value = static_cast<float>(magnitude) * 0x1p-9F;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120U << 23)));
}

uint8_t EncodeE4m3(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & ~kSignBit;
  if (magnitude > kInfinityBits) {
    return kE4m3Nan;
  }
  const uint32_t capped = std::min(magnitude, std::bit_cast<uint32_t>(kE4m3Max));
  return static_cast<uint8_t>(((bits & kSignBit) >> 24) | RoundToGrid<3, -6>(capped));
}

uint8_t EncodeE2m1(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & ~kSignBit;
  if (magnitude > kInfinityBits) {
    return 0;
  }
  const uint32_t capped = std::min(magnitude, std::bit_cast<uint32_t>(kE2m1Max));
  return static_cast<uint8_t>(((bits & kSignBit) >> 28) | RoundToGrid<1, 0>(capped));
}

uint8_t EncodeE8m0RoundUp(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value) & ~kSignBit;
  if (bits >= kInfinityBits) {
    return kE8m0Nan;
  }
  constexpr uint32_t kSmallest = 0x00400000U;  // 2^-127, a subnormal FP32
  if (bits <= kSmallest) {
    return 0;
  }
  const uint32_t exponent = bits >> 23;
  const bool power_of_two = (bits & 0x7FFFFFU) == 0;
  return static_cast<uint8_t>(std::min(exponent + (power_of_two ? 0U : 1U), 254U));
}

}  // namespace hopyard::formats
