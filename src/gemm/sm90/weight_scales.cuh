// SPDX-License-Identifier: Apache-2.0
// The scales of a thread's four weight rows (two tiles x two rows) along K, read from the
// checkpoint's own scale tensors ahead of their use.
#pragma once

#include <cstdint>

#include "device/sm90/warp.cuh"
#include "formats/row_map.h"
#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/pipeline.cuh"

namespace hopyard::gemm::sm90 {

// Natural row of the thread's row h (0 or 1) in tile `half`, and the matrix that holds it.
struct WeightRow {
  const MatrixArgs* matrix;
  int64_t row;
};
template <class Row>
__device__ __forceinline__ WeightRow ThreadRow(const GroupedGemmArgs& args, int64_t feature,
                                               int half, int h) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int in_tile = FeatureOfRow(
      Row::kConfig.interleaved, static_cast<int>(threadIdx.x) % 128 / 32 * 16 + 8 * h + lane / 4);
  if constexpr (Row::kConfig.gated) {
    return {half == 0 ? &args.first : &args.second, feature + in_tile};
  } else {
    return {&args.first, feature + half * kTileRows + in_tile};
  }
}
// Rows beyond the last read the last one's scales: what they scale is zero and is not stored.
__device__ __forceinline__ int64_t PositionInOrder(const MatrixArgs& matrix, int64_t row) {
  const int64_t real = row < matrix.rows ? row : matrix.rows - 1;
  return matrix.position_begin + real * matrix.position_step;
}
__device__ __forceinline__ int64_t StoredRow(const MatrixArgs& matrix, int64_t row) {
  return formats::StoredPosition(matrix.row_map, PositionInOrder(matrix, row));
}

// 4 bytes of which the first `left` exist; the others read as zero. Rows of scales may begin at any
// byte (2880 / 32 = 90 a row).
__device__ __forceinline__ uint32_t LoadScaleWord(const uint8_t* at, int left) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (left >= 4 && address % 4 == 0) {
    return __ldg(static_cast<const uint32_t*>(static_cast<const void*>(at)));
  }
  uint32_t word = 0;
  if (left >= 4 && address % 2 == 0) {
    const auto* halves = static_cast<const uint16_t*>(static_cast<const void*>(at));
    return __ldg(halves) | static_cast<uint32_t>(__ldg(halves + 1)) << 16;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word |= i < left ? static_cast<uint32_t>(__ldg(at + i)) << (8 * i) : 0U;
  }
  return word;
}

// Block scales of decoded weights. The four lanes that share a row read 128-groups g, g + 1, g + 2
// and g + 3 of it, four groups before the first is wanted, and pass them round.
template <class Row>
struct BlockScales {
  static constexpr Family kFamily = Row::kConfig.family;
  static constexpr int kBytes = ScaleBytes(kFamily);
  static constexpr int kWords = kBytes == 8 ? 2 : 1;

  // Of row 0 of each tile, and from there to row 1. Registers are short here.
  const uint8_t* begin[2];
  int other_row[2];
  int group_stride;  // bytes from one 128 of K to the next
  int word_stride;
  int row_bytes;           // that exist
  uint32_t row_exponents;  // a byte each
  uint32_t now[2][2][kWords];
  uint32_t next[2][2][kWords];

