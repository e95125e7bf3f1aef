// SPDX-License-Identifier: Apache-2.0
// What the warpgroups of a block share: where things lie in shared memory, the ring of stages, and
// the order of work.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "gemm/packed_order.h"
#include "gemm/sm90/config.h"
#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

using hopyard::sm90::Barrier;

// One tile of tokens and one block of features.
struct Work {
  int expert;     // index into the matrices of this launch; -1: there is no more work
  int row_begin;  // rows are counted by int32 (slot_to_row)
  int num_rows;
  int feature_begin;
};

// Addresses in a block's shared memory, from its aligned start.
template <class Row>
struct Shared {
  static constexpr GemmConfig kConfig = Row::kConfig;
  static constexpr int kScaleBytes = ScaleBytes(kConfig.family);
  // Tokens first: their swizzled panels begin on 1024 bytes, and units of packed weights are no
  // multiples of that.
  static constexpr uint32_t kWeights = kConfig.stages * TokenBytes(kConfig);
  static constexpr uint32_t kScales = kWeights + kConfig.stages * WeightBytes(kConfig);
  static constexpr uint32_t kStaging = kScales + kConfig.stages * StageScaleBytes(kConfig);
  static constexpr uint32_t kFactors = kStaging + StagingBytes(kConfig);
  static constexpr uint32_t kSources = kFactors + FactorBytes(kConfig);
  static constexpr uint32_t kWeightScales = kSources + SourceBytes(kConfig);
  static constexpr uint32_t kParts = kWeightScales + WeightScaleBytes(kConfig);
  static constexpr uint32_t kWork = kParts + PartBytes(kConfig);
  static constexpr uint32_t kBarriers = kWork + WorkBytes(kConfig);

  uint32_t base;

