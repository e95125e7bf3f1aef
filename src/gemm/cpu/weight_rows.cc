// SPDX-License-Identifier: Apache-2.0
#include "gemm/cpu/weight_rows.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "formats/rows.h"

namespace hopyard::gemm::cpu {
namespace {

Code CodeOf(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return Code::kBf16;
    case WeightFormat::kNvFp4:
    case WeightFormat::kMxFp4:
      return Code::kE2m1;
    case WeightFormat::kMxInt4:
      return Code::kInt4;
    default:
      return Code::kE4m3;
  }
}

// Bytes of the first `cols` codes of a row.
int64_t CodeBytes(const formats::WeightFormatRule& rule, int64_t cols) {
  return cols * SizeOf(rule.code_dtype) / rule.codes_per_byte;
}

float DecodeScale(DType dtype, const uint8_t* address) {
  switch (dtype) {
    case DType::kE8m0:
      return formats::DecodeE8m0(*address);
    case DType::kE4m3:
      return formats::DecodeE4m3(*address);
    case DType::kBf16: {
      uint16_t bits = 0;
      std::memcpy(&bits, address, sizeof(bits));
      return formats::DecodeBf16(bits);
    }
    default: {
      float value = 0.0F;
      std::memcpy(&value, address, sizeof(value));
      return value;
    }
  }
}

// Scales of consecutive blocks, decoded.
void DecodeScales(DType dtype, const uint8_t* scales, int64_t count, float* out) {
  switch (dtype) {
    case DType::kE8m0:
      for (int64_t b = 0; b < count; ++b) {
        out[b] = formats::DecodeE8m0(scales[b]);
      }
      return;
    case DType::kE4m3:
      // Codes without scales: the vectorised decoder.
      formats::DecodeRow(Format::kFp8PerTensor, scales, nullptr, 1.0F, out, count);
      return;
    default: {
      const int64_t size = SizeOf(dtype);
      for (int64_t b = 0; b < count; ++b) {
        out[b] = DecodeScale(dtype, scales + b * size);
      }
    }
  }
}

// The block scales of one row; the origin lies on a step of 16.
void FillBlockScales(const MatrixRef& matrix, const formats::WeightFormatRule& rule, int64_t row,
                     float* out) {
  const int64_t block = rule.scale_block;
  const int64_t count = CeilDiv(matrix.col_origin % block + matrix.cols, block);
  if (matrix.scale_layout == ScaleLayout::kLinear) {
    DecodeScales(rule.scale_dtype, ScaleAddress(matrix, rule, row, 0), count, out);
    return;
  }
  for (int64_t b = 0; b < count; ++b) {
    const int64_t col = std::max<int64_t>(0, b * block - matrix.col_origin % block);
    out[b] = DecodeScale(rule.scale_dtype, ScaleAddress(matrix, rule, row, col));
  }
}

// Any format and layout, element by element, into FP32: for scale blocks that cut a step of 16.
void DecodeSlowly(const MatrixRef& matrix, const formats::WeightFormatRule& rule, int64_t row,
                  float* out) {
  for (int64_t col = 0; col < matrix.cols; ++col) {
    const int64_t even = col - col % rule.codes_per_byte;
    const uint8_t* address = ValueAddress(matrix, rule, row, even);
    const int shift = static_cast<int>(4 * (col - even));
    const auto nibble = static_cast<uint8_t>((*address >> shift) & 15);
    float value = 0.0F;
    switch (CodeOf(matrix.format)) {
      case Code::kBf16:
        value = DecodeScale(DType::kBf16, address);
        break;
      case Code::kE2m1:
        value = formats::DecodeE2m1(nibble);
        break;
      case Code::kInt4:
        value = formats::DecodeInt4(nibble);
        break;
      default:
        value = formats::DecodeE4m3(*address);
    }
    const float scale = DecodeScale(rule.scale_dtype, ScaleAddress(matrix, rule, row, col));
    out[col] = value * scale;
  }
  std::fill(out + matrix.cols, out + RoundUp(matrix.cols, kLanes), 0.0F);
}

// MN-major rows are columns in memory: a whole block of them shares each cache line that is read.
void CopyMnMajor(const BlockArgs& args, uint16_t* copies, int64_t pitch) {
  const MatrixRef& matrix = *args.matrix;
  const formats::WeightFormatRule rule = formats::RuleOf(matrix.format);
  const int64_t step = matrix.position_step;
  if (args.num_rows == kFeatureBlock && matrix.row_map == RowMap::kNatural && step <= 2) {
    GatherArgs gather;
    gather.source = ValueAddress(matrix, rule, args.row_begin, 0);
    gather.stride = matrix.value_stride;
    gather.step = static_cast<int>(step);
    gather.offset = static_cast<int>(matrix.position_begin % step);
    gather.k = matrix.cols;
    gather.out = copies;
    gather.pitch = pitch;
    args.kernels->gather(gather);
    return;
  }
  for (int r = 0; r < args.num_rows; ++r) {
    const uint8_t* source = ValueAddress(matrix, rule, args.row_begin + r, 0);
    for (int64_t k = 0; k < matrix.cols; ++k) {
      std::memcpy(copies + r * pitch + k, source + k * matrix.value_stride, sizeof(uint16_t));
    }
  }
}

void CopyBlockMajor(const MatrixRef& matrix, const formats::WeightFormatRule& rule, int64_t row,
                    uint8_t* copy) {
  const int64_t bytes = CodeBytes(rule, matrix.cols);
  const uint8_t* source = ValueAddress(matrix, rule, row, 0);
  for (int64_t begin = 0; begin < bytes; begin += kKBlockBytes) {
    std::memcpy(copy + begin, source, static_cast<size_t>(std::min(kKBlockBytes, bytes - begin)));
    source += matrix.value_stride;
  }
}

constexpr float kOne = 1.0F;

// Fills rows[0 .. num_rows) of args and returns how their codes are stored.
Code FetchRows(const BlockArgs& args, RowRef* rows) {
  const MatrixRef& matrix = *args.matrix;
  const formats::WeightFormatRule rule = formats::RuleOf(matrix.format);
  const int64_t padded = RoundUp(matrix.cols, kLanes);
  const float global = matrix.global_scale != nullptr ? *matrix.global_scale : 1.0F;
  const bool blocks = rule.scale_block > 0;
  const bool cut_steps = blocks && matrix.col_origin % kLanes != 0;
  if (matrix.major == MajorOrder::kMnMajor) {
    CopyMnMajor(args, static_cast<uint16_t*>(static_cast<void*>(args.scratch.copies)), 2 * padded);
  }
  for (int r = 0; r < args.num_rows; ++r) {
    const int64_t row = args.row_begin + r;
    RowRef& ref = rows[r];
    float* copy = args.scratch.copies + r * padded;
    ref = RowRef{};
    ref.scales = &kOne;
    ref.scale = global;
    if (rule.per_row_scale) {
      ref.scale *= DecodeScale(DType::kFloat32, ScaleAddress(matrix, rule, row, 0));
    }
    if (cut_steps) {
      DecodeSlowly(matrix, rule, row, copy);
      ref.codes = copy;
      continue;
    }
    if (blocks) {
      // A block holds at least one step; one more block where the origin cuts the first.
      float* scales = args.scratch.scales + r * (padded / kLanes + 1);
      FillBlockScales(matrix, rule, row, scales);
      ref.scales = scales;
    }
    if (matrix.major == MajorOrder::kKMajor) {
      ref.codes = ValueAddress(matrix, rule, row, 0);
      continue;
    }
    ref.codes = copy;
    if (matrix.major == MajorOrder::kBlockKMajor) {
      CopyBlockMajor(matrix, rule, row, static_cast<uint8_t*>(static_cast<void*>(copy)));
    }
  }
  return cut_steps ? Code::kF32 : CodeOf(matrix.format);
}

}  // namespace

