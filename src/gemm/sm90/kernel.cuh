// SPDX-License-Identifier: Apache-2.0
// The persistent grouped GEMM: one producer warpgroup fills a ring of stages (weights by the copy
// engine, gathered token rows by 16-byte copies), consumer warpgroups multiply and write.
#pragma once

#include <cstdint>

#include "device/sm90/copy.cuh"
#include "device/sm90/wgmma.cuh"
#include "gemm/sm90/config.h"
#include "gemm/sm90/epilogue.cuh"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

using hopyard::sm90::Barrier;

struct KernelArgs {
  CUtensorMap weights;
  GroupedGemmArgs gemm;
};

// Addresses in a block's shared memory, from its aligned start.
template <class Row>
struct Shared {
  static constexpr GemmConfig kConfig = Row::kConfig;
  static constexpr uint32_t kTokens = kConfig.stages * WeightBytes(kConfig);
  static constexpr uint32_t kStaging = kTokens + kConfig.stages * TokenBytes(kConfig);
  static constexpr uint32_t kBarriers = kStaging + StagingBytes(kConfig);

  uint32_t base;

  __device__ explicit Shared(const uint8_t* memory)
      : base((hopyard::sm90::SharedAddress(memory) + 1023U) / 1024U * 1024U) {}
  __device__ __forceinline__ uint32_t Weights(int stage, int consumer, int half) const {
    return base +
           static_cast<uint32_t>(stage * WeightBytes(kConfig) + (2 * consumer + half) * kTileBytes);
  }
  __device__ __forceinline__ uint32_t Tokens(int stage) const {
    return base + kTokens + static_cast<uint32_t>(stage * TokenBytes(kConfig));
  }
  __device__ __forceinline__ uint32_t Staging(int consumer) const {
    return base + kStaging + static_cast<uint32_t>(consumer * kConfig.tokens * kTileRows * 2);
  }
  __device__ __forceinline__ Barrier Full(int stage) const {
    return {base + kBarriers + 8U * static_cast<uint32_t>(stage)};
  }
  __device__ __forceinline__ Barrier Empty(int stage) const {
    return {base + kBarriers + 8U * static_cast<uint32_t>(kConfig.stages + stage)};
  }
};

// One tile of tokens and one block of features.
struct Work {
  int expert;
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
    feature_blocks = static_cast<int>((gemm.features + kFeatures - 1) / kFeatures);
  }
  // False at the end.
  __device__ bool Next(Work& work) {
    if (next >= num_tiles * feature_blocks) {
      return false;
    }
    const int group = next / (kGroupTiles * feature_blocks);
    const int within = next % (kGroupTiles * feature_blocks);
    const int left = num_tiles - group * kGroupTiles;
    const int tiles = left < kGroupTiles ? left : kGroupTiles;
    const int tile = group * kGroupTiles + within % tiles;
    work.feature_begin = within / tiles * FeaturesPerBlock(Row::kConfig);
    work.expert = args.tile_expert[tile];
    work.row_begin = args.tile_row_begin[tile];
    work.num_rows = args.tile_row_end[tile] - args.tile_row_begin[tile];
    next += static_cast<int>(gridDim.x);
    return true;
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

// First weight row of tile `half` of a consumer.
template <class Row>
__device__ __forceinline__ int64_t WeightRow(const GroupedGemmArgs& args, int64_t feature,
                                             int half) {
  if constexpr (Row::kConfig.gated) {
    return feature + (half == 0 ? args.gate_begin : args.up_begin);
  } else {
    return feature + half * kTileRows;
  }
}

template <class Row>
__device__ void IssueWeights(const KernelArgs& args, const Work& work, const Shared<Row>& shared,
                             int stage, int k_block) {
  constexpr GemmConfig kConfig = Row::kConfig;
  const Barrier barrier = shared.Full(stage);
  barrier.ArriveAndExpect(WeightBytes(kConfig));
  for (int c = 0; c < kConfig.consumers; ++c) {
    const int64_t feature = work.feature_begin + c * FeaturesPerConsumer(kConfig);
    for (int half = 0; half < 2; ++half) {
      hopyard::sm90::CopyBox(
          &args.weights, shared.Weights(stage, c, half), barrier, k_block * kBlockK,
          static_cast<int>(WeightRow<Row>(args.gemm, feature, half)), work.expert);
    }
  }
}

// The producer warpgroup. Token rows are written by threads: their pieces have landed and are
// fenced for the tensor cores kLag stages later, when the stage is handed over.
template <class Row>
__device__ void Produce(const KernelArgs& args, const Shared<Row>& shared) {
  constexpr GemmConfig kConfig = Row::kConfig;
  constexpr int kLag = kConfig.stages > 5 ? 5 : 1;
  constexpr int kRowsPerThread = kConfig.tokens / 16;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int piece = thread % 8;  // 16 bytes of a row's 128
  const int first_row = thread / 8;
  const auto k = static_cast<int>(args.gemm.k);
  const int k_blocks = (k + kBlockK - 1) / kBlockK;
  RingPosition<kConfig.stages> fill;
  RingPosition<kConfig.stages> hand_over;
  int lag = 0;
  Scheduler<Row> scheduler(args.gemm);
  Work work;
  while (scheduler.Next(work)) {
    const uint16_t* sources[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int row = first_row + 16 * i;
      int64_t source = 0;
      if (row < work.num_rows) {
        source = work.row_begin + row;
        source = args.gemm.row_to_source != nullptr ? args.gemm.row_to_source[source] : source;
      }
      sources[i] = args.gemm.x + source * args.gemm.x_pitch + piece * 8;
    }
    for (int block = 0; block < k_blocks; ++block) {
      shared.Empty(fill.stage).Wait(fill.parity ^ 1U);
      if (thread == 0) {
        IssueWeights<Row>(args, work, shared, fill.stage, block);
      }
      const int left = 2 * (k - block * kBlockK - piece * 8);
      const uint32_t tile = shared.Tokens(fill.stage);
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        const int row = first_row + 16 * i;
        const int bytes = row < work.num_rows ? (left < 0 ? 0 : (left < 16 ? left : 16)) : 0;
        const uint32_t at = tile + row * 128 + ((piece ^ (row % 8)) << 4);
        hopyard::sm90::CopyPiece(at, bytes > 0 ? sources[i] + block * kBlockK : args.gemm.x, bytes);
      }
      hopyard::sm90::CommitPieces();
      fill.Advance();
      if (++lag > kLag) {
        --lag;
        hopyard::sm90::WaitPieces<kLag>();
        hopyard::sm90::FenceAsyncProxy();
        shared.Full(hand_over.stage).Arrive();
        hand_over.Advance();
      }
    }
  }
  hopyard::sm90::WaitPieces<0>();
  hopyard::sm90::FenceAsyncProxy();
  for (; lag > 0; --lag) {
    shared.Full(hand_over.stage).Arrive();
    hand_over.Advance();
  }
}

