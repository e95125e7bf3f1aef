// SPDX-License-Identifier: Apache-2.0
// The scales of a thread's four weight rows (two tiles x two rows) along K, read from the
// checkpoint's own scale tensors ahead of their use.
#pragma once

#include <cstdint>

#include "device/sm90/copy.cuh"
#include "device/sm90/warp.cuh"
#include "formats/row_map.h"
#include "gemm/packed_order.h"
#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/plain.h"

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
// Rows beyond the last read the last one's scales: what they scale is not stored, or zero.
__device__ __forceinline__ int64_t PositionInOrder(const MatrixArgs& matrix, int64_t row) {
  const int64_t real = row < matrix.rows ? row : matrix.rows - 1;
  return matrix.position_begin + real * matrix.position_step;
}
template <class Row>
__device__ __forceinline__ int64_t StoredRow(const MatrixArgs& matrix, int64_t row) {
  if constexpr (Row::kPlain) {
    return PositionInOrder(matrix, row);
  } else {
    return formats::StoredPosition(matrix.row_map, PositionInOrder(matrix, row));
  }
}

// From a lane's quarter of the scales of a thread's rows side by side, and a byte for each of their
// exponents.
template <Family kFamily>
__device__ __forceinline__ BlockFactor FactorOf(const uint32_t (&scales)[ScaleBytes(kFamily) / 4],
                                                uint32_t row_exponents, int half, int h,
                                                uint32_t table) {
  constexpr int kRowsOfWord = 16 / ScaleBytes(kFamily);
  const int i = 2 * half + h;
  const uint32_t scale = scales[i / kRowsOfWord] >> (32 / kRowsOfWord * (i % kRowsOfWord));
  return PrepareScale<kFamily>(scale & (kRowsOfWord == 4 ? 0xFFU : 0xFFFFU),
                               static_cast<int>(row_exponents >> (8 * i) & 0xFFU), table);
}

// Block scales of decoded weights. Each consumer warp copies those of its 32 rows, 16 of either
// tile, into shared memory: windows of 16 bytes a row, two at a time, the next ahead of its use. It
// copies aligned words and finds a row's first byte inside them: rows of scales may begin at any
// (2880 / 32 = 90 bytes a row).
template <class Row>
struct BlockScales {
  static constexpr Family kFamily = Row::kConfig.family;
  static constexpr int kBytes = ScaleBytes(kFamily);  // of 128 weights
  static constexpr int kBytesOfQuarter = kBytes / 4;
  static constexpr int kRowsOfWord = 4 / kBytesOfQuarter;
  static constexpr int kScaleSize = kFamily == Family::kMxInt4AsBf16 ? 2 : 1;
  static constexpr int kGroups = 16 / kBytes;  // of a window
  static constexpr bool kInParts = Row::kConfig.k_parts > 1;

  uint32_t base;       // of shared memory
  int first;           // group of the block's part of K
  const uint8_t* row;  // aligned, of row `lane`
  // A byte for each of the thread's rows of weights.
  uint32_t skews;  // bytes of the first word that are not the row's
  uint32_t row_exponents;
  uint32_t now[kBytesOfQuarter];  // this lane's quarter of a group, of its rows side by side