float BiasAt(const MatrixRef& matrix, int64_t row) {
  if (matrix.bias == nullptr) {
    return 0.0F;
  }
  const auto* bytes = static_cast<const uint8_t*>(matrix.bias);
  return DecodeScale(matrix.bias_dtype, bytes + StoredRow(matrix, row) * SizeOf(matrix.bias_dtype));
}

int64_t RowScratchFloats(int64_t max_cols) {
  const int64_t padded = RoundUp(max_cols, kLanes);
  // Every part is a whole number of 64-byte lines.
  return RoundUp(kFeatureBlock * (padded / kLanes + 1), 16) + (kFeatureBlock + kRowGroup) * padded;
}

RowScratch CarveRowScratch(float* base, int64_t max_cols) {
  const int64_t padded = RoundUp(max_cols, kLanes);
  RowScratch scratch;
  scratch.scales = base;
  scratch.copies = base + RoundUp(kFeatureBlock * (padded / kLanes + 1), 16);
  scratch.panel = scratch.copies + kFeatureBlock * padded;
  return scratch;
}

// Scale blocks of the rows that FetchRows gave, in steps.
ScaleBlocks BlocksOf(const MatrixRef& matrix) {
  const int64_t block = formats::RuleOf(matrix.format).scale_block;
  ScaleBlocks blocks;
  if (block > 0) {
    blocks.shift = std::countr_zero(static_cast<uint64_t>(block / kLanes));
    blocks.first_step = matrix.col_origin % block / kLanes;
  }
  return blocks;
}

// Rows follow each other in memory where they are not copied. Short ones are prefetched whole row
// groups ahead, so that four streams end and the next four begin without a gap; long ones within
// the row. On a 2-core Sapphire Rapids VM (2026-11, weights from memory, T = 1) 8 KiB ahead took
// MXFP4 rows of 2048 from 1.9 to 1.1-1.5 ns per 16 weights and FP8 from 3.1 to 2.0-2.6; rows of
// 4 KiB were best with 1 to 2 KiB.
int64_t PrefetchBytes(const RowRef* rows, int num_rows) {
  constexpr int64_t kAhead = 8192;
  constexpr int64_t kWithinRow = 2048;
  if (num_rows <= kRowGroup) {
    return kWithinRow;
  }
  const int64_t group =
      static_cast<const char*>(rows[kRowGroup].codes) - static_cast<const char*>(rows[0].codes);
  return group > 0 && group <= kAhead ? RoundUp(kAhead, group) : kWithinRow;
}

void DotBlock(const BlockArgs& args) {
  RowRef rows[kFeatureBlock];
  const Code code = FetchRows(args, rows);
  const DotFn dot = args.kernels->dot[static_cast<int>(code)];
  DotArgs group;
  group.x = args.x;
  group.num_tokens = args.num_tokens;
  group.k = args.matrix->cols;
  group.blocks = BlocksOf(*args.matrix);
  group.prefetch_bytes = PrefetchBytes(rows, args.num_rows);
  group.out_stride = kFeatureBlock;
  group.panel = args.scratch.panel;
  for (int r = 0; r < args.num_rows; r += kRowGroup) {
    group.rows = rows + r;
    group.num_rows = std::min(kRowGroup, args.num_rows - r);
    group.out = args.out + r;
    dot(group);
  }
}

}  // namespace hopyard::gemm::cpu
