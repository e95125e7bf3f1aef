// SPDX-License-Identifier: Apache-2.0
// What one row of configs.def fixes at compile time, and what follows from it. Plain C++: the host
// checks every row without a CUDA compiler.
#pragma once

#include <cstdint>

#include "hopyard/spec.h"

#include "gemm/sm90/k_order.h"

namespace hopyard::gemm::sm90 {

// Which weights a kernel reads. Kernels of one family share a mainloop and a translation unit.
enum class Family : uint8_t {
  kBf16,         // BF16 x BF16, both operands from shared memory
  kFp8,          // e4m3 x e4m3 from shared memory, any scale granularity
  kFp8AsBf16,    // e4m3 weights decoded to BF16
  kMxFp8AsBf16,  // scales included
  kMxFp4AsBf16,
  kNvFp4AsBf16,  // global scale left out
  kMxInt4AsBf16,
  kMxFp4AsFp8,  // scales included, but for a power of two per row
  kNvFp4AsFp8,  // the same, rounded; global scale left out
};

// Which operand is M, of which a matrix instruction takes 64 rows. N may be few: weights are M
// where tiles hold few tokens or weights come from registers. Else tokens are: scales of tokens are
// then two values a thread instead of one per pair of sums, and large tiles read shared memory
// less.
//
// Weights as M: a consumer warpgroup owns two tiles of 64 weight rows, which are gate and up rows
// of the same 64 features where the GEMM is gated, else 128 features. Tokens as M: it owns 64 of
// the tile's 128 tokens, and the weight rows of all consumers in two tiles of 128, gate and up or
// 256 features.
struct GemmConfig {
  Family family = Family::kBf16;
  int tokens = 0;     // N of a tile: 16, 32, 64, 96 or 128
  int consumers = 1;  // consumer warpgroups, side by side along the features
  int stages = 0;     // depth of the pipeline
  bool gated = false;
  bool promoted = false;  // scales of tokens and 128x128 blocks are applied every 128 of K
  bool tokens_are_m = false;
  bool mn_major = false;  // weights lie [k, rows] in memory, K across
  // Of those, gate and up in alternate columns: a consumer's two tiles are 128 columns, and gate
  // and up meet in registers after the products.
  bool interleaved = false;
  // Blocks of a cluster: they take tiles of one expert side by side, and each copies a part of the
  // weights that all of them read into the shared memory of all.
  int cluster = 1;
  // Blocks of a cluster that share a tile: each multiplies its part of K, and the first adds their
  // sums up, in order. For few tokens, whose tiles are fewer than the places for blocks, or a few
  // more than a multiple of them.
  int k_parts = 1;
  // Blocks that share a multiprocessor, of kernels with one consumer and tiles of 16; 0: as many as
  // others have (BlocksPerProcessor). With few tokens more of them help where the second one waits
  // for memory, too. Their stages leave room for the L1 cache in the same memory: with all of it
  // taken (packed MXFP4 x FP8, 5 stages for 4) T = 8 to 128 took 6 to 12 % longer (H100, 2026-11).
  int blocks = 0;
  // Weights and their block scales come in units of gemm/packed_order.h, each in one piece or two.
  bool packed = false;

