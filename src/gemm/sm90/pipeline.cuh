// SPDX-License-Identifier: Apache-2.0
// What the warpgroups of a block share: where things lie in shared memory, the ring of stages, and
// the order of work.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "gemm/sm90/config.h"
#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

using hopyard::sm90::Barrier;

// Addresses in a block's shared memory, from its aligned start.
template <class Row>
struct Shared {
  static constexpr GemmConfig kConfig = Row::kConfig;
  static constexpr uint32_t kTokens = kConfig.stages * WeightBytes(kConfig);
  static constexpr uint32_t kScales = kTokens + kConfig.stages * TokenBytes(kConfig);
  static constexpr uint32_t kStaging = kScales + kConfig.stages * TokenScaleBytes(kConfig);
  static constexpr uint32_t kFactors = kStaging + StagingBytes(kConfig);
  static constexpr uint32_t kBarriers = kFactors + FactorBytes(kConfig);

  uint32_t base;

  __device__ explicit Shared(const uint8_t* memory) : base(hopyard::sm90::SharedAddress(memory)) {}
  __device__ __forceinline__ uint32_t Weights(int stage, int consumer, int half) const {
    return base + static_cast<uint32_t>(stage * WeightBytes(kConfig) +
                                        (2 * consumer + half) * TileBytes(kConfig));
  }
  // Panel `panel` of the stage's token rows, 128 bytes a row.
  __device__ __forceinline__ uint32_t Tokens(int stage, int panel) const {
    return base + kTokens +
           static_cast<uint32_t>(stage * TokenBytes(kConfig) + panel * kConfig.tokens * 128);
  }
  __device__ __forceinline__ uint32_t TokenScales(int stage) const {
    return base + kScales + static_cast<uint32_t>(stage * TokenScaleBytes(kConfig));
  }
  __device__ __forceinline__ uint32_t Staging(int consumer) const {
    return base + kStaging + static_cast<uint32_t>(consumer * kConfig.tokens * kTileRows * 2);
  }
  __device__ __forceinline__ uint32_t Factors(int consumer) const {
    return base + kFactors + static_cast<uint32_t>(consumer * kConfig.tokens * 4);
  }
  __device__ __forceinline__ Barrier Full(int stage) const {
    return {base + kBarriers + 8U * static_cast<uint32_t>(stage)};
  }
  __device__ __forceinline__ Barrier Empty(int stage) const {
    return {base + kBarriers + 8U * static_cast<uint32_t>(kConfig.stages + stage)};
  }
};

// Position in the ring of stages, and the parity of its current round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1U;
    }
  }
};

// One tile of tokens and one block of features.
struct Work {
  int expert;  // index into the matrices of this launch
  int64_t row_begin;
  int num_rows;
  int64_t feature_begin;
};

// Blocks take work in strides. Tiles come in groups: all features of one group are done before the
// next begins, and within it tiles vary fastest, so that a group's token rows stay in the L2 cache
// and tiles of one expert read a weight row at the same time.
template <class Row>
struct Scheduler {
  // 16 tiles of 128 rows of 4096 BF16 values are 16 MiB, a third of an H100's L2.
  static constexpr int kGroupTiles = 16;

  const GroupedGemmArgs& args;
  int num_tiles;
  int feature_blocks;
  int next;

  __device__ explicit Scheduler(const GroupedGemmArgs& gemm)
      : args(gemm), num_tiles(*gemm.num_tiles), next(static_cast<int>(blockIdx.x)) {
    constexpr int kFeatures = FeaturesPerBlock(Row::kConfig);
    // Rows in an order of groups of 128 are written to the end of their last group.
    const int64_t features = gemm.out_format.order == KOrder::kNatural
                                 ? gemm.features
                                 : (gemm.features + kKGroup - 1) / kKGroup * kKGroup;
    feature_blocks = static_cast<int>((features + kFeatures - 1) / kFeatures);
  }
  // False at the end.
  __device__ bool Next(Work& work) {
    while (next < num_tiles * feature_blocks) {
      const int group = next / (kGroupTiles * feature_blocks);
      const int within = next % (kGroupTiles * feature_blocks);
      const int left = num_tiles - group * kGroupTiles;
      const int tiles = left < kGroupTiles ? left : kGroupTiles;
      const int tile = group * kGroupTiles + within % tiles;
      const int segment = args.tile_expert[tile];
      next += static_cast<int>(gridDim.x);
      if (segment < args.segment_begin || segment >= args.segment_end) {
        continue;
      }
      work.feature_begin = int64_t{within / tiles} * FeaturesPerBlock(Row::kConfig);
      work.expert = segment - args.segment_begin;
      work.row_begin = args.tile_row_begin[tile];
      work.num_rows = args.tile_row_end[tile] - args.tile_row_begin[tile];
      return true;
    }
    return false;
  }
};

template <class Row>
__device__ __forceinline__ int KBlocks(const GroupedGemmArgs& args) {
  constexpr int kBlockK = BlockK(Row::kConfig.family);
  return static_cast<int>((args.k + kBlockK - 1) / kBlockK);
}

}  // namespace hopyard::gemm::sm90
