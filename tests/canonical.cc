// SPDX-License-Identifier: Apache-2.0
#include "tests/canonical.h"

#include <algorithm>
#include <cmath>

#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"

namespace hopyard::test {
namespace {

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

}  // namespace

int64_t ScaleBlockCols(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFp8Block128:
      return 128;
    case WeightFormat::kNvFp4:
      return 16;
    case WeightFormat::kMxFp8:
    case WeightFormat::kMxFp4:
    case WeightFormat::kMxInt4:
      return 32;
    default:
      return 0;
  }
}

DType CodeType(WeightFormat format) {
  if (format == WeightFormat::kBf16) {
    return DType::kBf16;
  }
  return CodesPerByte(format) == 2 ? DType::kUint8 : DType::kE4m3;
}

DType ScaleType(WeightFormat format) {
  switch (format) {
    case WeightFormat::kMxFp8:
    case WeightFormat::kMxFp4:
      return DType::kE8m0;
    case WeightFormat::kNvFp4:
      return DType::kE4m3;
    case WeightFormat::kMxInt4:
      return DType::kBf16;
    default:
      return DType::kFloat32;
  }
}

bool HasGlobalScale(WeightFormat format) {
  return format == WeightFormat::kFp8PerTensor || format == WeightFormat::kNvFp4;
}

float MaxMagnitude(const std::vector<float>& values) {
  float largest = 0.0F;
  for (const float value : values) {
    largest = std::max(largest, std::fabs(value));
  }
  return largest;
}

float GlobalFor(WeightFormat format, float largest) {
  return largest / (format == WeightFormat::kNvFp4 ? 448.0F * 6.0F : 448.0F);
}

uint64_t Hash(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  uint64_t x = 0x9E3779B97F4A7C15ULL;
  for (const uint64_t part : {a, b, c, d}) {
    x = (x ^ part) * 0xBF58476D1CE4E5B9ULL;
    x ^= x >> 29;
    x *= 0x94D049BB133111EBULL;
    x ^= x >> 32;
  }
  return x;
}

uint64_t Sequence(uint64_t key, int64_t i) {
  uint64_t x = key + static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

float Normal(uint64_t hash) {
  // Sum of four 16-bit uniforms: close to normal, bounded by 3.5 sigma.
  float sum = 0.0F;
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<float>((hash >> (16 * i)) & 0xFFFF) / 65536.0F;
  }
  return (sum - 2.0F) * 1.7320508F;
}

Format FormatOf(WeightFormat format) {
  return formats::RuleOf(format).format;
}

int64_t CodesPerByte(WeightFormat format) {
  return format == WeightFormat::kNvFp4 || format == WeightFormat::kMxFp4 ||
                 format == WeightFormat::kMxInt4
             ? 2
             : 1;
}

CanonicalMatrix QuantizeMatrix(WeightFormat format, const std::vector<float>& values, int64_t rows,
                               int64_t cols, float global) {
  CanonicalMatrix matrix;
  matrix.format = format;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.row_bytes = cols * SizeOf(CodeType(format)) / CodesPerByte(format);
  matrix.codes.resize(Index(rows * matrix.row_bytes));
  const int64_t block = ScaleBlockCols(format);
  const bool per_channel = format == WeightFormat::kFp8PerChannel;
  if (block > 0 || per_channel) {
    matrix.scale_rows = format == WeightFormat::kFp8Block128 ? CeilDiv(rows, 128) : rows;
    matrix.scale_cols = per_channel ? 1 : CeilDiv(cols, block);
    matrix.scale_bytes = SizeOf(ScaleType(format));
  }
  matrix.scales.resize(Index(matrix.scale_rows * matrix.scale_cols * matrix.scale_bytes));
  QuantizedView view;
  view.format = FormatOf(format);
  view.codes = TensorView::Contiguous(matrix.codes.data(), CodeType(format),
                                      {rows, cols / CodesPerByte(format)});
  if (matrix.scale_rows > 0) {
    view.scales = TensorView::Contiguous(matrix.scales.data(), ScaleType(format),
                                         {matrix.scale_rows, matrix.scale_cols});
  }
  if (HasGlobalScale(format)) {
    matrix.global = global > 0.0F ? global : GlobalFor(format, MaxMagnitude(values));
    view.global_scale = matrix.global;
  }
  Quantize(TensorView::Contiguous(values.data(), DType::kFloat32, {rows, cols}), view);
  return matrix;
}

