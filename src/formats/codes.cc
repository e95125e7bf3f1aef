// SPDX-License-Identifier: Apache-2.0
#include "formats/codes.h"

#include <algorithm>
#include <bit>

namespace hopyard::formats {

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

}  // namespace hopyard::formats