  __device__ __forceinline__ void Begin(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                        const Work& work, int64_t feature, int first_group) {
    const int lane = hopyard::sm90::LaneId();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
    base = shared.base;
    const bool second = Row::kConfig.gated && lane >= 16;
    const MatrixArgs& matrix = second ? args.second : args.first;
    const int64_t natural =
        feature + (Row::kConfig.gated ? 0 : lane / 16 * kTileRows) + warp % 4 * 16 + lane % 16;
    const ExpertPointers* const pointers = matrix.pointers + work.expert;
    const int64_t stored = StoredRow<Row>(matrix, natural);
    const int64_t at = IsLinear(args) ? stored * matrix.scale_stride
                                      : stored / 128 * ((matrix.scale_stride + 3) / 4 * 512) +
                                            stored % 32 * 16 + stored % 128 / 32 * 4;
    const uint8_t* const begin = static_cast<const uint8_t*>(pointers->scales) + at * kScaleSize;
    const auto skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(begin) % 4);
    row = begin - skew;
    uint32_t exponent = 0;
    if constexpr (HasRowExponents(kFamily)) {
      exponent = pointers->row_exponents[natural < matrix.rows ? natural : matrix.rows - 1];
    }
    skews = 0;
    row_exponents = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t of_row =
          __shfl_sync(hopyard::sm90::kAllLanes, skew << 8 | exponent, RowOfThread(i, threadIdx.x));
      skews |= of_row >> 8 << (8 * i);
      row_exponents |= (of_row & 0xFFU) << (8 * i);
    }
    // All have read what they wanted of the work item before, and no copy for it is under way.
    hopyard::sm90::AwaitPieces<0>();
    __syncwarp();
    first = first_group;
    CopyWindow(args, first_group / kGroups);
    CopyWindow(args, first_group / kGroups + 1);
  }
  // Call with group = first_group, + 1, + 2, ... before `Of`.
  __device__ __forceinline__ void Advance(const GroupedGemmArgs& args, int group) {
    if (group % kGroups == 0 || (kInParts && group == first)) {
      // Every lane has left the window before this one.
      __syncwarp();
      if (kInParts ? group == first : group == 0) {
        hopyard::sm90::AwaitPieces<1>();
      } else {
        CopyWindow(args, group / kGroups + 1);
      }
      __syncwarp();
    }
    if (group % kGroups == kGroups - 1) {
      // The last bytes of a skewed row are in the next one.
      hopyard::sm90::AwaitPieces<0>();
      __syncwarp();
    }
    const uint32_t thread = hopyard::sm90::ThreadHere();
    ForEachRow([&](int i) { return LoadQuarter(i, group, thread); });
  }
  __device__ __forceinline__ BlockFactor Of(int half, int h, uint32_t table) const {
    return FactorOf<kFamily>(now, row_exponents, half, h, table);
  }

 private:
  __device__ __forceinline__ static bool IsLinear(const GroupedGemmArgs& args) {
    return Row::kPlain || args.first.scale_layout == ScaleLayout::kLinear;
  }
  // Row i = 2 * half + h of the thread among its warp's 32: a multiple of 8, and lane / 4.
  __device__ __forceinline__ static int RowOfThread(int i, uint32_t thread) {
    return 8 * i + static_cast<int>(thread) % 32 / 4;
  }
  // Where byte `at` of such a row is; 8 rows do not meet in a bank.
  __device__ __forceinline__ uint32_t Place(int i, uint32_t at, uint32_t thread) const {
    const uint32_t turn = thread % 32 / 4 * 4;
    return base + Shared<Row>::kWeightScales + (thread / 32 - 4) * kWeightScaleWarpBytes +
           static_cast<uint32_t>(RowOfThread(i, thread) * kWeightScaleRowBytes) +
           (at + turn) % kWeightScaleRowBytes;
  }
  // `load` returns the bits of row i.
  template <class Load>
  __device__ __forceinline__ void ForEachRow(const Load& load) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = load(i) << (32 / kRowsOfWord * (i % kRowsOfWord));
      now[i / kRowsOfWord] = i % kRowsOfWord == 0 ? bits : now[i / kRowsOfWord] | bits;
    }
  }
  // That exist.
  __device__ __forceinline__ static int RowBytes(const GroupedGemmArgs& args) {
    constexpr int kBlock = 128 * kScaleSize / kBytes;
    return static_cast<int>((args.k + kBlock - 1) / kBlock) * kScaleSize;
  }
  // Of a row's word from its first, in bytes. In 128x4, 4 columns of 128 rows lie together.
  __device__ __forceinline__ static int OffsetOf(const GroupedGemmArgs& args, int word) {
    return IsLinear(args)    ? 4 * word
           : kScaleSize == 2 ? word / 2 * 1024 + word % 2 * 4
                             : word * 512;
  }
  __device__ __forceinline__ auto RowAt(int i, uint32_t thread) const {
    const auto address = reinterpret_cast<unsigned long long>(row);
    return reinterpret_cast<const uint8_t*>(
        __shfl_sync(hopyard::sm90::kAllLanes, address, RowOfThread(i, thread)));
  }
  // A quad copies words of the four rows that its lanes read.
  __device__ __forceinline__ void CopyWindow(const GroupedGemmArgs& args, int window) const {
    const uint32_t thread = hopyard::sm90::ThreadHere();
    const int word = 4 * window + static_cast<int>(thread) % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int left = RowBytes(args) - 4 * word;
      left = IsLinear(args) ? left + static_cast<int>(SkewOf(i)) : 4 * left;
      left = left < 0 ? 0 : (left < 4 ? left : 4);
      hopyard::sm90::CopyPartOfWord(Place(i, 4U * static_cast<uint32_t>(word), thread),
                                    RowAt(i, thread) + OffsetOf(args, word), left);
    }
    hopyard::sm90::CommitPieces();
  }
  __device__ __forceinline__ uint32_t SkewOf(int i) const {
    return skews >> (8 * i) & 0xFFU;
  }
  __device__ __forceinline__ uint32_t LoadQuarter(int i, int group, uint32_t thread) const {
    const uint32_t at = SkewOf(i) + static_cast<uint32_t>(group * kBytes) +
                        thread % 4 * static_cast<uint32_t>(kBytesOfQuarter);
    uint32_t scale = LoadByte(Place(i, at, thread));
    if constexpr (kBytesOfQuarter == 2) {
      scale |= LoadByte(Place(i, at + 1, thread)) << 8;
    }
    return scale;
  }
  __device__ __forceinline__ static uint32_t LoadByte(uint32_t shared) {
    uint32_t byte = 0;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(shared));
    return byte;
  }
};

