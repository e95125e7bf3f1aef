// SPDX-License-Identifier: Apache-2.0
// The vectorised inner loops of the formats: one table of functions per instruction set, all equal
// to the scalar one bit for bit. Lengths are in elements; 4-bit codes have even lengths. `in` and
// `out` may be the same array. Nothing here allocates or throws.
#pragma once

#include <cstdint>

#include "hopyard/quantize.h"

#include "core/cpu_features.h"
#include "formats/rows.h"

namespace hopyard::formats {

struct RowKernels {
  // Largest FP32 bit pattern of |in[i]|, 0 for an empty row: see scales.h.
  uint32_t (*max_abs_bits)(const float* in, int64_t n);

  void (*bf16_to_float)(const uint16_t* in, float* out, int64_t n);
  void (*float_to_bf16)(const float* in, uint16_t* out, int64_t n);
  void (*fp16_to_float)(const uint16_t* in, float* out, int64_t n);
  void (*float_to_fp16)(const float* in, uint16_t* out, int64_t n);

  // One FP8 scale for the whole length; the divisor and the multiplier are finite.
  void (*encode_fp8_divide)(const float* in, uint8_t* codes, int64_t n, float divisor);
  void (*encode_fp8_multiply)(const float* in, uint8_t* codes, int64_t n, float multiplier);
  void (*decode_fp8)(const uint8_t* codes, float* out, int64_t n, float scale);

  // Block formats: scales [ceil(n / block)].
  void (*encode_mxfp8)(const float* in, uint8_t* codes, uint8_t* scales, int64_t n);
  void (*encode_mxfp4)(const float* in, uint8_t* codes, uint8_t* scales, int64_t n);
  void (*encode_nvfp4)(const float* in, uint8_t* codes, uint8_t* scales, int64_t n, float g);
  void (*encode_mxint4)(const float* in, uint8_t* codes, uint16_t* scales, int64_t n);
  void (*decode_mxfp8)(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n);
  void (*decode_mxfp4)(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n);
  void (*decode_nvfp4)(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n,
                       float global_scale);
  void (*decode_mxint4)(const uint8_t* codes, const uint16_t* scales, float* out, int64_t n);

  // Encode and decode in one pass, without codes.
  void (*round_bf16)(const float* in, float* out, int64_t n);
  void (*round_fp8)(const float* in, float* out, int64_t n, float divisor);
  void (*round_mxfp8)(const float* in, float* out, int64_t n);
  void (*round_nvfp4)(const float* in, float* out, int64_t n, float g, float global_scale);
};

// The table of an instruction set, which must be one that this machine runs. Throws kInternal where
// the library was built without it.
const RowKernels& KernelsFor(Isa isa);
// The table of BestIsa().
const RowKernels& BestKernels();

// Tables of the units; null where the compiler's target lacks the instruction set.
const RowKernels* ScalarRowKernels();
const RowKernels* Avx2RowKernels();
const RowKernels* Avx512RowKernels();

// The public functions and those of rows.h over a given table.
void RoundRowWith(const RowKernels& kernels, Format format, const float* in, float* out,
                  int64_t cols, float scale);
float QuantizeWith(const RowKernels& kernels, const TensorView& source,
                   const QuantizedView& destination);
void DequantizeWith(const RowKernels& kernels, const QuantizedView& source,
                    const TensorView& destination);

// A stored row as DecodeRow takes it.
struct StoredRow {
  Format format = Format::kBf16;
  const void* codes = nullptr;
  const void* scales = nullptr;
  float global_scale = 1.0F;
};
void DecodeRowWith(const RowKernels& kernels, const StoredRow& row, float* out, int64_t cols);

}  // namespace hopyard::formats