// The products of one work item into acc[half].
template <class Row>
__device__ void Multiply(const Shared<Row>& shared, int consumer, int k_blocks,
                         RingPosition<Row::kConfig.stages>& ring,
                         float (&acc)[2][Row::kConfig.tokens / 2]) {
  constexpr GemmConfig kConfig = Row::kConfig;
  using Mma = hopyard::sm90::MmaBf16<kConfig.tokens>;
  const bool leader = threadIdx.x % 128 == 0;
  int previous = -1;
  for (int block = 0; block < k_blocks; ++block) {
    shared.Full(ring.stage).Wait(ring.parity);
    const uint64_t tokens = hopyard::sm90::TileDescriptor(shared.Tokens(ring.stage));
    const uint64_t first = hopyard::sm90::TileDescriptor(shared.Weights(ring.stage, consumer, 0));
    const uint64_t second = hopyard::sm90::TileDescriptor(shared.Weights(ring.stage, consumer, 1));
    hopyard::sm90::MmaFence();
#pragma unroll
    for (int step = 0; step < kBlockK / 16; ++step) {
      const int accumulate = block > 0 || step > 0 ? 1 : 0;
      Mma::Multiply(acc[0], first + 2 * step, tokens + 2 * step, accumulate);
      Mma::Multiply(acc[1], second + 2 * step, tokens + 2 * step, accumulate);
    }
    hopyard::sm90::MmaCommit();
    // The products of the stage before are done: it may be filled again.
    hopyard::sm90::MmaWait<1>();
    if (previous >= 0 && leader) {
      shared.Empty(previous).Arrive();
    }
    previous = ring.stage;
    ring.Advance();
  }
  hopyard::sm90::MmaWait<0>();
  if (previous >= 0 && leader) {
    shared.Empty(previous).Arrive();
  }
  hopyard::sm90::Touch(acc[0]);
  hopyard::sm90::Touch(acc[1]);
}

template <class Row>
__device__ void Consume(const KernelArgs& args, const Shared<Row>& shared) {
  constexpr GemmConfig kConfig = Row::kConfig;
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  const int k_blocks = static_cast<int>((args.gemm.k + kBlockK - 1) / kBlockK);
  const uint32_t staging = shared.Staging(consumer);
  RingPosition<kConfig.stages> ring;
  Scheduler<Row> scheduler(args.gemm);
  Work work;
  while (scheduler.Next(work)) {
    float acc[2][kConfig.tokens / 2];
    Multiply<Row>(shared, consumer, k_blocks, ring, acc);
    OutputTile tile;
    tile.expert = work.expert;
    tile.row_begin = work.row_begin;
    tile.num_rows = work.num_rows;
    tile.feature_begin = work.feature_begin + consumer * FeaturesPerConsumer(kConfig);
    tile.consumer = consumer;
    if constexpr (kConfig.gated) {
      StoreGated<kConfig.tokens>(args.gemm, tile, acc[0], acc[1], staging);
    } else {
      StorePlain<kConfig.tokens>(args.gemm, tile, acc[0], staging);
      tile.feature_begin += kTileRows;
      StorePlain<kConfig.tokens>(args.gemm, tile, acc[1], staging);
    }
  }
}

template <class Row>
__global__ void __launch_bounds__(ThreadsPerBlock(Row::kConfig), 1)
    GroupedGemmKernel(const __grid_constant__ KernelArgs args) {
  constexpr GemmConfig kConfig = Row::kConfig;
  extern __shared__ uint8_t memory[];
  const Shared<Row> shared(memory);
  if (threadIdx.x == 0) {
    hopyard::sm90::PrefetchTensorMap(&args.weights);
    for (int stage = 0; stage < kConfig.stages; ++stage) {
      // Every producer thread, and the expected bytes.
      shared.Full(stage).Init(128 + 1);
      shared.Empty(stage).Init(kConfig.consumers);
    }
    hopyard::sm90::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    Produce<Row>(args, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    Consume<Row>(args, shared);
  }
}

}  // namespace hopyard::gemm::sm90
