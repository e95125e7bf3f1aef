// SPDX-License-Identifier: Apache-2.0
#include "formats/scales.h"

#include <algorithm>
#include <cfloat>

#include "formats/codes.h"
#include "formats/scale_rules.h"

namespace hopyard::formats {

float Fp8BlockDivisor(uint32_t max_abs_bits) {
  return rules::Fp8BlockDivisor(max_abs_bits);
}

float Fp8TensorMultiplier(uint32_t max_abs_bits) {
  return rules::MultiplierFor(kE4m3Max, max_abs_bits);
}

float NvFp4Multiplier(uint32_t max_abs_bits) {
  return rules::NvFp4Multiplier(max_abs_bits);
}

float NvFp4MultiplierOf(float global_scale) {
  return rules::NvFp4MultiplierOf(global_scale);
}

BlockScale MxBlockScale(uint32_t max_abs_bits, float largest_code) {
  return rules::MxBlockScale(max_abs_bits, largest_code);
}

BlockScale NvFp4BlockScale(uint32_t max_abs_bits, float g) {
  return rules::NvFp4BlockScale(max_abs_bits, g);
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
