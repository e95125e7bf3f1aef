// SPDX-License-Identifier: Apache-2.0
#include "formats/scales.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>

#include "formats/codes.h"

namespace hopyard::formats {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// numerator / amax, at most FLT_MAX, 1 for a zero amax.
float MultiplierFor(float numerator, uint32_t max_abs_bits) {
  if (max_abs_bits >= kNonFiniteBits) {
    return kNan;
  }
  if (max_abs_bits == 0) {
    return 1.0F;
  }
  return std::min(numerator / std::bit_cast<float>(max_abs_bits), FLT_MAX);
}

}  // namespace

float Fp8BlockDivisor(uint32_t max_abs_bits) {
  if (max_abs_bits >= kNonFiniteBits) {
    return kNan;
  }
  return std::max(std::bit_cast<float>(max_abs_bits) / kE4m3Max, FLT_MIN);
}

float Fp8TensorMultiplier(uint32_t max_abs_bits) {
  return MultiplierFor(kE4m3Max, max_abs_bits);
}

float NvFp4Multiplier(uint32_t max_abs_bits) {
  return MultiplierFor(kE4m3Max * kE2m1Max, max_abs_bits);
}

float NvFp4MultiplierOf(float global_scale) {
  return std::min(1.0F / global_scale, FLT_MAX);
}

BlockScale MxBlockScale(uint32_t max_abs_bits, float largest_code) {
  if (max_abs_bits >= kNonFiniteBits) {
    return {kE8m0Nan, kNan, 0.0F};
  }
  const uint8_t code = EncodeE8m0RoundUp(std::bit_cast<float>(max_abs_bits) / largest_code);
  // amax / 6 is below 2^126, so that 2^(127 - code) is always a normal number.
  const auto factor = std::bit_cast<float>((254U - code) << 23);
  return {code, DecodeE8m0(code), factor};
}

BlockScale NvFp4BlockScale(uint32_t max_abs_bits, float g) {
  if (max_abs_bits >= kNonFiniteBits || std::isnan(g)) {
    return {kE4m3Nan, kNan, 0.0F};
  }
  const uint8_t code = EncodeE4m3((g * std::bit_cast<float>(max_abs_bits)) / kE2m1Max);
  if (code == 0) {
    return {};
  }
  const float value = DecodeE4m3(code);
  const float step = value / g;
  return {code, value, std::min(1.0F / step, FLT_MAX)};
}

Int4Scale Int4BlockScale(float max, float min) {
  const float positive = (max * 8.0F) / 7.0F;
  const float extreme = std::min(std::max(positive, -min), FLT_MAX);
  const float eighth = extreme / 8.0F;
  const float divisor = eighth == 0.0F ? 1.0F : eighth;
  return {EncodeBf16(divisor), divisor};
}

float MxScaleValue(uint8_t code) {
  return DecodeE8m0(code);
}

float NvFp4ScaleValue(uint8_t code) {
  return DecodeE4m3(code);
}

float Int4ScaleValue(uint16_t code) {
  return DecodeBf16(code);
}

}  // namespace hopyard::formats
