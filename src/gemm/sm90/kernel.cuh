// SPDX-License-Identifier: Apache-2.0
// The persistent grouped GEMM: one producer warpgroup fills a ring of stages, consumer warpgroups
// multiply and write.
#pragma once

#include <cstdint>

#include "device/sm90/dependent.cuh"
#include "gemm/sm90/epilogue.cuh"
#include "gemm/sm90/mainloop.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/producer.cuh"

namespace hopyard::gemm::sm90 {

// The next work item's sums and place; false where there is no more.
template <class Row>
__device__ __forceinline__ bool MultiplyNext(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                             int slot, Consumer<Row>& self, OutputTile<Row>& tile,
                                             float (&acc)[2][kSums<Row>]) {
  constexpr GemmConfig kConfig = Row::kConfig;
  {
    const Work work = shared.LoadWork(slot);
    if (work.expert < 0) {
      return false;
    }
    Multiply<Row>(args, shared, work, self, acc);
  }
  if constexpr (kConfig.k_parts > 1) {
    AddParts<Row>(shared, self.parity, acc);
    self.parity ^= 1U;
  }
  // Read again rather than kept: registers are short meanwhile.
  const Work work = shared.LoadWork(slot);
  tile.expert = work.expert;
  tile.row_begin = work.row_begin;
  tile.num_rows = work.num_rows;
  tile.feature_begin =
      int64_t{work.feature_begin} +
      self.number * (kConfig.tokens_are_m ? kTileRows : FeaturesPerConsumer(kConfig));
  return true;
}

template <class Row>
__device__ void Consume(const GroupedGemmArgs& args, const Shared<Row>& shared, uint32_t table) {
  constexpr GemmConfig kConfig = Row::kConfig;
  // Shuffled so that the compiler takes it for the same in all lanes.
  const int number =
      __shfl_sync(hopyard::sm90::kAllLanes, static_cast<int>(threadIdx.x) / 128 - 1, 0);
  Consumer<Row> self{number, {}, table};
  // Of the blocks that share K, the first has the sums.
  const bool stores = kConfig.k_parts == 1 || ClusterRank<Row>() == 0;
  OutputTile<Row> tile{};
  tile.base = shared.base;
  ClearFactors(tile);
  for (RingPosition<WorkSlots(kConfig)> slot;; slot.Advance()) {
    shared.Posted(slot.stage).Wait(slot.parity);
    float acc[2][kSums<Row>];
    if (!MultiplyNext(args, shared, slot.stage, self, tile, acc)) {
      return;
    }
    // The tile's last stage is held until its room has been used.
    const int held = (self.ring.stage == 0 ? kConfig.stages : self.ring.stage) - 1;
    if constexpr (kConfig.tokens_are_m) {
      tile.staged = shared.Weights(held, 0, 0);
    }
    if (stores && (kConfig.cluster == 1 || tile.num_rows > 0)) {
      StoreTile<Row>(args, tile, acc);
    }
    if constexpr (kConfig.tokens_are_m) {
      // The copy engine writes there next.
      hopyard::sm90::FenceAsyncProxy();
      Release<Row>(shared.Empty(held));
    }
  }
}

template <class Row>
__global__ void __launch_bounds__(ThreadsPerBlock(Row::kConfig), BlocksPerProcessor(Row::kConfig))
    GroupedGemmKernel(const __grid_constant__ GroupedGemmArgs args) {
  constexpr GemmConfig kConfig = Row::kConfig;
  extern __shared__ __align__(1024) uint8_t memory[];
  hopyard::sm90::ReleaseDependents();
  const Shared<Row> shared(memory);
  // What no kernel writes is prepared while those ahead still run.
  uint32_t table = 0;
  if constexpr (kConfig.family == Family::kMxFp4AsFp8) {
    static constexpr Fp8Table kTable = MakeFp8Table();
    __shared__ Fp8Table codes;
    for (int i = static_cast<int>(threadIdx.x); i < kFp8TableRows * 8; i += blockDim.x) {
      codes.codes[i / 8][i % 8] = kTable.codes[i / 8][i % 8];
    }
    table = hopyard::sm90::SharedAddress(&codes);
  }
  if (threadIdx.x == 0) {
    if constexpr (!kConfig.packed) {
      hopyard::sm90::PrefetchTensorMap(&args.first.map);
    }
    for (int stage = 0; stage < kConfig.stages; ++stage) {
      shared.Full(stage).Init(Shared<Row>::kFullArrivals);
      // Every consumer warp of the cluster.
      shared.Empty(stage).Init(kConfig.cluster * kConfig.consumers * 4);
    }
    for (int slot = 0; slot < WorkSlots(kConfig); ++slot) {
      shared.Posted(slot).Init(1);
    }
    if constexpr (kConfig.k_parts > 1) {
      shared.PartsFull().Init(1);
      // Warps of the first block's consumer.
      shared.PartsFree().Init(4);
    }
    hopyard::sm90::FenceBarrierInit();
  }
  if constexpr (BlocksPerCluster(kConfig) == 1) {
    __syncthreads();
  } else {
    hopyard::sm90::SyncCluster();
  }
  hopyard::sm90::AwaitPredecessors();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(ProducerRegisters(kConfig)));
    Produce<Row>(args, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ConsumerRegisters(kConfig)));
    Consume<Row>(args, shared, table);
  }
  if constexpr (BlocksPerCluster(kConfig) > 1) {
    // No block's memory goes while another copies or arrives there.
    hopyard::sm90::SyncCluster();
  }
}

}  // namespace hopyard::gemm::sm90
