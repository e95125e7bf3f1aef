// SPDX-License-Identifier: Apache-2.0
#include "formats/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/shape.h"
#include "formats/row_kernels.h"
#include "formats/scales.h"

namespace hopyard::formats {
namespace {

// FP8 with one dynamic scale per `block` columns.
void RoundFp8Blocks(const RowKernels& kernels, const float* in, float* out, int64_t cols,
                    int64_t block) {
  for (int64_t begin = 0; begin < cols; begin += block) {
    const int64_t length = std::min(block, cols - begin);
    const float divisor = Fp8BlockDivisor(kernels.max_abs_bits(in + begin, length));
    if (std::isnan(divisor)) {
      std::fill_n(out + begin, length, std::numeric_limits<float>::quiet_NaN());
    } else {
      kernels.round_fp8(in + begin, out + begin, length, divisor);
    }
  }
}

void RoundNvFp4(const RowKernels& kernels, const float* in, float* out, int64_t cols,
                float global_scale) {
  if (global_scale > 0.0F) {
    kernels.round_nvfp4(in, out, cols, NvFp4MultiplierOf(global_scale), global_scale);
    return;
  }
  const float g = NvFp4Multiplier(kernels.max_abs_bits(in, cols));
  kernels.round_nvfp4(in, out, cols, g, 1.0F / g);
}

void DecodeFp8Blocks(const RowKernels& kernels, const StoredRow& row, float* out, int64_t cols) {
  const auto* codes = static_cast<const uint8_t*>(row.codes);
  const auto* scales = static_cast<const float*>(row.scales);
  for (int64_t begin = 0; begin < cols; begin += kFp8Block) {
    kernels.decode_fp8(codes + begin, out + begin, std::min(kFp8Block, cols - begin),
                       scales[begin / kFp8Block]);
  }
}

}  // namespace

const RowKernels& KernelsFor(Isa isa) {
  const RowKernels* kernels = nullptr;
  switch (isa) {
    case Isa::kScalar:
      kernels = ScalarRowKernels();
      break;
    case Isa::kAvx2:
      kernels = Avx2RowKernels();
      break;
    case Isa::kAvx512:
      kernels = Avx512RowKernels();
      break;
  }
  HOPYARD_INTERNAL(kernels != nullptr) << "built without the row kernels of " << ToString(isa);
  return *kernels;
}

const RowKernels& BestKernels() {
  static const RowKernels& kernels = KernelsFor(BestIsa());
  return kernels;
}

void RoundRowWith(const RowKernels& kernels, Format format, const float* in, float* out,
                  int64_t cols, float scale) {
  switch (format) {
    case Format::kBf16:
      kernels.round_bf16(in, out, cols);
      return;
    case Format::kFp8PerTensor:
      kernels.round_fp8(in, out, cols, scale);
      return;
    case Format::kFp8PerRow:
      RoundFp8Blocks(kernels, in, out, cols, std::max<int64_t>(cols, 1));
      return;
    case Format::kFp8Block1x128:
      RoundFp8Blocks(kernels, in, out, cols, kFp8Block);
      return;
    case Format::kMxFp8:
      kernels.round_mxfp8(in, out, cols);
      return;
    case Format::kNvFp4:
      RoundNvFp4(kernels, in, out, cols, scale);
      return;
    case Format::kFp16:
    case Format::kFp8Block128:
    case Format::kMxFp4:
    case Format::kMxInt4:
      break;
  }
  HOPYARD_INTERNAL(false) << "RoundRow has no format " << ToString(format);
}

void DecodeRowWith(const RowKernels& kernels, const StoredRow& row, float* out, int64_t cols) {
  const auto* bytes = static_cast<const uint8_t*>(row.codes);
  const auto* byte_scales = static_cast<const uint8_t*>(row.scales);
  switch (row.format) {
    case Format::kBf16:
      kernels.bf16_to_float(static_cast<const uint16_t*>(row.codes), out, cols);
      return;
    case Format::kFp16:
      kernels.fp16_to_float(static_cast<const uint16_t*>(row.codes), out, cols);
      return;
    case Format::kFp8PerTensor:
      kernels.decode_fp8(bytes, out, cols, row.global_scale);
      return;
    case Format::kFp8PerRow:
      kernels.decode_fp8(bytes, out, cols, *static_cast<const float*>(row.scales));
      return;
    case Format::kFp8Block1x128:
    case Format::kFp8Block128:
      DecodeFp8Blocks(kernels, row, out, cols);
      return;
    case Format::kMxFp8:
      kernels.decode_mxfp8(bytes, byte_scales, out, cols);
      return;
    case Format::kMxFp4:
      kernels.decode_mxfp4(bytes, byte_scales, out, cols);
      return;
    case Format::kNvFp4:
      kernels.decode_nvfp4(bytes, byte_scales, out, cols, row.global_scale);
      return;
    case Format::kMxInt4:
      kernels.decode_mxint4(bytes, static_cast<const uint16_t*>(row.scales), out, cols);
      return;
  }
}

void RoundRow(Format format, const float* in, float* out, int64_t cols, float scale) {
  RoundRowWith(BestKernels(), format, in, out, cols, scale);
}

void Bf16ToFloat(const uint16_t* in, float* out, int64_t cols) {
  BestKernels().bf16_to_float(in, out, cols);
}

void FloatToBf16(const float* in, uint16_t* out, int64_t cols) {
  BestKernels().float_to_bf16(in, out, cols);
}

void DecodeRow(Format format, const void* codes, const void* scales, float global_scale, float* out,
               int64_t cols) {
  DecodeRowWith(BestKernels(), {format, codes, scales, global_scale}, out, cols);
}

int64_t SwizzledSize(int64_t rows, int64_t cols) {
  return RoundUp(rows, 128) * RoundUp(cols, 4);
}

}  // namespace hopyard::formats
