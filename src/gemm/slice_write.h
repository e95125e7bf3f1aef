// SPDX-License-Identifier: Apache-2.0
// Writing canonical elements (K-major values, linear scales) into an expert's matrix in whatever
// layout it is stored: what Weights::Update does, on the host and on the device.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "gemm/weight_layout.h"

namespace hopyard::gemm {

enum class SlicePart : uint8_t { kValues, kScales, kBias };

// Elements [rows, cols] of one part of a slice and the matrix that receives them. An element is
// `size` bytes: a code (two of a packed format), a scale or a bias.
struct SliceWrite {
  MatrixRef target;
  formats::WeightFormatRule rule;  // of the target's format
  SlicePart part = SlicePart::kValues;
  int64_t row_begin = 0;  // of the slice, in natural rows and columns of the target
  int64_t col_begin = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  const uint8_t* source = nullptr;
  int64_t row_stride = 0;  // bytes
  int64_t col_stride = 0;
  int64_t size = 0;
};

// Where element (r, c) goes. A block's scale is found by the first of its columns and rows that the
// slice covers: blocks after the first start where the phase of the slice ends.
[[nodiscard]] HOPYARD_HOST_DEVICE uint8_t* Destination(const SliceWrite& write, int64_t r,
                                                       int64_t c) {
  const MatrixRef& target = write.target;
  const formats::WeightFormatRule& rule = write.rule;
  const bool packed = target.packed.base != nullptr;
  if (write.part == SlicePart::kValues && packed) {
    return PackedCode(target.packed, write.row_begin + r,
                      write.col_begin / rule.codes_per_byte + c);
  }
  if (write.part == SlicePart::kValues) {
    return ValueAddress(target, rule, write.row_begin + r,
                        write.col_begin + c * rule.codes_per_byte);
  }
  if (write.part == SlicePart::kBias) {
    return static_cast<uint8_t*>(target.bias) + StoredRow(target, write.row_begin + r) * write.size;
  }
  const int64_t row_block = rule.scale_block_rows;
  const int64_t col_block = rule.per_row_scale ? 1 : rule.scale_block;
  const int64_t row_phase =
      row_block > 1 ? (target.row_origin + target.position_begin + write.row_begin) % row_block : 0;
  const int64_t col_phase = (target.col_origin + write.col_begin) % col_block;
  const int64_t row = write.row_begin + (r == 0 ? 0 : r * row_block - row_phase);
  const int64_t col = write.col_begin + (c == 0 ? 0 : c * col_block - col_phase);
  return packed ? PackedScale(target.packed, row, col / col_block)
                : ScaleAddress(target, rule, row, col);
}

// Codes and block scales of a matrix, one byte each (two codes), from where they are stored into
// packed memory, whose other bytes stay as they are.
struct PackArgs {
  MatrixRef from;
  formats::WeightFormatRule rule;
  PackedOrder to;
};
// What of natural row `row` lies in group `group` of 128 of K.
HOPYARD_HOST_DEVICE void PackRow(const PackArgs& args, int64_t row, int64_t group) {
  const int64_t bytes = (args.from.cols + 1) / 2 - group * kPackedRowBytes;
  const int64_t codes = bytes < kPackedRowBytes ? bytes : kPackedRowBytes;
  const uint8_t* const from = ValueAddress(args.from, args.rule, row, group * 2 * kPackedRowBytes);
  // 64 bytes of a row lie together in every order of 4-bit codes, half of them in the packed one.
  for (int64_t half = 0; half < codes; half += kPackedHalfRowBytes) {
    uint8_t* const to = PackedCode(args.to, row, group * kPackedRowBytes + half);
    for (int64_t i = 0; i < kPackedHalfRowBytes && half + i < codes; ++i) {
      to[i] = from[half + i];
    }
  }
  const int64_t blocks = (args.from.cols + args.rule.scale_block - 1) / args.rule.scale_block;
  for (int64_t i = group * args.to.scale_bytes; i < (group + 1) * args.to.scale_bytes; ++i) {
    if (i < blocks) {
      *PackedScale(args.to, row, i) =
          *ScaleAddress(args.from, args.rule, row, i * args.rule.scale_block);
    }
  }
}
// All pointers are host memory.
void PackCpu(const PackArgs& args);
// All pointers are device memory; enqueued on `stream`. Throws as WriteSliceSm90.
void PackSm90(const PackArgs& args, void* stream);

// All pointers are host memory.
void WriteSliceCpu(const SliceWrite& write);

// All pointers are device memory; enqueued on `stream` (a cudaStream_t). Throws Error{kCuda} when
// the launch fails. Only in builds with the Hopper backend.
void WriteSliceSm90(const SliceWrite& write, void* stream);

}  // namespace hopyard::gemm
