// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels get at a natural row of an expert's matrix: a pointer where the row is
// K-contiguous, otherwise a copy in scratch.
#pragma once

#include <cstdint>

#include "hopyard/weights.h"

#include "gemm/cpu/dot.h"
#include "gemm/weight_layout.h"

namespace hopyard::gemm::cpu {

// Bias of natural row j; 0 where there is none.
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
