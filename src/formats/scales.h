// SPDX-License-Identifier: Apache-2.0
// The scale rules of docs/formats.md: from a block's extreme values to its stored scale and to the
// number that its elements are multiplied with or divided by. Out of line on purpose: the units
// that are compiled per instruction set must not carry copies of inline functions.
#pragma once

#include <cstdint>

namespace hopyard::formats {

// Columns that share a scale.
inline constexpr int64_t kFp8Block = 128;
inline constexpr int64_t kMxBlock = 32;
inline constexpr int64_t kNvFp4Block = 16;

// A block's largest magnitude travels as the FP32 bit pattern of |x|: its integer order is the
// numeric order with infinity and NaN on top, so that neither can get lost in a maximum.
inline constexpr uint32_t kNonFiniteBits = 0x7F800000U;

// max(amax / 448, FLT_MIN); NaN for a block that holds NaN or infinity.
float Fp8BlockDivisor(uint32_t max_abs_bits);

// Multiplier g of FP8 per tensor: 448 / amax, at most FLT_MAX, 1 for zero; NaN as above.
float Fp8TensorMultiplier(uint32_t max_abs_bits);

// Multiplier g of NVFP4: 448 * 6 / amax, at most FLT_MAX, 1 for zero; NaN as above.
float NvFp4Multiplier(uint32_t max_abs_bits);

// The same from a given positive global scale m: min(1 / m, FLT_MAX).
float NvFp4MultiplierOf(float global_scale);

struct BlockScale {
  uint8_t code = 0;     // as stored
  float value = 0.0F;   // decoded; NaN for a block that holds NaN or infinity
  float factor = 0.0F;  // code of x = round(x * factor); 0: every code of the block is 0
};

// MXFP8 (largest_code 448) and MXFP4 (6): e8m0, rounded up.
BlockScale MxBlockScale(uint32_t max_abs_bits, float largest_code);

// NVFP4: e4m3 scale under the tensor's multiplier g.
BlockScale NvFp4BlockScale(uint32_t max_abs_bits, float g);

struct Int4Scale {
  uint16_t code = 0;     // bf16, as stored
  float divisor = 1.0F;  // FP32 scale that elements are divided by
};

// MXINT4 of a finite block with these extremes.
Int4Scale Int4BlockScale(float max, float min);

// A stored block scale, decoded.
float MxScaleValue(uint8_t code);
float NvFp4ScaleValue(uint8_t code);
float Int4ScaleValue(uint16_t code);

}  // namespace hopyard::formats