  __device__ __forceinline__ void Begin(const GroupedGemmArgs& args, int expert, int64_t feature) {
    // Scales are of one byte, or two where 8 bytes hold four.
    constexpr int kSize = kFamily == Family::kMxInt4AsBf16 ? 2 : 1;
    const bool linear = args.first.scale_layout == ScaleLayout::kLinear;
    constexpr int kBlock = 128 * kSize / kBytes;
    row_bytes = static_cast<int>((args.k + kBlock - 1) / kBlock) * kSize;
    group_stride = linear ? kBytes : kBytes / (4 * kSize) * 512 * kSize;
    word_stride = linear || kSize == 2 ? 4 : 512;
    row_exponents = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const WeightRow at = ThreadRow<Row>(args, feature, half, h);
        const MatrixArgs& matrix = *at.matrix;
        const int64_t row = StoredRow(matrix, at.row);
        const ExpertPointers* const pointers = matrix.pointers + expert;
        const int64_t first = linear ? row * matrix.scale_stride
                                     : row / 128 * ((matrix.scale_stride + 3) / 4 * 512) +
                                           row % 32 * 16 + row % 128 / 32 * 4;
        const uint8_t* const mine = static_cast<const uint8_t*>(pointers->scales) + first * kSize;
        if (h == 0) {
          begin[half] = mine;
        } else {
          other_row[half] = static_cast<int>(mine - begin[half]);
        }
        if constexpr (HasRowExponents(kFamily)) {
          const int64_t real = at.row < matrix.rows ? at.row : matrix.rows - 1;
          row_exponents |= uint32_t{pointers->row_exponents[real]} << (16 * half + 8 * h);
        }
      }
    }
    Load(0);
  }
  // Starts reading groups `group` .. + 3 into `next`.
  __device__ __forceinline__ void Load(int group) {
    const int mine = group + static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int at = mine * group_stride + w * word_stride;
          const int left = word_stride == 4 ? row_bytes - mine * kBytes - 4 * w
                                            : (mine * kBytes + 4 * w < row_bytes ? 4 : 0);
          next[half][h][w] = LoadScaleWord(begin[half] + (h == 1 ? other_row[half] : 0) + at, left);
        }
      }
    }
  }
  // Call with group = 0, 1, 2, ...
  __device__ __forceinline__ void Advance(int group) {
    if (group % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            now[half][h][w] = next[half][h][w];
          }
        }
      }
      Load(group + 4);
    }
  }
  __device__ __forceinline__ BlockFactor Of(int half, int h, int group, uint32_t table) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t chunk[2] = {0, 0};
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      chunk[w] = __shfl_sync(hopyard::sm90::kAllLanes, now[half][h][w], (lane & ~3) | (group & 3));
    }
    return PrepareScale<kFamily>(
        chunk, lane % 4, static_cast<int>(row_exponents >> (16 * half + 8 * h) & 0xFFU), table);
  }
};

// ---- 128x128 scales of FP8 weights, or ones

// The constant of tokens and weights that have no scale.
__device__ const float kOne = 1.0F;

template <class Row>
__device__ __forceinline__ bool ReadsSquareScales(const GroupedGemmArgs& args) {
  return HasSquareScales(Row::kConfig.family) && args.weights == WeightFormat::kFp8Block128;
}
// First scale of the block with natural row `row`, and from there one per 128 of K.
__device__ __forceinline__ const float* SquareScales(const MatrixArgs& matrix, int expert,
                                                     int64_t row) {
  return static_cast<const float*>(matrix.pointers[expert].scales) +
         (matrix.scale_row_origin + PositionInOrder(matrix, row)) / 128 * matrix.scale_stride;
}
// Whether natural rows 128 * i .. + 127 lie in one block.
__device__ __forceinline__ bool KeepsToBlocks(const MatrixArgs& matrix) {
  return matrix.position_step == 1 && (matrix.scale_row_origin + matrix.position_begin) % 128 == 0;
}
// Whether the scales that the producer leaves with a stage are those of tokens times those of
// weights; else it leaves the tokens', and for each tile those of the blocks that its rows lie in.
template <class Row>
__device__ __forceinline__ bool ScalesAreComplete(const GroupedGemmArgs& args) {
  return !ReadsSquareScales<Row>(args) ||
         (KeepsToBlocks(args.first) && (!Row::kConfig.gated || KeepsToBlocks(args.second)));
}
// Rows of the tile from natural row `row` on that lie in its first row's block of 128.
__device__ __forceinline__ int RowsOfFirstBlock(const MatrixArgs& matrix, int64_t row) {
  const int64_t at = matrix.scale_row_origin + PositionInOrder(matrix, row);
  const int left = static_cast<int>(128 - at % 128);
  return matrix.position_step == 1 ? left : (left + 1) / 2;
}
// What the producer left for a tile of 64 weight rows: they lie in one block or in two.
struct BlocksOfRows {
  float first;
  float second;
  int rows_of_first;

  __device__ __forceinline__ float ScaleOf(int row) const {
    return row < rows_of_first ? first : second;
  }
};
__device__ __forceinline__ BlocksOfRows LoadBlocksOfRows(uint32_t tile_scales) {
  BlocksOfRows blocks{};
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(blocks.first), "=f"(blocks.second)
               : "r"(tile_scales));
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(blocks.rows_of_first) : "r"(tile_scales + 8));
  return blocks;
}
// The first of a thread's two rows in a tile of 64; the other one is 8 further.
__device__ __forceinline__ int FirstRowOfThread() {
  return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
}
__device__ __forceinline__ float2 LoadRowScales(uint32_t tile_scales, int row) {
  const BlocksOfRows blocks = LoadBlocksOfRows(tile_scales);
  return {blocks.ScaleOf(row), blocks.ScaleOf(row + 8)};
}

}  // namespace hopyard::gemm::sm90