  __device__ explicit Shared(const uint8_t* memory) : base(hopyard::sm90::SharedAddress(memory)) {}
  __device__ __forceinline__ uint32_t Weights(int stage, int consumer, int half) const {
    // Where tokens are M, 128 rows of gate and 128 of up lie together.
    const int tile =
        kConfig.tokens_are_m && kConfig.gated ? 2 * half + consumer : 2 * consumer + half;
    const int at =
        kConfig.packed
            ? consumer * ConsumerWeightBytes(kConfig) +
                  static_cast<int>(PackedScaleBytes(kScaleBytes) + half * kPackedHalfTileBytes)
            : tile * TileBytes(kConfig);
    return base + kWeights + static_cast<uint32_t>(stage * WeightBytes(kConfig) + at);
  }
  // Where tokens are M: 128 weight rows.
  __device__ __forceinline__ uint32_t WeightsOfHalf(int stage, int half) const {
    return kConfig.gated ? Weights(stage, 0, half) : Weights(stage, half, 0);
  }
  // A consumer's unit of packed weights, which begins with its block scales (packed_order.h).
  __device__ __forceinline__ uint32_t PackedUnit(int stage, int consumer) const {
    return base + kWeights +
           static_cast<uint32_t>(stage * WeightBytes(kConfig) +
                                 consumer * ConsumerWeightBytes(kConfig));
  }
  // Panel `panel` of the stage's token rows, 128 bytes a row.
  __device__ __forceinline__ uint32_t Tokens(int stage, int panel) const {
    return base + static_cast<uint32_t>(stage * TokenBytes(kConfig) + panel * kConfig.tokens * 128);
  }
  __device__ __forceinline__ uint32_t Scales(int stage, int set) const {
    return base + kScales +
           static_cast<uint32_t>(stage * StageScaleBytes(kConfig) + set * ScaleSetBytes(kConfig));
  }
  // Token n in a set: 8 * j + 2 * q + i is value 2 * j + i of lane q, or n where tokens are M.
  __device__ __forceinline__ static uint32_t ScaleAt(int n) {
    if constexpr (kConfig.tokens_are_m) {
      return static_cast<uint32_t>(4 * n);
    }
    return static_cast<uint32_t>(n / 2 % 4 * ScaleLaneBytes(kConfig) + (n / 8 * 2 + n % 2) * 4);
  }
  __device__ __forceinline__ Barrier Full(int stage) const {
    return {base + kBarriers + 8U * static_cast<uint32_t>(stage)};
  }
  __device__ __forceinline__ Barrier Empty(int stage) const {
    return {base + kBarriers + 8U * static_cast<uint32_t>(kConfig.stages + stage)};
  }
  __device__ __forceinline__ Barrier Posted(int slot) const {
    return {base + kBarriers + 8U * static_cast<uint32_t>(2 * kConfig.stages + slot)};
  }
  // The sums of the other parts of K have come; and may be sent to that block again.
  __device__ __forceinline__ Barrier PartsFull() const { return AfterWork(0); }
  __device__ __forceinline__ Barrier PartsFree() const { return AfterWork(1); }
  // The producer posts a work item ahead of its first stage: consumers need not look for it, and
  // what they read themselves is under way when the stage comes.
  __device__ __forceinline__ void PostWork(int slot, const Work& work) const {
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(
                     base + kWork + 16U * static_cast<uint32_t>(slot)),
                 "r"(work.expert), "r"(work.row_begin), "r"(work.num_rows), "r"(work.feature_begin)
                 : "memory");
    Posted(slot).Arrive();
  }
  __device__ __forceinline__ Work LoadWork(int slot) const {
    Work work;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(work.expert), "=r"(work.row_begin), "=r"(work.num_rows),
                   "=r"(work.feature_begin)
                 : "r"(base + kWork + 16U * static_cast<uint32_t>(slot))
                 : "memory");
    return work;
  }
  __device__ __forceinline__ Barrier AfterWork(int i) const {
    return {base + kBarriers +
            8U * static_cast<uint32_t>(2 * kConfig.stages + WorkSlots(kConfig) + i)};
  }
  // Of tile t = 2 * consumer + half.
  __device__ __forceinline__ static int ScaleSetOf(int tile) {
    return !HasSquareScales(kConfig.family) ? 0 : kConfig.gated ? tile % 2 : tile / 2;
  }
  // What a set has for tile t alone: in the room behind one of its lanes, or behind them all.
  __device__ __forceinline__ uint32_t TileScales(int stage, int tile) const {
    const int lane = kConfig.gated ? tile / 2 : tile % 2;
    const int at = kConfig.tokens_are_m ? 4 * kConfig.tokens + 16 * lane
                                        : lane * ScaleLaneBytes(kConfig) + kConfig.tokens;
    return Scales(stage, ScaleSetOf(tile)) + static_cast<uint32_t>(at);
  }
  // Arrivals that fill a stage: expected bytes, every producer thread's pieces, and once more where
  // it writes scales itself.
  static constexpr bool kWritesScales = kConfig.promoted && HasSquareScales(kConfig.family);
  static constexpr int kFullArrivals = 1 + 128 + (kWritesScales ? 128 : 0);
  // For consumers. Token rows are written by threads, whose writes the tensor cores see beyond a
  // fence on the way from the barrier to them (PTX ISA, causality order and proxies).
  __device__ __forceinline__ void AwaitFull(int stage, uint32_t parity) const {
    Full(stage).Wait(parity);
    hopyard::sm90::FenceAsyncProxy();
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

// Which of its cluster's blocks this is.
template <class Row>
__device__ __forceinline__ int ClusterRank() {
  return static_cast<int>(blockIdx.x) % BlocksPerCluster(Row::kConfig);
}

// Clusters take work in strides. Of the tiles of one expert that are a cluster's each block takes
// one, which may be empty; blocks that share K take the same. Tiles come in groups: all features of
// one group are done before the next begins, and within it tiles vary fastest, so that a group's
// token rows stay in the L2 cache and tiles of one expert read a weight row at the same time.
template <class Row>
struct Scheduler {
  static constexpr int kCluster = Row::kConfig.cluster;
  // 16 tiles of 128 rows of 4096 BF16 values are 16 MiB, a third of an H100's L2.
  static constexpr int kGroup = 16 / kCluster;

  const GroupedGemmArgs& args;
  int clusters;  // of tiles
  int feature_blocks;
  int next;

  __device__ explicit Scheduler(const GroupedGemmArgs& gemm)
      : args(gemm),
        clusters(*gemm.num_tiles / kCluster),
        next(static_cast<int>(blockIdx.x) / BlocksPerCluster(Row::kConfig)) {
    constexpr int kFeatures = FeaturesPerBlock(Row::kConfig);
    // Rows in an order of groups of 128 are written to the end of their last group.
    const int64_t features = gemm.out_format.fills_groups()
                                 ? (gemm.features + kKGroup - 1) / kKGroup * kKGroup
                                 : gemm.features;
    feature_blocks = static_cast<int>((features + kFeatures - 1) / kFeatures);
  }
  // False at the end.
  __device__ bool Next(Work& work) {
    while (next < clusters * feature_blocks) {
      const int group = next / (kGroup * feature_blocks);
      const int within = next % (kGroup * feature_blocks);
      const int left = clusters - group * kGroup;
      const int tiles = left < kGroup ? left : kGroup;
      const int tile =
          (group * kGroup + within % tiles) * kCluster + (kCluster == 1 ? 0 : ClusterRank<Row>());
      // Read together: one wait.
      const int segment = args.tile_expert[tile];
      const int row_begin = args.tile_row_begin[tile];
      const int row_end = args.tile_row_end[tile];
      next += static_cast<int>(gridDim.x) / BlocksPerCluster(Row::kConfig);
      if (segment < args.segment_begin || segment >= args.segment_end) {
        continue;
      }
      work.feature_begin = within / tiles * FeaturesPerBlock(Row::kConfig);
      work.expert = segment - args.segment_begin;
      work.row_begin = row_begin;
      work.num_rows = row_end - row_begin;
      // A tile that fills up a cluster ends before it begins.
      if (work.num_rows <= 0) {
        if constexpr (kCluster == 1) {
          continue;
        }
        work.num_rows = 0;
      }
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

// The blocks of K that this block multiplies; at least one, which lies behind the last and is zero
// where there are fewer than parts.
struct KRange {
  int begin;
  int end;
};
template <class Row>
__device__ __forceinline__ KRange KBlocksHere(const GroupedGemmArgs& args) {
  constexpr int kParts = Row::kConfig.k_parts;
  const int blocks = KBlocks<Row>(args);
  if constexpr (kParts == 1) {
    return {0, blocks};
  }
  const int rank = ClusterRank<Row>();
  KRange range{rank * blocks / kParts, (rank + 1) * blocks / kParts};
  if (range.begin == range.end) {
    range = {blocks, blocks + 1};
  }
  return range;
}

}  // namespace hopyard::gemm::sm90
