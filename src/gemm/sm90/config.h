// SPDX-License-Identifier: Apache-2.0
// What one row of configs.def fixes at compile time, and what follows from it. Plain C++: the host
// checks every row without a CUDA compiler.
#pragma once

#include <cstdint>

namespace hopyard::gemm::sm90 {

// Weights are the M operand: a consumer warpgroup owns two tiles of 64 weight rows, which are gate
// and up rows of the same 64 features where the GEMM is gated, else 128 features.
struct GemmConfig {
  int tokens = 0;     // N of a tile: 16, 32, 64 or 128
  int consumers = 1;  // consumer warpgroups, side by side along the features
  int stages = 0;     // depth of the pipeline
  bool gated = false;
};

inline constexpr int kBlockK = 64;    // BF16 values of a 128-byte row
inline constexpr int kTileRows = 64;  // M of one matrix instruction
inline constexpr int kTileBytes = kTileRows * kBlockK * 2;
inline constexpr int kMaxSharedBytes = 232448;  // of a block on Hopper

constexpr int FeaturesPerConsumer(const GemmConfig& config) {
  return config.gated ? kTileRows : 2 * kTileRows;
}
constexpr int FeaturesPerBlock(const GemmConfig& config) {
  return config.consumers * FeaturesPerConsumer(config);
}
constexpr int WeightBytes(const GemmConfig& config) {
  return config.consumers * 2 * kTileBytes;
}
constexpr int TokenBytes(const GemmConfig& config) {
  return config.tokens * kBlockK * 2;
}
// 64 features of every token, per consumer, on their way from registers to memory.
constexpr int StagingBytes(const GemmConfig& config) {
  return config.consumers * config.tokens * kTileRows * 2;
}
constexpr int BarrierBytes(const GemmConfig& config) {
  return 2 * config.stages * 8;
}
// Tiles are aligned to the 1024 bytes of a swizzle pattern; the start of shared memory need not be.
constexpr int SharedBytes(const GemmConfig& config) {
  return 1024 + config.stages * (WeightBytes(config) + TokenBytes(config)) + StagingBytes(config) +
         BarrierBytes(config);
}
constexpr int ThreadsPerBlock(const GemmConfig& config) {
  return 128 * (1 + config.consumers);
}

constexpr bool IsValid(const GemmConfig& config) {
  const bool tokens =
      config.tokens == 16 || config.tokens == 32 || config.tokens == 64 || config.tokens == 128;
  return tokens && (config.consumers == 1 || config.consumers == 2) && config.stages >= 3 &&
         SharedBytes(config) <= kMaxSharedBytes;
}

}  // namespace hopyard::gemm::sm90
