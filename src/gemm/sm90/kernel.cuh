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

// Shared memory of a block, carved at run time from its aligned start.
template <class Row>
struct Shared {
  static constexpr GemmConfig kConfig = Row::kConfig;
  uint8_t* weights;  // [stages][consumers][2] tiles
  uint8_t* tokens;   // [stages] tiles
  uint8_t* staging;  // [consumers] tiles
  Barrier* full;     // [stages]
  Barrier* empty;    // [stages]

  __device__ explicit Shared(uint8_t* memory) {
    const uint32_t start = hopyard::sm90::SharedAddress(memory);
    weights = memory + ((start + 1023U) / 1024U * 1024U - start);
    tokens = weights + kConfig.stages * WeightBytes(kConfig);
    staging = tokens + kConfig.stages * TokenBytes(kConfig);
    full = static_cast<Barrier*>(static_cast<void*>(staging + StagingBytes(kConfig)));
    empty = full + kConfig.stages;
  }
};

// One tile of tokens and one block of features.
struct Work {
  int expert;
  int64_t row_begin;
  int num_rows;
  int64_t feature_begin;
};

// Blocks take work in strides; tiles of one expert that share weight rows are neighbours in time.
template <class Row>
struct Scheduler {
  const GroupedGemmArgs& args;
  int64_t num_tiles;
  int64_t total;
  int64_t next;

  __device__ explicit Scheduler(const GroupedGemmArgs& gemm)
      : args(gemm), num_tiles(*gemm.num_tiles), next(blockIdx.x) {
    constexpr int kFeatures = FeaturesPerBlock(Row::kConfig);
    total = num_tiles * ((gemm.features + kFeatures - 1) / kFeatures);
  }
  // False at the end.
  __device__ bool Next(Work& work) {
    if (next >= total) {
      return false;
    }
    const int64_t tile = next % num_tiles;
    work.feature_begin = next / num_tiles * FeaturesPerBlock(Row::kConfig);
    work.expert = args.tile_expert[tile];
    work.row_begin = args.tile_row_begin[tile];
    work.num_rows = args.tile_row_end[tile] - args.tile_row_begin[tile];
    next += gridDim.x;
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
  Barrier* const barrier = shared.full + stage;
  barrier->ArriveAndExpect(WeightBytes(kConfig));
  for (int c = 0; c < kConfig.consumers; ++c) {
    const int64_t feature = work.feature_begin + c * FeaturesPerConsumer(kConfig);
    for (int half = 0; half < 2; ++half) {
      uint8_t* const tile =
          shared.weights + stage * WeightBytes(kConfig) + (2 * c + half) * kTileBytes;
      hopyard::sm90::CopyBox(&args.weights, tile, barrier, k_block * kBlockK,
                             static_cast<int>(WeightRow<Row>(args.gemm, feature, half)),
                             work.expert);
    }
  }
}

// The producer warpgroup. Token rows are written by threads: their pieces have landed and are
// fenced for the tensor cores kLag stages later, when the stage is handed over.
template <class Row>
__device__ void Produce(const KernelArgs& args, const Shared<Row>& shared) {
  constexpr GemmConfig kConfig = Row::kConfig;
  constexpr int kLag = 2;
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
      shared.empty[fill.stage].Wait(fill.parity ^ 1U);
      if (thread == 0) {
        IssueWeights<Row>(args, work, shared, fill.stage, block);
      }
      const int left = 2 * (k - block * kBlockK - piece * 8);
      const uint32_t tile =
          hopyard::sm90::SharedAddress(shared.tokens + fill.stage * TokenBytes(kConfig));
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
        shared.full[hand_over.stage].Arrive();
        hand_over.Advance();
      }
    }
  }
  hopyard::sm90::WaitPieces<0>();
  hopyard::sm90::FenceAsyncProxy();
  for (; lag > 0; --lag) {
    shared.full[hand_over.stage].Arrive();
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
    shared.full[ring.stage].Wait(ring.parity);
    const uint64_t tokens =
        hopyard::sm90::TileDescriptor(shared.tokens + ring.stage * TokenBytes(kConfig));
    const uint8_t* const weights =
        shared.weights + ring.stage * WeightBytes(kConfig) + 2 * consumer * kTileBytes;
    const uint64_t first = hopyard::sm90::TileDescriptor(weights);
    const uint64_t second = hopyard::sm90::TileDescriptor(weights + kTileBytes);
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
      shared.empty[previous].Arrive();
    }
    previous = ring.stage;
    ring.Advance();
  }
  hopyard::sm90::MmaWait<0>();
  if (previous >= 0 && leader) {
    shared.empty[previous].Arrive();
  }
  hopyard::sm90::Touch(acc[0]);
  hopyard::sm90::Touch(acc[1]);
}

template <class Row>
__device__ void Consume(const KernelArgs& args, const Shared<Row>& shared) {
  constexpr GemmConfig kConfig = Row::kConfig;
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  const int k_blocks = static_cast<int>((args.gemm.k + kBlockK - 1) / kBlockK);
  uint8_t* const staging = shared.staging + consumer * kConfig.tokens * kTileRows * 2;
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
      shared.full[stage].Init(128 + 1);
      shared.empty[stage].Init(kConfig.consumers);
    }
    hopyard::sm90::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    Produce<Row>(args, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    Consume<Row>(args, shared);
  }
}

}  // namespace hopyard::gemm::sm90
