// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "hopyard/tensor.h"

namespace hopyard {

// Number formats of matrices [rows, cols], cols being the dimension that GEMMs sum over.
// docs/formats.md states each one's FP32 operation sequence and tie rule.
enum class Format : uint8_t {
  kBf16,
  kFp16,           // input only: Quantize from it, no layer computes in it
  kFp8PerTensor,   // e4m3; one f32 scale, value = code * scale
  kFp8PerRow,      // e4m3; f32 scale per row (per token of activations, per channel of weights)
  kFp8Block1x128,  // e4m3; f32 scale per row and 128 columns
  kFp8Block128,    // e4m3; f32 scale per 128 rows x 128 columns
  kMxFp8,          // e4m3; e8m0 scale per 32 columns
  kMxFp4,          // e2m1; e8m0 scale per 32 columns
  kNvFp4,          // e2m1; e4m3 scale per 16 columns, f32 global: value = code * scale * global
  kMxInt4,         // int4; bf16 scale per 32 columns
};

[[nodiscard]] std::string_view ToString(Format format);

// Order of the scale matrix [M, C] in memory.
enum class ScaleLayout : uint8_t {
  kLinear,         // row-major
  kSwizzled128x4,  // rows padded to 128, columns to 4, padding zero; offsets in docs/formats.md
};

// Shapes that a format needs for a [rows, cols] matrix.
struct FormatShape {
  DType code_dtype = DType::kBf16;
  int64_t code_cols = 0;  // bytes per row for packed 4-bit codes, elements otherwise
  DType scale_dtype = DType::kFloat32;
  int64_t scale_rows = 0;  // 0 where the format has no scale tensor
  int64_t scale_cols = 0;
  int64_t scale_numel = 0;  // elements to allocate in the chosen layout
};

// Throws Error{kInvalidArgument} for negative sizes or odd cols of a 4-bit format.
[[nodiscard]] FormatShape ShapeOf(Format format, int64_t rows, int64_t cols,
                                  ScaleLayout layout = ScaleLayout::kLinear);

// A quantised matrix. `codes` [rows, code_cols], rows may be strided; `scales` holds scale_numel
// elements, any shape, contiguous; absent for kBf16, kFp16 and kFp8PerTensor. Codes and scales of
// one byte may have dtype kUint8. `global_scale` is a multiplier of every value of kFp8PerTensor
// and kNvFp4 (there 1/g); other formats have none, and want 1 (or 0).
struct QuantizedView {
  Format format = Format::kBf16;
  TensorView codes;
  TensorView scales;
  ScaleLayout scale_layout = ScaleLayout::kLinear;
  float global_scale = 1.0F;
};

// source [rows, cols] f32, bf16 or f16, rows may be strided, columns contiguous.
// Dynamic scales are computed from the data. For kNvFp4 `global_scale` <= 0 asks for g = 448 * 6 /
// amax of the tensor; the one used is returned (as the multiplier 1/g). For kFp8PerTensor a
// positive `global_scale` is used as the static scale, otherwise 1/g with g = 448 / amax; the scale
// used is returned. Every other format returns 1. A block that holds NaN or infinity dequantises to
// NaN. Runs on all threads; bit-identical to the scalar definition whatever the machine.
float Quantize(const TensorView& source, const QuantizedView& destination);

// destination [rows, cols] f32 or bf16 (round to nearest even), columns contiguous.
void Dequantize(const QuantizedView& source, const TensorView& destination);

}  // namespace hopyard