  friend constexpr bool operator==(const GemmConfig&, const GemmConfig&) = default;
};

inline constexpr int kTileRows = 64;            // M of one matrix instruction
inline constexpr int kMaxSharedBytes = 232448;  // of a block on Hopper

// Weights pass through registers on their way to the tensor cores.
constexpr bool IsDecoded(Family family) {
  return family != Family::kBf16 && family != Family::kFp8;
}
constexpr bool IsFp8Math(Family family) {
  return family == Family::kFp8 || family == Family::kMxFp4AsFp8 || family == Family::kNvFp4AsFp8;
}
// Weights are divided by a power of two per row (ComputeRowExponents) to be e4m3 numbers.
constexpr bool HasRowExponents(Family family) {
  return IsDecoded(family) && IsFp8Math(family);
}
constexpr KOrder OrderOf(Family family) {
  return !IsDecoded(family)  ? KOrder::kNatural
         : IsFp8Math(family) ? KOrder::kFp8Decoded
                             : KOrder::kBf16Decoded;
}
// K of a stage.
constexpr int BlockK(Family family) {
  return family == Family::kBf16 ? 64 : kKGroup;
}
constexpr int TokenElementBytes(Family family) {
  return IsFp8Math(family) ? 1 : 2;
}
// Bytes of a weight row in a stage: what one box of the copy engine is wide.
constexpr int WeightRowBytes(Family family) {
  switch (family) {
    case Family::kBf16:
    case Family::kFp8:
    case Family::kFp8AsBf16:
    case Family::kMxFp8AsBf16:
      return 128;
    default:
      return 64;
  }
}
// Block scales of a weight row and 128 of K, in bytes; 0: none that are read by the decoder.
constexpr int ScaleBytes(Family family) {
  switch (family) {
    case Family::kMxFp8AsBf16:
    case Family::kMxFp4AsBf16:
    case Family::kMxFp4AsFp8:
      return 4;
    case Family::kNvFp4AsBf16:
    case Family::kMxInt4AsBf16:
    case Family::kNvFp4AsFp8:
      return 8;
    default:
      return 0;
  }
}
constexpr bool ReadsWeights(Family family, WeightFormat weights) {
  switch (weights) {
    case WeightFormat::kBf16:
      return family == Family::kBf16;
    case WeightFormat::kFp8Block128:
    case WeightFormat::kFp8PerTensor:
    case WeightFormat::kFp8PerChannel:
      return family == Family::kFp8 || family == Family::kFp8AsBf16;
    case WeightFormat::kMxFp8:
      return family == Family::kMxFp8AsBf16;
    case WeightFormat::kNvFp4:
      return family == Family::kNvFp4AsBf16 || family == Family::kNvFp4AsFp8;
    case WeightFormat::kMxFp4:
      return family == Family::kMxFp4AsBf16 || family == Family::kMxFp4AsFp8;
    case WeightFormat::kMxInt4:
      return family == Family::kMxInt4AsBf16;
  }
  return false;
}

constexpr int FeaturesPerConsumer(const GemmConfig& config) {
  return config.gated ? kTileRows : 2 * kTileRows;
}
constexpr int FeaturesPerBlock(const GemmConfig& config) {
  return config.consumers * FeaturesPerConsumer(config);
}
// Whether blocks see whole groups of 128 features of GEMM1's output, which scales may cover.
constexpr bool RoundsRows(const GemmConfig& config) {
  return config.gated && config.consumers == 2;
}
constexpr int TileBytes(const GemmConfig& config) {
  return kTileRows * WeightRowBytes(config.family);
}
// Of a consumer's 128 weight rows in a stage. Packed ones bring their block scales, ahead of them.
constexpr int ConsumerWeightBytes(const GemmConfig& config) {
  return 2 * TileBytes(config) + (config.packed ? 2 * kTileRows * ScaleBytes(config.family) : 0);
}
constexpr int WeightBytes(const GemmConfig& config) {
  return config.consumers * ConsumerWeightBytes(config);
}
// A stage's token rows: panels of 128 bytes a row, one or two of them.
constexpr int TokenPanels(const GemmConfig& config) {
  return BlockK(config.family) * TokenElementBytes(config.family) / 128;
}
constexpr int TokenBytes(const GemmConfig& config) {
  return config.tokens * 128 * TokenPanels(config);
}
// Families whose weights may have a scale per 128x128 block.
constexpr bool HasSquareScales(Family family) {
  return family == Family::kFp8 || family == Family::kFp8AsBf16;
}
// What the tokens' sums over 128 of K are multiplied by, f32: a set for every 128 rows of weights
// (or 64, of gate or up) where these have square scales, times that scale; else one for all. A set
// is [4][tokens / 4 + 4]: the values of a quad's lane lie together, and the four do not meet in a
// bank. Where tokens are M it is [tokens], and as large.
constexpr int ScaleSets(const GemmConfig& config) {
  return !config.promoted                  ? 0
         : !HasSquareScales(config.family) ? 1
         : config.gated                    ? 2
                                           : config.consumers;
}
constexpr int ScaleLaneBytes(const GemmConfig& config) {
  return config.tokens + 16;
}
constexpr int ScaleSetBytes(const GemmConfig& config) {
  return 4 * ScaleLaneBytes(config);
}
constexpr int StageScaleBytes(const GemmConfig& config) {
  return ScaleSets(config) * ScaleSetBytes(config);
}
// 64 features of every token, per consumer, on their way from registers to memory. Where tokens are
// M, that is where the last stage's weights were.
constexpr int StagingBytes(const GemmConfig& config) {
  return config.tokens_are_m ? 0 : config.consumers * config.tokens * kTileRows * 2;
}
// One factor and one row of the LoRA delta per token and consumer (epilogue.cuh); where tokens are
// M, also factor and bias of every weight row.
constexpr int FactorBytes(const GemmConfig& config) {
  return config.consumers * config.tokens * 8 + (config.tokens_are_m ? 4 * kTileRows * 8 : 0);
}
// Work items that the producer has begun and the consumers have not ended: one stage each at least,
// and one more whose stages are free already.
constexpr int WorkSlots(const GemmConfig& config) {
  return config.stages + 1;
}
constexpr int WorkBytes(const GemmConfig& config) {
  return WorkSlots(config) * 16;
}
// A stage has two, a work item one, and the room for parts' sums two.
constexpr int BarrierBytes(const GemmConfig& config) {
  return (2 * config.stages + WorkSlots(config) + (config.k_parts > 1 ? 2 : 0)) * 8;
}
// Large tiles keep there where their tokens are in x: the producer has not the registers for it.
constexpr int SourceBytes(const GemmConfig& config) {
  return config.tokens_are_m ? config.tokens * 4 : 0;
}
// Block scales of decoded weights, two windows of 16 bytes for each of a consumer warp's 32 rows.
inline constexpr int kWeightScaleRowBytes = 32;
inline constexpr int kWeightScaleWarpBytes = 32 * kWeightScaleRowBytes;
constexpr int WeightScaleBytes(const GemmConfig& config) {
  return ScaleBytes(config.family) > 0 && !config.packed
             ? config.consumers * 4 * kWeightScaleWarpBytes
             : 0;
}
// The sums of all parts of K but the first, on their way to it: FP32, of two tiles. Every block has
// room for them, that of the first part uses it.
constexpr int PartBytes(const GemmConfig& config) {
  return (config.k_parts - 1) * 2 * kTileRows * config.tokens * 4;
}
// From a start that is aligned to the 1024 bytes of a swizzle pattern.
constexpr int SharedBytes(const GemmConfig& config) {
  return config.stages * (WeightBytes(config) + TokenBytes(config) + StageScaleBytes(config)) +
         StagingBytes(config) + FactorBytes(config) + SourceBytes(config) +
         WeightScaleBytes(config) + PartBytes(config) + WorkBytes(config) + BarrierBytes(config);
}
constexpr int ThreadsPerBlock(const GemmConfig& config) {
  return 128 * (1 + config.consumers);
}

constexpr int BlocksPerCluster(const GemmConfig& config) {
  return config.cluster * config.k_parts;
}

// Blocks that share a multiprocessor. Small tiles wait for memory and decode more than they
// multiply: a second block works meanwhile.
constexpr int BlocksPerProcessor(const GemmConfig& config) {
  if (config.blocks > 0) {
    return config.blocks;
  }
  return config.consumers == 1 || config.tokens <= 32 ? 2 : 1;
}
// Registers of a thread before the roles part, what ptxas gives to kernels of so many threads.
constexpr int StartRegisters(const GemmConfig& config) {
  if (config.blocks > 0) {
    return config.blocks == 3 ? 80 : 64;
  }
  return config.consumers == 1 ? 128 : BlocksPerProcessor(config) == 2 ? 80 : 168;
}
// Registers of a consumer's thread after that; the producer's keep what is left. Neither side
// spills (ptxas says so).
constexpr int ConsumerRegisters(const GemmConfig& config) {
  if (config.blocks > 0) {
    return config.blocks == 3 ? 120 : 96;
  }
  if (config.consumers == 1) {
    return 184;
  }
  if (config.tokens <= 32) {
    return config.tokens == 32 || config.family == Family::kNvFp4AsBf16 ? 104 : 96;
  }
  if (config.tokens != 96) {
    return 224;
  }
  return !IsDecoded(config.family) || config.promoted ? 224 : 216;
}
constexpr int ProducerRegisters(const GemmConfig& config) {
  return (1 + config.consumers) * StartRegisters(config) -
         config.consumers * ConsumerRegisters(config);
}
// The system keeps 1 KiB of each block's part of a multiprocessor's 228.
constexpr int SharedLimit(const GemmConfig& config) {
  const int blocks = BlocksPerProcessor(config);
  return blocks == 1 ? kMaxSharedBytes : 233472 / blocks - 1024;
}

// What the kernel for MN-major weights is to the one for K-major ones: all else is equal, but there
// are no clusters and no parts of K.
constexpr bool IsMnMajorTwin(GemmConfig config, const GemmConfig& twin, bool interleaved) {
  config.mn_major = true;
  config.cluster = 1;
  config.k_parts = 1;
  config.stages = twin.stages;
  config.interleaved = interleaved;
  return config == twin;
}
// Whether the kernel for packed weights can take the place of the one for the checkpoint's own: it
// sees the same tiles of tokens, and all that the other one writes.
constexpr bool IsPackedTwin(const GemmConfig& config, const GemmConfig& twin) {
  return twin.packed && !config.packed && config.family == twin.family &&
         config.tokens == twin.tokens && config.gated == twin.gated &&
         config.promoted == twin.promoted && (RoundsRows(twin) || !RoundsRows(config));
}
// The feature, of a consumer's 64, whose sums end up in row `row` of its tile. Interleaved: columns
// 2 f and 2 f + 1 are gate and up of feature f; of a pair of rows the even one keeps the feature of
// the first tile's, the odd one takes the second's.
constexpr int FeatureOfRow(bool interleaved, int row) {
  return interleaved ? row % 2 * (kTileRows / 2) + row / 2 : row;
}

constexpr bool IsValid(const GemmConfig& config) {
  const bool tokens = config.tokens == 16 || config.tokens == 32 || config.tokens == 64 ||
                      config.tokens == 96 || config.tokens == 128;
  const bool can_promote = config.family != Family::kBf16;
  const bool operands = !config.tokens_are_m || (config.family == Family::kFp8 && config.promoted &&
                                                 config.consumers == 2 && config.tokens == 128);
  const bool major = (!config.mn_major || config.family == Family::kBf16) &&
                     (!config.interleaved || (config.mn_major && config.gated));
  // A block of a cluster copies whole tiles.
  const bool cluster =
      config.cluster == 1 || (config.cluster == 2 && BlocksPerProcessor(config) == 1);
  const bool parts = config.k_parts == 1 || (config.k_parts <= 8 && config.consumers == 1 &&
                                             config.cluster == 1 && !config.mn_major);
  const bool blocks =
      config.blocks == 0 || ((config.blocks == 3 || config.blocks == 4) && config.consumers == 1 &&
                             config.tokens == 16 && BlocksPerCluster(config) == 1);
  const bool packed =
      !config.packed || (ScaleBytes(config.family) > 0 && WeightRowBytes(config.family) == 64 &&
                         BlocksPerCluster(config) == 1);
  return tokens && operands && major && cluster && parts && blocks && packed &&
         (config.consumers == 1 || config.consumers == 2) && config.stages >= 3 &&
         (can_promote || !config.promoted) && SharedBytes(config) <= SharedLimit(config);
}

// Rows of a build with HOPYARD_KERNELS=dev, which compiles in a fraction of the time: the smallest
// tile of every family, and a larger one, for two consumers, of a family without and one with
// decoding. Every pair of formats then has both its GEMMs (config_test.cc).
constexpr bool IsInDevSubset(const GemmConfig& config) {
  const bool both = config.family == Family::kBf16 || config.family == Family::kMxFp4AsBf16;
  return !config.packed &&
         ((config.tokens == 16 && config.blocks == 0) || (both && config.tokens == 64));
}

}  // namespace hopyard::gemm::sm90
