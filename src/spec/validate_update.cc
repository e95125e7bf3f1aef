// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "formats/format_rules.h"
#include "spec/validate.h"

namespace hopyard::spec {
namespace {

// Whether [begin, begin + extent) lies within [0, size), for any begin.
bool IsWithin(int64_t begin, int64_t extent, int64_t size) {
  return begin >= 0 && extent <= size && begin <= size - extent;
}

// begin + extent, or the largest number; for messages.
int64_t EndOf(int64_t begin, int64_t extent) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  return begin > kMax - extent ? kMax : begin + extent;
}

void CheckValues(const WeightSlice& slice, const SliceTarget& target) {
  const formats::WeightFormatRule rule = formats::RuleOf(target.format);
  const TensorView& values = slice.values;
  HOPYARD_CHECK(values.dtype == rule.code_dtype && values.ndim == 2, kInvalidArgument)
      << "slice.values is " << ToString(values.dtype) << ' ' << ShapeString(values)
      << "; wanted a matrix of " << ToString(rule.code_dtype);
  CheckMemory(values, "slice.values");
  const int64_t rows = values.shape[0];
  const int64_t cols = values.shape[1] * rule.codes_per_byte;
  HOPYARD_CHECK(slice.col_begin % rule.codes_per_byte == 0, kInvalidArgument)
      << "slice.col_begin=" << slice.col_begin << "; wanted an even column, "
      << ToString(target.format) << " packs 2 codes a byte";
  HOPYARD_CHECK(
      IsWithin(slice.row_begin, rows, target.rows) && IsWithin(slice.col_begin, cols, target.cols),
      kInvalidArgument)
      << "slice rows [" << slice.row_begin << ", " << EndOf(slice.row_begin, rows)
      << ") x columns [" << slice.col_begin << ", " << EndOf(slice.col_begin, cols)
      << ") are not within [" << target.rows << ", " << target.cols << "]";
}

// Index of the first element of block `count - 1` of those that begin at `begin`.
int64_t LastBlockBegin(int64_t begin, int64_t count, int64_t block, int64_t phase) {
  return count <= 1 ? begin : begin + (count - 1) * block - phase;
}

void CheckScales(const WeightSlice& slice, const SliceTarget& target) {
  const formats::WeightFormatRule rule = formats::RuleOf(target.format);
  const TensorView& scales = slice.scales;
  HOPYARD_CHECK(rule.scale_block > 0 || rule.per_row_scale, kInvalidArgument)
      << "slice.scales is given, but " << ToString(target.format) << " has no such scales";
  HOPYARD_CHECK(scales.dtype == rule.scale_dtype && scales.ndim == (rule.per_row_scale ? 1 : 2),
                kInvalidArgument)
      << "slice.scales is " << ToString(scales.dtype) << ' ' << ShapeString(scales) << "; wanted "
      << ToString(rule.scale_dtype) << (rule.per_row_scale ? " [rows]" : " matrix");
  CheckMemory(scales, "slice.scales");
  HOPYARD_CHECK(rule.scale_block_rows == 1 || !target.interleaved, kUnsupported)
      << "slice.scales of " << ToString(target.format)
      << " cover gate and up rows together where the two are interleaved; update kGemm1";
  HOPYARD_CHECK(
      IsWithin(slice.row_begin, 0, target.rows) && IsWithin(slice.col_begin, 0, target.cols),
      kInvalidArgument)
      << "slice row " << slice.row_begin << ", column " << slice.col_begin << " are not within ["
      << target.rows << ", " << target.cols << "]";
  const int64_t row_block = rule.scale_block_rows;
  const int64_t col_block = rule.per_row_scale ? 1 : rule.scale_block;
  const int64_t row_phase = (target.row_origin + slice.row_begin) % row_block;
  const int64_t col_phase = (target.col_origin + slice.col_begin) % col_block;
  HOPYARD_CHECK(
      (row_phase == 0 || slice.row_begin == 0) && (col_phase == 0 || slice.col_begin == 0),
      kInvalidArgument)
      << "slice begins at row " << slice.row_begin << ", column " << slice.col_begin
      << ", inside a scale block of " << row_block << " x " << col_block
      << "; begin on a block boundary";
  const int64_t rows = scales.shape[0];
  const int64_t cols = rule.per_row_scale ? 1 : scales.shape[1];
  HOPYARD_CHECK(rows <= target.rows && cols <= target.cols &&
                    LastBlockBegin(slice.row_begin, rows, row_block, row_phase) < target.rows &&
                    LastBlockBegin(slice.col_begin, cols, col_block, col_phase) < target.cols,
                kInvalidArgument)
      << "slice.scales " << ShapeString(scales) << " reaches beyond the matrix [" << target.rows
      << ", " << target.cols << "]";
}

void CheckBias(const WeightSlice& slice, const SliceTarget& target) {
  const TensorView& bias = slice.bias;
  HOPYARD_CHECK(target.has_bias, kInvalidArgument)
      << "slice.bias is given, but these weights have no bias";
  HOPYARD_CHECK(bias.dtype == target.bias_dtype && bias.ndim == 1, kInvalidArgument)
      << "slice.bias is " << ToString(bias.dtype) << ' ' << ShapeString(bias) << "; wanted "
      << ToString(target.bias_dtype) << " [rows]";
  CheckMemory(bias, "slice.bias");
  HOPYARD_CHECK(IsWithin(slice.row_begin, bias.shape[0], target.rows), kInvalidArgument)
      << "slice.bias " << ShapeString(bias) << " at row " << slice.row_begin << " is not within ["
      << target.rows << "]";
}

}  // namespace

void ValidateSlice(const WeightSlice& slice, const SliceTarget& target) {
  if (slice.values.defined()) {
    CheckValues(slice, target);
  }
  if (slice.scales.defined()) {
    CheckScales(slice, target);
  }
  if (slice.bias.defined()) {
    CheckBias(slice, target);
  }
  if (slice.global_scale.defined()) {
    HOPYARD_CHECK(target.has_global_scale, kInvalidArgument)
        << "slice.global_scale is given, but these weights have no global scales";
    CheckTensor(slice.global_scale, {"slice.global_scale", {DType::kFloat32}, {1}});
  }
}

}  // namespace hopyard::spec