CanonicalMatrix Crop(const CanonicalMatrix& matrix, const Window& window) {
  CanonicalMatrix part = matrix;
  part.rows = window.rows;
  part.cols = window.cols;
  const int64_t per_value = matrix.row_bytes * 2 / matrix.cols;  // half bytes per value
  const int64_t first_byte = window.col_begin * per_value / 2;
  part.row_bytes = window.cols * per_value / 2;
  part.codes.clear();
  for (int64_t row = window.row_begin; row < window.row_begin + window.rows; ++row) {
    const auto begin = matrix.codes.begin() + row * matrix.row_bytes + first_byte;
    part.codes.insert(part.codes.end(), begin, begin + part.row_bytes);
  }
  if (matrix.scale_rows == 0) {
    return part;
  }
  const int64_t row_block = matrix.format == WeightFormat::kFp8Block128 ? 128 : 1;
  const int64_t block = ScaleBlockCols(matrix.format);
  const int64_t col_block = block > 0 ? block : matrix.cols;
  part.row_origin = window.row_begin % row_block;
  part.col_origin = block > 0 ? window.col_begin % col_block : 0;
  part.scale_rows = CeilDiv(part.row_origin + window.rows, row_block);
  part.scale_cols = block > 0 ? CeilDiv(part.col_origin + window.cols, col_block) : 1;
  part.scales.clear();
  for (int64_t r = 0; r < part.scale_rows; ++r) {
    const int64_t from = (window.row_begin / row_block + r) * matrix.scale_cols +
                         (block > 0 ? window.col_begin / col_block : 0);
    const auto begin = matrix.scales.begin() + from * matrix.scale_bytes;
    part.scales.insert(part.scales.end(), begin, begin + part.scale_cols * matrix.scale_bytes);
  }
  return part;
}

double CanonicalValue(const CanonicalMatrix& matrix, int64_t row, int64_t col) {
  const int64_t per_byte = CodesPerByte(matrix.format);
  const uint8_t* code = matrix.codes.data() + row * matrix.row_bytes +
                        col * SizeOf(CodeType(matrix.format)) / per_byte;
  const auto nibble = static_cast<uint8_t>((*code >> (4 * (col % 2))) & 0xF);
  const int64_t block = ScaleBlockCols(matrix.format);
  const int64_t scale_row =
      matrix.format == WeightFormat::kFp8Block128 ? (matrix.row_origin + row) / 128 : row;
  const int64_t scale_col = block > 0 ? (matrix.col_origin + col) / block : 0;
  const uint8_t* scale =
      matrix.scales.data() + (scale_row * matrix.scale_cols + scale_col) * matrix.scale_bytes;
  const double global = HasGlobalScale(matrix.format) ? static_cast<double>(matrix.global) : 1.0;
  switch (matrix.format) {
    case WeightFormat::kBf16:
      return formats::DecodeBf16(*reinterpret_cast<const uint16_t*>(code));
    case WeightFormat::kFp8PerTensor:
      return formats::DecodeE4m3(*code) * global;
    case WeightFormat::kFp8Block128:
    case WeightFormat::kFp8PerChannel:
      return static_cast<double>(formats::DecodeE4m3(*code)) *
             *reinterpret_cast<const float*>(scale);
    case WeightFormat::kMxFp8:
      return formats::DecodeE4m3(*code) * formats::DecodeE8m0(*scale);
    case WeightFormat::kMxFp4:
      return formats::DecodeE2m1(nibble) * formats::DecodeE8m0(*scale);
    case WeightFormat::kNvFp4:
      return formats::DecodeE2m1(nibble) * formats::DecodeE4m3(*scale) * global;
    case WeightFormat::kMxInt4:
      return formats::DecodeInt4(nibble) *
             formats::DecodeBf16(*reinterpret_cast<const uint16_t*>(scale));
  }
  return 0.0;
}

}  // namespace hopyard::test
