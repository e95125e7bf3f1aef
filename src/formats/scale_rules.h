// SPDX-License-Identifier: Apache-2.0
// The scale rules of docs/formats.md that activations use, for host and device; scales.h is their
// host interface and says what each one means.
#pragma once

#include <cfloat>
#include <cstdint>

#include "core/host_device.h"
#include "core/ieee.h"
#include "formats/codes.h"
#include "formats/scales.h"

namespace hopyard::formats::rules {

HOPYARD_HOST_DEVICE float ScaleNan() {
  return ieee::FromBits(kQuietNanBits);
}

HOPYARD_HOST_DEVICE float Fp8BlockDivisor(uint32_t max_abs_bits) {
  if (max_abs_bits >= kNonFiniteBits) {
    return ScaleNan();
  }
  return ieee::Max(ieee::Div(ieee::FromBits(max_abs_bits), kE4m3Max), FLT_MIN);
}

// numerator / amax, at most FLT_MAX, 1 for a zero amax.
HOPYARD_HOST_DEVICE float MultiplierFor(float numerator, uint32_t max_abs_bits) {
  if (max_abs_bits >= kNonFiniteBits) {
    return ScaleNan();
  }
  if (max_abs_bits == 0) {
    return 1.0F;
  }
  return ieee::Min(ieee::Div(numerator, ieee::FromBits(max_abs_bits)), FLT_MAX);
}

HOPYARD_HOST_DEVICE float NvFp4Multiplier(uint32_t max_abs_bits) {
  return MultiplierFor(kE4m3Max * kE2m1Max, max_abs_bits);
}

HOPYARD_HOST_DEVICE float NvFp4MultiplierOf(float global_scale) {
  return ieee::Min(ieee::Div(1.0F, global_scale), FLT_MAX);
}

HOPYARD_HOST_DEVICE BlockScale MxBlockScale(uint32_t max_abs_bits, float largest_code) {
  if (max_abs_bits >= kNonFiniteBits) {
    return {kE8m0Nan, ScaleNan(), 0.0F};
  }
  const uint8_t code = EncodeE8m0RoundUp(ieee::Div(ieee::FromBits(max_abs_bits), largest_code));
  // amax / 6 is below 2^126, so that 2^(127 - code) is always a normal number.
  return {code, DecodeE8m0(code), ieee::FromBits((254U - code) << 23)};
}

HOPYARD_HOST_DEVICE BlockScale NvFp4BlockScale(uint32_t max_abs_bits, float g) {
  if (max_abs_bits >= kNonFiniteBits || ieee::IsNan(g)) {
    return {kE4m3Nan, ScaleNan(), 0.0F};
  }
  const float scaled = ieee::Mul(g, ieee::FromBits(max_abs_bits));
  const uint8_t code = EncodeE4m3(ieee::Div(scaled, kE2m1Max));
  if (code == 0) {
    return {};
  }
  const float value = DecodeE4m3(code);
  const float step = ieee::Div(value, g);
  return {code, value, ieee::Min(ieee::Div(1.0F, step), FLT_MAX)};
}

}  // namespace hopyard::formats::rules