// The same of packed weights: they come with a stage, and a lane takes its quarter of the words
// that its quad reads.
template <class Row>
struct PackedScales {
  static constexpr Family kFamily = Row::kConfig.family;
  static constexpr int kBytesOfQuarter = ScaleBytes(kFamily) / 4;

  // A byte for each of the thread's rows of weights.
  uint32_t row_exponents;
  uint32_t now[kBytesOfQuarter];  // this lane's quarter of a stage, of its rows side by side

  __device__ __forceinline__ void Begin(const GroupedGemmArgs& args, const Shared<Row>& /*shared*/,
                                        const Work& work, int64_t feature, int /*first_group*/) {
    row_exponents = 0;
    if constexpr (HasRowExponents(kFamily)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const WeightRow at = ThreadRow<Row>(args, feature, i / 2, i % 2);
        const int64_t row = at.row < at.matrix->rows ? at.row : at.matrix->rows - 1;
        row_exponents |= uint32_t{at.matrix->pointers[work.expert].row_exponents[row]} << (8 * i);
      }
    }
  }
  // Of a stage that is there.
  __device__ __forceinline__ void Load(const Shared<Row>& shared, int stage, int consumer) {
    const uint32_t thread = hopyard::sm90::ThreadHere() % 128;
    const uint32_t first = thread % 4 * kBytesOfQuarter;  // byte of a row
    // The words of the thread's four rows (gemm/packed_order.h).
    const uint4 words = LoadWords(shared.PackedUnit(stage, consumer) +
                                  first / 4 * static_cast<uint32_t>(kPackedPlaneBytes) +
                                  (thread / 32 * 8 + thread % 32 / 4) * 16);
    if constexpr (kBytesOfQuarter == 1) {
      const uint32_t bytes = first * 0x11U + 0x40U;
      now[0] = __byte_perm(__byte_perm(words.x, words.y, bytes),
                           __byte_perm(words.z, words.w, bytes), 0x5410);
    } else {
      const uint32_t bytes = first % 4 * 0x1111U + 0x5410U;
      now[0] = __byte_perm(words.x, words.y, bytes);
      now[1] = __byte_perm(words.z, words.w, bytes);
    }
  }
  __device__ __forceinline__ BlockFactor Of(int half, int h, uint32_t table) const {
    return FactorOf<kFamily>(now, row_exponents, half, h, table);
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
// Whether the scales that the producer leaves with a stage are those of tokens times those of
// weights; else it leaves the tokens', and for each tile those of the blocks that its rows lie in.
template <class Row>
__device__ __forceinline__ bool ScalesAreComplete(const GroupedGemmArgs& args) {
  return Row::kPlain || !ReadsSquareScales<Row>(args) ||
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
