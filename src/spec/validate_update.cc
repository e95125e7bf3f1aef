// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "core/error.h"
#include "core/shape.h"
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

void CheckValues(const WeightSlice& slice, const SliceTarget& target, const Place& place) {
  const formats::WeightFormatRule rule = formats::RuleOf(target.format);
  const TensorView& values = slice.values;
  HOPYARD_CHECK(values.dtype == rule.code_dtype && values.ndim == 2, kInvalidArgument)
      << "slice.values is " << ToString(values.dtype) << ' ' << ShapeString(values)
      << "; wanted a matrix of " << ToString(rule.code_dtype);
  place.CheckMemory(values, "slice.values");
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

// One direction of a slice: elements [begin, end) of [0, size), of which `block` share a scale.
struct Extent {
  const char* name = "";
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size = 0;
  int64_t block = 1;
  int64_t phase = 0;   // of `begin` in its block
  int64_t before = 0;  // elements of other parts of the stored matrix
  int64_t after = 0;
};

// Scales of blocks that hold more than the slice would change the value of what is not written.
void CheckOwnBlocks(const Extent& extent, const SliceTarget& target) {
  const int64_t end_phase = (extent.phase + extent.end - extent.begin) % extent.block;
  HOPYARD_CHECK(end_phase == 0 || extent.end == extent.size, kInvalidArgument)
      << "slice ends at " << extent.name << ' ' << extent.end << ", inside a scale block of "
      << extent.block << "; end on a block boundary or at the matrix's end, " << extent.size;
  const bool shares_first = extent.phase != 0 && extent.before > 0;
  const bool shares_last = end_phase != 0 && extent.after > 0;
  HOPYARD_CHECK(!shares_first && !shares_last, kUnsupported)
      << "slice.scales of " << ToString(target.format) << ": the " << extent.name << "s "
      << extent.begin << " to " << extent.end << (shares_first ? " begin" : " end")
      << " inside a scale block of " << extent.block
      << " that gate and up share; update kGemm1 whole";
}

// The scales are those of the values: all of them and no others.
void CheckCoverage(const WeightSlice& slice, const Extent& rows, const Extent& cols,
                   bool per_row_scale) {
  const auto blocks = [](const Extent& extent) {
    return extent.end == extent.begin
               ? int64_t{0}
               : CeilDiv(extent.phase + extent.end - extent.begin, extent.block);
  };
  const TensorView& scales = slice.scales;
  const int64_t want_rows = blocks(rows);
  const int64_t want_cols = blocks(cols);
  HOPYARD_CHECK(scales.shape[0] == want_rows && (per_row_scale || scales.shape[1] == want_cols),
                kInvalidArgument)
      << "slice.scales has shape " << ShapeString(scales) << "; wanted [" << want_rows
      << (per_row_scale ? "]" : ", " + std::to_string(want_cols) + "]")
      << ", the scale blocks of slice.values " << ShapeString(slice.values);
}

// Where the slice ends: after its values, or after the blocks that its scales alone address.
int64_t EndOfSlice(const Extent& extent, int64_t num_values, int64_t num_scales) {
  return num_values >= 0
             ? extent.begin + num_values
             : std::min(extent.size, extent.begin - extent.phase + num_scales * extent.block);
}

void CheckScaleBlocks(const WeightSlice& slice, const SliceTarget& target) {
  const formats::WeightFormatRule rule = formats::RuleOf(target.format);
  const bool given = slice.values.defined();
  const int64_t row_block = rule.scale_block_rows;
  const int64_t col_block = rule.per_row_scale ? target.cols : rule.scale_block;
  const int64_t col_origin = rule.per_row_scale ? 0 : target.col_origin;
  Extent rows{"row", slice.row_begin, 0, target.rows, row_block};
  rows.phase = (target.row_origin + slice.row_begin) % row_block;
  rows.before = target.rows_before;
  rows.after = target.rows_after;
  rows.end = EndOfSlice(rows, given ? slice.values.shape[0] : -1, slice.scales.shape[0]);
  Extent cols{"column", slice.col_begin, 0, target.cols, col_block};
  cols.phase = (col_origin + slice.col_begin) % col_block;
  cols.end = EndOfSlice(cols, given ? slice.values.shape[1] * rule.codes_per_byte : -1,
                        rule.per_row_scale ? 1 : slice.scales.shape[1]);
  HOPYARD_CHECK((rows.phase == 0 || rows.begin == 0) && (cols.phase == 0 || cols.begin == 0),
                kInvalidArgument)
      << "slice begins at row " << rows.begin << ", column " << cols.begin
      << ", inside a scale block of " << row_block << " x " << col_block
      << "; begin on a block boundary";
  if (given) {
    CheckCoverage(slice, rows, cols, rule.per_row_scale);
  }
  if (rows.end > rows.begin && cols.end > cols.begin) {
    CheckOwnBlocks(rows, target);
    CheckOwnBlocks(cols, target);
  }
}

void CheckScales(const WeightSlice& slice, const SliceTarget& target, const Place& place) {
  const formats::WeightFormatRule rule = formats::RuleOf(target.format);
  const TensorView& scales = slice.scales;
  HOPYARD_CHECK(rule.scale_block > 0 || rule.per_row_scale, kInvalidArgument)
      << "slice.scales is given, but " << ToString(target.format) << " has no such scales";
  HOPYARD_CHECK(scales.dtype == rule.scale_dtype && scales.ndim == (rule.per_row_scale ? 1 : 2),
                kInvalidArgument)
      << "slice.scales is " << ToString(scales.dtype) << ' ' << ShapeString(scales) << "; wanted "
      << ToString(rule.scale_dtype) << (rule.per_row_scale ? " [rows]" : " matrix");
  place.CheckMemory(scales, "slice.scales");
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
  const int64_t rows = scales.shape[0];
  const int64_t cols = rule.per_row_scale ? 1 : scales.shape[1];
  HOPYARD_CHECK(rows <= target.rows && cols <= target.cols &&
                    LastBlockBegin(slice.row_begin, rows, row_block, row_phase) < target.rows &&
                    LastBlockBegin(slice.col_begin, cols, col_block, col_phase) < target.cols,
                kInvalidArgument)
      << "slice.scales " << ShapeString(scales) << " reaches beyond the matrix [" << target.rows
      << ", " << target.cols << "]";
  CheckScaleBlocks(slice, target);
}

void CheckBias(const WeightSlice& slice, const SliceTarget& target, const Place& place) {
  const TensorView& bias = slice.bias;
  HOPYARD_CHECK(target.has_bias, kInvalidArgument)
      << "slice.bias is given, but these weights have no bias";
  HOPYARD_CHECK(bias.dtype == target.bias_dtype && bias.ndim == 1, kInvalidArgument)
      << "slice.bias is " << ToString(bias.dtype) << ' ' << ShapeString(bias) << "; wanted "
      << ToString(target.bias_dtype) << " [rows]";
  place.CheckMemory(bias, "slice.bias");
  HOPYARD_CHECK(IsWithin(slice.row_begin, bias.shape[0], target.rows), kInvalidArgument)
      << "slice.bias " << ShapeString(bias) << " at row " << slice.row_begin << " is not within ["
      << target.rows << "]";
  HOPYARD_CHECK(!slice.values.defined() || bias.shape[0] == slice.values.shape[0], kInvalidArgument)
      << "slice.bias has shape " << ShapeString(bias) << "; wanted [" << slice.values.shape[0]
      << "], one per row of slice.values";
}

// A global scale multiplies the whole stored matrix of the expert, also what the slice leaves
// alone.
void CheckGlobalScale(const WeightSlice& slice, const SliceTarget& target, const Place& place) {
  HOPYARD_CHECK(target.has_global_scale, kInvalidArgument)
      << "slice.global_scale is given, but these weights have no global scales";
  place.CheckTensor(slice.global_scale, {"slice.global_scale", {DType::kFloat32}, {1}});
  const float scale = place.Read(slice.global_scale, 1).front();
  HOPYARD_CHECK(std::isfinite(scale), kInvalidArgument)
      << "slice.global_scale holds " << scale << "; wanted a finite number";
  if (scale == target.global_scale) {
    return;
  }
  HOPYARD_CHECK(target.rows_before + target.rows_after == 0, kUnsupported)
      << "slice.global_scale holds " << scale << ", but gate and up share the one that holds "
      << target.global_scale << "; set it by a slice of kGemm1";
  const bool alone = !slice.values.defined() && !slice.scales.defined();
  const bool whole =
      slice.values.defined() && slice.values.shape[0] == target.rows &&
      slice.values.shape[1] * formats::RuleOf(target.format).codes_per_byte == target.cols;
  HOPYARD_CHECK(alone || whole, kInvalidArgument)
      << "slice.global_scale holds " << scale << ", but what the slice leaves unwritten was made "
      << "for " << target.global_scale
      << "; give values of the whole matrix, or the global scale in a slice of its own";
}

}  // namespace

void ValidateSlice(const WeightSlice& slice, const SliceTarget& target, const Place& place) {
  if (slice.values.defined()) {
    CheckValues(slice, target, place);
  }
  if (slice.scales.defined()) {
    CheckScales(slice, target, place);
  }
  if (slice.bias.defined()) {
    CheckBias(slice, target, place);
  }
  if (slice.global_scale.defined()) {
    CheckGlobalScale(slice, target, place);
  }
}

}  // namespace hopyard::spec
