// SPDX-License-Identifier: Apache-2.0
// GEMM1's rows rounded to GEMM2's operand on the way out: from the BF16 rows that both consumers
// have staged, so that the bits are those of a pass of its own over BF16 rows.
#pragma once

#include <cstdint>

#include "gemm/sm90/config.h"
#include "gemm/sm90/output.cuh"
#include "gemm/sm90/round_columns.cuh"

namespace hopyard::gemm::sm90 {

// The 8 features of this lane: half a warp has a token's 128, 64 staged by each consumer.
template <class Row, Format kFormat>
__device__ __forceinline__ void RoundStaged(const GroupedGemmArgs& args,
                                            const OutputTile<Row>& tile) {
  constexpr GemmConfig kConfig = Row::kConfig;
  constexpr bool kCodes = IsFp8Math(kConfig.family);
  constexpr int kBytes = kCodes ? 1 : 2;
  const auto thread = static_cast<int>(hopyard::sm90::ThreadHere());
  const int lane = thread % 16;
  const int64_t group = tile.feature_begin / kKGroup * kKGroup;
  const int64_t k = group + lane * kLaneCols;
  const uint32_t staged = tile.staging(lane / 8);
  RowScale row;
  if (args.out_scale != nullptr) {
    row = StaticRowScale<kFormat>(args.out_scale[tile.expert * args.out_scale_stride]);
  }
  // Threads 128 .. 383 are the consumers'.
  const int first = (thread - 128) / 16;
#pragma unroll 1
  for (int n = first; n - first < tile.num_rows; n += 16) {
    const bool live = n < tile.num_rows;
    const uint4 piece = LoadPiece(staged + StagedAt(n % kConfig.tokens, lane % 8 * 8));
    const LaneWords values{{piece.x, piece.y, piece.z, piece.w}};
    float scale = 1.0F;
    float divisor = 1.0F;
    LaneWords words = RoundColumns<kFormat>(values, row, scale, divisor);
    if constexpr (!kCodes) {
      words = CodesToBf16<kFormat>(words, scale);
    }
    ClearColumns<kBytes>(args.features - k, words);
    const int64_t at = tile.row_begin + n;
    if (kFormat == Format::kFp8Block1x128 && live && lane == 0) {
      args.out_block_scales[at * ((args.features + kKGroup - 1) / kKGroup) + group / kKGroup] =
          divisor;
    }
    auto* const out = static_cast<uint8_t*>(args.out) + (at * args.out_pitch + group) * kBytes;
    if constexpr (!kCodes) {
      StoreBf16Group(out, args.out_format.order, words, live);
    } else if (args.out_format.order == KOrder::kNatural) {
      if (live && k < args.out_pitch) {
        StoreWords(out + lane * kLaneCols, make_uint2(words.w[0], words.w[1]));
      }
    } else {
      StoreE4m3Group(out, args.out_format.order, words, live);
    }
  }
}

// Call where both consumers have staged their features.
template <class Row>
__device__ __forceinline__ void StoreRounded(const GroupedGemmArgs& args,
                                             const OutputTile<Row>& tile) {
  constexpr Family kFamily = Row::kConfig.family;
  ConsumersBarrier();
  if constexpr (kFamily == Family::kMxFp8AsBf16 || kFamily == Family::kMxFp4AsBf16) {
    RoundStaged<Row, Format::kMxFp8>(args, tile);
  } else if constexpr (kFamily == Family::kNvFp4AsBf16) {
    if (Row::kConfig.promoted || args.out_format.format == Format::kFp8Block1x128) {
      RoundStaged<Row, Format::kFp8Block1x128>(args, tile);
    } else {
      RoundStaged<Row, Format::kNvFp4>(args, tile);
    }
  } else if constexpr (IsFp8Math(kFamily)) {
    if (args.out_format.format == Format::kFp8PerTensor) {
      RoundStaged<Row, Format::kFp8PerTensor>(args, tile);
    } else {
      RoundStaged<Row, Format::kFp8Block1x128>(args, tile);
    }
  }
  // What was staged has been read.
  ConsumersBarrier();
}

}  // namespace hopyard::gemm::sm90
