// SPDX-License-Identifier: Apache-2.0
// Rows of values or codes on their way into a GEMM on Hopper: rounded to an activation format with
// the bits of formats::Quantize and formats::RoundRow, and laid out in the GEMM's order along K.
#pragma once

#include <cstdint>

#include "device/queue.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm1 {

// One call; pointers are device memory. Element k of a row goes to gemm::sm90::PositionOf(to.order,
// k) of the row of `out`, as
//   kBf16                             its BF16 value;
//   kMxFp8                            code * block scale;
//   kNvFp4                            code * block scale, the global scale left out;
//   kFp8PerTensor, kFp8PerRow,        the code, as a byte (kE4m3) or as its value (kBf16), its
//   kFp8Block1x128                    scale apart.
// BF16 holds all of them exactly, but for MXFP8 below 2^-133, where the result is rounded.
struct RoundRowsArgs {
  gemm::sm90::RowFormat to;  // dtype kE4m3: the three FP8 formats only
  // kNvFp4: a dynamic global scale per row, its multiplier written to out_row_scales.
  bool row_global = false;
  const void* in = nullptr;  // kBf16: values to round; kE4m3, kUint8: codes of to.format
  DType in_dtype = DType::kBf16;
  // Codes and scales of `in` are MXFP8, and their values are rounded to kFp8Block1x128 anew.
  // to.dtype is then kE4m3.
  bool from_mxfp8 = false;
  int64_t in_pitch = 0;             // elements of in_dtype from row to row
  const void* in_scales = nullptr;  // of codes: block scales, row-major; kFp8PerRow: f32 [rows]
  // Of kNvFp4 codes with row_global: f32 [rows], copied to out_row_scales.
  const float* in_row_scales = nullptr;
  // f32 [1], positive: kFp8PerTensor, and the global multiplier of kNvFp4 without row_global.
  // Values are rounded with it; the GEMM multiplies by it.
  const float* static_scale = nullptr;
  // 1: one per segment instead, of segment_begin first. Needs segment_offsets.
  int64_t static_scale_stride = 0;
  int64_t max_rows = 0;
  const int32_t* num_rows =
      nullptr;  // read by the kernel, clamped to [0, max_rows]; null: max_rows
  // Not null: only the rows of segments [segment_begin, segment_end) are read and written, of which
  // s has [segment_offsets[s], segment_offsets[s + 1]), ascending and at most max_rows. num_rows is
  // then null.
  const int32_t* segment_offsets = nullptr;
  int32_t segment_begin = 0;
  int32_t segment_end = 0;
  int64_t cols = 0;  // even for packed codes
  // Columns at and beyond cols are zero up to out_pitch. 16-byte aligned, and whole groups of 128
  // columns, unless the order is natural.
  void* out = nullptr;
  int64_t out_pitch = 0;              // elements of to.dtype
  float* out_block_scales = nullptr;  // kFp8Block1x128: [rows][ceil(cols / 128)]
  float* out_row_scales = nullptr;    // kFp8PerRow, or kNvFp4 with row_global: [rows]
};

// Enqueues one kernel. Throws Error{kCuda} when the launch fails.
void RoundRowsSm90(const RoundRowsArgs& args, const device::Queue& queue);

}  // namespace hopyard::gemm1
