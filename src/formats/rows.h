// SPDX-License-Identifier: Apache-2.0
// Row operations of the formats that the CPU layer uses on activations. Vectorised inside, equal to
// the scalar definition bit for bit.
#pragma once

#include <cstdint>

#include "hopyard/quantize.h"

#include "core/host_device.h"

namespace hopyard::formats {

// out[i] = dequantise(quantise(in[i])) for one row of activations: kBf16, kFp8PerTensor (static
// `scale`: value = code * scale), kFp8PerRow, kFp8Block1x128, kMxFp8, kNvFp4 (`scale` = global
// multiplier 1/g, static; scale <= 0: dynamic for this row, g = 448 * 6 / rowamax). in == out is
// allowed. No allocation, no threads.
void RoundRow(Format format, const float* in, float* out, int64_t cols, float scale);

// bf16 row to floats and back (round to nearest even).
void Bf16ToFloat(const uint16_t* in, float* out, int64_t cols);
void FloatToBf16(const float* in, uint16_t* out, int64_t cols);

// Decodes one stored row: `codes` as in QuantizedView, `scales` the row's linear scales
// ([ceil(cols / block)] of the format's scale dtype; f32 [1] for kFp8PerRow; null for
// kFp8PerTensor and kBf16). Every value is multiplied by `global_scale` at the end where the format
// has one (kFp8PerTensor, kNvFp4).
void DecodeRow(Format format, const void* codes, const void* scales, float global_scale, float* out,
               int64_t cols);

// Offset of scale (m, k) of an [M, C] scale matrix in the 128x4 layout (docs/formats.md), and its
// size.
[[nodiscard]] HOPYARD_HOST_DEVICE int64_t SwizzledOffset(int64_t m, int64_t k, int64_t cols) {
  const int64_t tile = (m / 128) * ((cols + 3) / 4) + k / 4;
  return tile * 512 + (m % 32) * 16 + ((m % 128) / 32) * 4 + k % 4;
}
[[nodiscard]] int64_t SwizzledSize(int64_t rows, int64_t cols);

}  // namespace hopyard::formats
