// SPDX-License-Identifier: Apache-2.0
// Where a natural row of an expert's matrix lies in memory, whatever the layout, and how the CPU
// kernels get at it: a pointer where the row is K-contiguous, otherwise a copy in scratch.
#pragma once

#include <cstdint>

#include "hopyard/weights.h"

#include "gemm/cpu/dot.h"

namespace hopyard::gemm::cpu {

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
};

// One expert: gate (or the only matrix of an activation that is not gated), up, and GEMM2.
struct ExpertRef {
  MatrixRef gate;
  MatrixRef up;
  MatrixRef down;
  float* gemm2_input_scale = nullptr;
};

// Index of natural row j in values, bias and row-wise scales.
[[nodiscard]] int64_t StoredRow(const MatrixRef& matrix, int64_t row);
// Address of the byte that holds element (row, col), col even for packed codes.
[[nodiscard]] uint8_t* ValueAddress(const MatrixRef& matrix, int64_t row, int64_t col);
// Address of the block or row scale that governs (row, col); null where the format has none.
[[nodiscard]] uint8_t* ScaleAddress(const MatrixRef& matrix, int64_t row, int64_t col);
[[nodiscard]] float BiasAt(const MatrixRef& matrix, int64_t row);

// Scratch of one thread.
struct RowScratch {
  float* scales = nullptr;  // kFeatureBlock * (steps + 1)
  float* copies = nullptr;  // kFeatureBlock * RoundUp(K, 16)
  float* panel = nullptr;   // kRowGroup * RoundUp(K, 16)
};
[[nodiscard]] int64_t RowScratchFloats(int64_t max_cols);
[[nodiscard]] RowScratch CarveRowScratch(float* base, int64_t max_cols);

struct BlockArgs {
  const KernelTable* kernels = nullptr;
  const MatrixRef* matrix = nullptr;
  int64_t row_begin = 0;
  int num_rows = 0;  // <= kFeatureBlock
  const float* const* x = nullptr;
  int num_tokens = 0;
  float* out = nullptr;  // [num_tokens][kFeatureBlock]; columns at and beyond num_rows untouched
  RowScratch scratch;
};

// out[t][r] = row (row_begin + r) . x[t], every scale applied, no bias.
void DotBlock(const BlockArgs& args);

}  // namespace hopyard::gemm::cpu
