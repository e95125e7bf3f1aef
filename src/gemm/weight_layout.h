// SPDX-License-Identifier: Apache-2.0
// Where a natural row of an expert's matrix lies in memory, whatever the layout. On the host and on
// the device: the CPU kernels and the updates of both backends go by it.
#pragma once

#include <cstdint>

#include "hopyard/weights.h"

#include "core/host_device.h"
#include "formats/format_rules.h"
#include "formats/row_map.h"
#include "formats/rows.h"
#include "gemm/packed_order.h"

namespace hopyard::gemm {

// One expert's matrix of natural rows (gate and up are matrices of their own, also when fused).
struct MatrixRef {
  WeightFormat format = WeightFormat::kBf16;
  MajorOrder major = MajorOrder::kKMajor;
  ScaleLayout scale_layout = ScaleLayout::kLinear;
  RowMap row_map = RowMap::kNatural;
  uint8_t* values = nullptr;
  int64_t value_stride = 0;  // bytes: row to row (K-major), k to k (MN-major), block to block
  uint8_t* scales = nullptr;
  int64_t scale_stride = 0;  // elements from scale row to scale row (linear), columns (swizzled)
  float* global_scale = nullptr;  // read at run time, so that updates take effect
  void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
  int64_t rows = 0;            // natural rows of this part
  int64_t cols = 0;            // K
  int64_t position_begin = 0;  // position of natural row j in the stored order: begin + j * step
  int64_t position_step = 1;
  int64_t row_origin = 0;
  int64_t col_origin = 0;
  PackedOrder packed;  // where codes and scales are written instead
};

// One expert: gate (or the only matrix of an activation that is not gated), up, and GEMM2.
struct ExpertRef {
  MatrixRef gate;
  MatrixRef up;
  MatrixRef down;
  float* gemm2_input_scale = nullptr;
  const float* alpha = nullptr;  // null: the spec's
  const float* beta = nullptr;
  const float* limit = nullptr;
};

// Index of natural row j in values, bias and row-wise scales.
[[nodiscard]] HOPYARD_HOST_DEVICE int64_t StoredRow(const MatrixRef& matrix, int64_t row) {
  return formats::StoredPosition(matrix.row_map,
                                 matrix.position_begin + row * matrix.position_step);
}

inline constexpr int64_t kKBlockBytes = 128;  // BlockMajorK: bytes of K per block (spec 1.1)

// Address of the byte that holds element (row, col), col even for packed codes; `rule` is that of
// the matrix's format.
[[nodiscard]] HOPYARD_HOST_DEVICE uint8_t* ValueAddress(const MatrixRef& matrix,
                                                        const formats::WeightFormatRule& rule,
                                                        int64_t row, int64_t col) {
  const int64_t stored = StoredRow(matrix, row);
  const int64_t byte = col * SizeOf(rule.code_dtype) / rule.codes_per_byte;
  switch (matrix.major) {
    case MajorOrder::kKMajor:
      return matrix.values + stored * matrix.value_stride + byte;
    case MajorOrder::kMnMajor:
      return matrix.values + col * matrix.value_stride + stored * SizeOf(rule.code_dtype);
    case MajorOrder::kBlockKMajor:
      return matrix.values + byte / kKBlockBytes * matrix.value_stride + stored * kKBlockBytes +
             byte % kKBlockBytes;
  }
  return nullptr;
}

// Address of the block or row scale that governs (row, col); null where the format has none.
[[nodiscard]] HOPYARD_HOST_DEVICE uint8_t* ScaleAddress(const MatrixRef& matrix,
                                                        const formats::WeightFormatRule& rule,
                                                        int64_t row, int64_t col) {
  if (matrix.scales == nullptr) {
    return nullptr;
  }
  const int64_t size = SizeOf(rule.scale_dtype);
  if (rule.per_row_scale) {
    return matrix.scales + StoredRow(matrix, row) * matrix.scale_stride * size;
  }
  if (rule.scale_block == 0) {
    return nullptr;
  }
  // Scales of 128-row blocks follow the order before the row map, which stays within such a block.
  const int64_t scale_row =
      rule.scale_block_rows > 1
          ? (matrix.row_origin + matrix.position_begin + row * matrix.position_step) /
                rule.scale_block_rows
          : StoredRow(matrix, row);
  const int64_t scale_col = (matrix.col_origin + col) / rule.scale_block;
  const int64_t index = matrix.scale_layout == ScaleLayout::kLinear
                            ? scale_row * matrix.scale_stride + scale_col
                            : formats::SwizzledOffset(scale_row, scale_col, matrix.scale_stride);
  return matrix.scales + index * size;
}

}  // namespace hopyard::gemm
