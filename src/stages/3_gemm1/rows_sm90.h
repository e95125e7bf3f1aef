// SPDX-License-Identifier: Apache-2.0
// Rounds rows to an activation format and lays them out as the grouped GEMM reads them.
#pragma once

#include <cstdint>

#include "hopyard/tensor.h"

#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm1 {

// All pointers are device memory; optional ones are null.
struct RoundRowsArgs {
  gemm::sm90::RowFormat to;
  bool row_global = false;  // kNvFp4 only: a dynamic global scale per row
  const void* in = nullptr;
  DType in_dtype = DType::kBf16;    // kBf16: values to round; kE4m3, kUint8: codes of `to.format`
  int64_t in_pitch = 0;             // elements of in_dtype between rows
  const void* in_scales = nullptr;  // of codes: block scales, contiguous; kFp8PerRow: f32 [rows]
  const float* in_row_scales = nullptr;  // kNvFp4 codes with row_global: f32 [rows]
  const float* static_scale = nullptr;   // f32 [1]: kFp8PerTensor; kNvFp4 without row_global
  int64_t max_rows = 0;
  const int32_t* num_rows = nullptr;  // null: max_rows
  int64_t cols = 0;
  void* out = nullptr;
  int64_t out_pitch = 0;              // elements of to.dtype; columns from `cols` on are zeroed
  float* out_block_scales = nullptr;  // kFp8Block1x128: [rows][ceil(cols / 128)]
  float* out_row_scales = nullptr;    // kFp8PerRow, or kNvFp4 with row_global: [rows]
};

// Enqueues the kernel on `stream` (a cudaStream_t). Throws Error{kCuda} when the launch fails.
void RoundRowsSm90(const RoundRowsArgs& args, void* stream);

}  // namespace hopyard::gemm1
