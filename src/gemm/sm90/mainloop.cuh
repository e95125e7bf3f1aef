// SPDX-License-Identifier: Apache-2.0
// The consumers' products: a work item's sums in FP32 registers, acc[half][...].
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/sm90/wgmma.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/weight_scales.cuh"

namespace hopyard::gemm::sm90 {

using hopyard::sm90::TileDescriptor;

template <class Row>
using Mma = typename std::conditional<IsFp8Math(Row::kConfig.family),
                                      hopyard::sm90::MmaE4m3<Row::kConfig.tokens>,
                                      hopyard::sm90::MmaBf16<Row::kConfig.tokens>>::type;

template <class Row>
inline constexpr int kSums = Row::kConfig.tokens / 2;

// What a consumer warpgroup keeps while it works.
template <class Row>
struct Consumer {
  int number;
  RingPosition<Row::kConfig.stages> ring;
  uint32_t table;       // of kMxFp4AsFp8
  uint32_t parity = 0;  // of the work items so far, where blocks share K
};

// A warp has read what it wanted of a stage; all blocks that copy to it learn that.
template <class Row>
__device__ __forceinline__ void Release(Barrier empty) {
  constexpr int kCluster = Row::kConfig.cluster;
  __syncwarp();
  const uint32_t lane = threadIdx.x % 32;
  if constexpr (kCluster == 1) {
    if (lane == 0) {
      empty.Arrive();
    }
  } else {
    if (lane < kCluster) {
      empty.ArriveAt(lane);
    }
  }
}

__device__ __forceinline__ float LoadOne(uint32_t shared) {
  float one = 0.0F;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(one) : "r"(shared));
  return one;
}

template <int kCount>
__device__ __forceinline__ void Clear(float (&acc)[2][kCount]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      acc[half][i] = 0.0F;
    }
  }
}

__device__ __forceinline__ float4 LoadFour(uint32_t shared) {
  float4 four;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(shared));
  return four;
}

// Adds the sums of all parts of K to the first one's, in order. `parity`: of the work items so far.
template <class Row>
__device__ __forceinline__ void AddParts(const Shared<Row>& shared, uint32_t parity,
                                         float (&acc)[2][kSums<Row>]) {
  constexpr GemmConfig kConfig = Row::kConfig;
  constexpr int kFours = kSums<Row> / 2;  // of a thread's sums
  const int rank = ClusterRank<Row>();
  // Four sums of 128 threads lie together: no two threads meet in a bank.
  const auto place = [&](int part, int four) {
    return shared.base + Shared<Row>::kParts +
           2048U * static_cast<uint32_t>((part - 1) * kFours + four) + 16U * (threadIdx.x % 128);
  };
  if (rank > 0) {
    shared.PartsFree().Wait(parity ^ 1U);
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const float* const sums = acc[4 * four / kSums<Row>] + 4 * four % kSums<Row>;
      hopyard::sm90::SendFour(place(rank, four), shared.PartsFull(), 0,
                              make_float4(sums[0], sums[1], sums[2], sums[3]));
    }
    return;
  }
  if (threadIdx.x % 128 == 0) {
    shared.PartsFull().ArriveAndExpect(PartBytes(kConfig));
  }
  shared.PartsFull().Wait(parity);
#pragma unroll
  for (int part = 1; part < kConfig.k_parts; ++part) {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      float* const sums = acc[4 * four / kSums<Row>] + 4 * four % kSums<Row>;
      const float4 more = LoadFour(place(part, four));
      sums[0] = __fadd_rn(sums[0], more.x);
      sums[1] = __fadd_rn(sums[1], more.y);
      sums[2] = __fadd_rn(sums[2], more.z);
      sums[3] = __fadd_rn(sums[3], more.w);
    }
  }
  __syncwarp();
  const uint32_t lane = threadIdx.x % 32;
  if (lane > 0 && lane < kConfig.k_parts) {
    shared.PartsFree().ArriveAt(lane);
  }
}

// The first kN tokens of a tile's sums.
template <int kN, int kCount>
__device__ __forceinline__ float (&FirstTokens(float (&sums)[kCount]))[kN / 2] {
  static_assert(kN / 2 <= kCount);
  return *static_cast<float(*)[kN / 2]>(static_cast<void*>(&sums));
}

// BF16 from shared memory, kN tokens of the tile: both tiles of a stage are one group of
// instructions.
template <class Row, int kN>
__device__ __forceinline__ void MultiplyShared(const Shared<Row>& shared, KRange blocks,
                                               Consumer<Row>& self, float (&acc)[2][kSums<Row>]) {
  constexpr int kSteps = BlockK(Row::kConfig.family) / 16;
  using Bf16 = hopyard::sm90::MmaBf16<kN>;
  auto& first_sums = FirstTokens<kN>(acc[0]);
  auto& second_sums = FirstTokens<kN>(acc[1]);
  int previous = -1;
  for (int block = blocks.begin; block < blocks.end; ++block) {
    const int stage = self.ring.stage;
    shared.AwaitFull(stage, self.ring.parity);
    const TileDescriptor tokens(shared.Tokens(stage, 0));
    const TileDescriptor first(shared.Weights(stage, self.number, 0));
    const TileDescriptor second(shared.Weights(stage, self.number, 1));
    hopyard::sm90::MmaFence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int accumulate = block > blocks.begin || step > 0 ? 1 : 0;
      const uint64_t columns = tokens.Plus(32U * step).Bits();
      if constexpr (Row::kConfig.mn_major) {
        const uint32_t rows = 16U * 128U * step;
        Bf16::MultiplyMnMajor(first_sums, first.Plus(rows).Bits(), columns, accumulate);
        Bf16::MultiplyMnMajor(second_sums, second.Plus(rows).Bits(), columns, accumulate);
      } else {
        Bf16::Multiply(first_sums, first.Plus(32U * step).Bits(), columns, accumulate);
        Bf16::Multiply(second_sums, second.Plus(32U * step).Bits(), columns, accumulate);
      }
    }
    hopyard::sm90::MmaCommit();
    // The products of the stage before are done: it may be filled again.
    hopyard::sm90::MmaWait<1>();
    if (previous >= 0) {
      Release<Row>(shared.Empty(previous));
    }
    previous = stage;
    self.ring.Advance();
  }
  hopyard::sm90::MmaWait<0>();
  if (previous >= 0) {
    Release<Row>(shared.Empty(previous));
  }
  hopyard::sm90::Touch(first_sums);
  hopyard::sm90::Touch(second_sums);
}

__device__ __forceinline__ float2 LoadPair(uint32_t shared) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared));
  return pair;
}

// Weights as M: sums += part x scale of the token, from a lane's part of a set, x `rows` where
// kRows.
template <class Row, bool kRows>
__device__ __forceinline__ void AddColumns(const float (&part)[kSums<Row>], uint32_t scales,
                                           float2 rows, float (&sums)[kSums<Row>]) {
#pragma unroll
  for (int j = 0; j < Row::kConfig.tokens / 8; j += 2) {
    const float4 four = LoadFour(scales + 8U * static_cast<uint32_t>(j));
    const float tokens[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float token = tokens[i / 4 * 2 + i % 2];
      const float scale = kRows ? __fmul_rn(i / 2 % 2 == 0 ? rows.x : rows.y, token) : token;
      sums[4 * j + i] = __fmaf_rn(part[4 * j + i], scale, sums[4 * j + i]);
    }
  }
}
// The scales of weight rows are in those of a stage's tokens, or (!complete) beside them. `tile` is
// 2 * consumer + half.
template <class Row>
__device__ __forceinline__ void PromoteColumns(const Shared<Row>& shared, int stage, int tile,
                                               bool complete, const float (&part)[kSums<Row>],
                                               float (&sums)[kSums<Row>]) {
  const uint32_t scales = shared.Scales(stage, Shared<Row>::ScaleSetOf(tile)) +
                          (threadIdx.x % 4) * static_cast<uint32_t>(ScaleLaneBytes(Row::kConfig));
  if (complete) {
    AddColumns<Row, false>(part, scales, {}, sums);
  } else {
    const float2 rows = LoadRowScales(shared.TileScales(stage, tile), FirstRowOfThread());
    AddColumns<Row, true>(part, scales, rows, sums);
  }
}

// Tokens as M: the same, `half` being 128 weight rows.
template <class Row>
__device__ __forceinline__ void PromoteRows(const Shared<Row>& shared, int stage, int consumer,
                                            int half, bool complete,
                                            const float (&part)[kSums<Row>],
                                            float (&sums)[kSums<Row>]) {
  const int first_tile = Row::kConfig.gated ? half : 2 * half;
  const uint32_t token = shared.Scales(stage, Shared<Row>::ScaleSetOf(first_tile)) +
                         4U * static_cast<uint32_t>(consumer * kTileRows + FirstRowOfThread());
  const float tokens[2] = {LoadOne(token), LoadOne(token + 32U)};
  if (complete) {
#pragma unroll
    for (int i = 0; i < kSums<Row>; ++i) {
      sums[i] = __fmaf_rn(part[i], tokens[i / 2 % 2], sums[i]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kSums<Row> / 4; ++j) {
    // Read for every 8 columns: registers are short.
    const int tile = first_tile + (j < 8 ? 0 : Row::kConfig.gated ? 2 : 1);
    BlocksOfRows blocks = LoadBlocksOfRows(shared.TileScales(stage, tile));
    blocks.rows_of_first -= static_cast<int>(threadIdx.x) % 4 * 2;
    const float rows[2] = {blocks.ScaleOf(j % 8 * 8), blocks.ScaleOf(j % 8 * 8 + 1)};
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) {
      sums[i] = __fmaf_rn(part[i], __fmul_rn(rows[i % 2], tokens[i / 2 % 2]), sums[i]);
    }
  }
}

// Where tile `half` of a stage comes from: shared memory, or registers that `Prepare` fills.
template <class Row>
struct WeightTiles {
  static constexpr Family kFamily = Row::kConfig.family;
  static constexpr bool kScaled = ScaleBytes(kFamily) > 0;
  // With two sets of registers the next tile is decoded while this one is multiplied. Where there
  // is room for one, the other warpgroup fills the gap. Sums, partial sums, registers of A and
  // scales beyond kRoom make ptxas spill (CUDA 13.0).
  static constexpr int kSumRegisters = (Row::kConfig.promoted ? 3 : 2) * kSums<Row>;
  // The scales, and codes on their way.
  static constexpr int kScaleRegisters = (ScaleBytes(kFamily) == 8 ? 32
                                          : kScaled                ? 20
                                                                   : 0) +
                                         (WeightRowBytes(kFamily) == 128 ? 4 : 0);
  static constexpr int kRoom = Row::kConfig.consumers == 2 && Row::kConfig.tokens <= 32 ? 40
                               : Row::kConfig.consumers == 1                            ? 110
                               : Row::kConfig.promoted                                  ? 140
                                                                                        : 150;
  static constexpr int kSets =
      kSumRegisters + 2 * 4 * kSteps<kFamily> + kScaleRegisters <= kRoom ? 2 : 1;
  uint32_t a[kSets][kSteps<kFamily>][4];
  typename std::conditional<Row::kConfig.packed, PackedScales<Row>, BlockScales<Row>>::type scales;
  uint32_t place;  // of this lane's codes in a tile

  __device__ __forceinline__ void Begin(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                        const Work& work, const Consumer<Row>& self,
                                        int first_group) {
    if constexpr (IsDecoded(kFamily)) {
      place = PlaceOfCodes<kFamily, Row::kConfig.packed>();
    }
    if constexpr (kScaled) {
      scales.Begin(args, shared, work,
                   int64_t{work.feature_begin} + self.number * FeaturesPerConsumer(Row::kConfig),
                   first_group);
    }
  }
  // Call with group = first_group, + 1, + 2, ... ahead of each stage.
  __device__ __forceinline__ void NextScales(const GroupedGemmArgs& args, int group) {
    if constexpr (kScaled && !Row::kConfig.packed) {
      scales.Advance(args, group);
    }
  }
  // Call when a stage is there, ahead of what is done with it.
  __device__ __forceinline__ void TakeScales(const Shared<Row>& shared, const Consumer<Row>& self) {
    if constexpr (Row::kConfig.packed) {
      scales.Load(shared, self.ring.stage, self.number);
    }
  }
  __device__ __forceinline__ void Prepare(const Shared<Row>& shared, const Consumer<Row>& self,
                                          int stage, int half) {
    if constexpr (IsDecoded(kFamily)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        BlockFactor row_scale{0, 0};
        if constexpr (kScaled) {
          row_scale = scales.Of(half, h, self.table);
        }
        DecodeRow<kFamily>(shared.Weights(stage, self.number, half) + place +
                               h * kToSecondRow<kFamily, Row::kConfig.packed>,
                           h, row_scale, a[half % kSets]);
      }
    }
  }
  // Issues the tile's products as one group, into `sums`.
  __device__ __forceinline__ void Issue(const Shared<Row>& shared, const Consumer<Row>& self,
                                        int stage, int half, bool accumulate,
                                        float (&sums)[kSums<Row>]) const {
    constexpr int kStepsPerPanel = kSteps<kFamily> / TokenPanels(Row::kConfig);
    const TileDescriptor weights(Row::kConfig.tokens_are_m
                                     ? shared.WeightsOfHalf(stage, half)
                                     : shared.Weights(stage, self.number, half));
    hopyard::sm90::MmaFence();
#pragma unroll
    for (int step = 0; step < kSteps<kFamily>; ++step) {
      const TileDescriptor tokens = TileDescriptor(shared.Tokens(stage, step / kStepsPerPanel))
                                        .Plus(32U * (step % kStepsPerPanel));
      const int add = step > 0 || accumulate ? 1 : 0;
      if constexpr (Row::kConfig.tokens_are_m) {
        // 64 rows of tokens a consumer, 128 of weights a half.
        const auto rows = static_cast<uint32_t>(self.number * kTileRows * 128);
        Mma<Row>::Multiply(sums, tokens.Plus(rows).Bits(), weights.Plus(32U * step).Bits(), add);
      } else if constexpr (IsDecoded(kFamily)) {
        Mma<Row>::Multiply(sums, a[half % kSets][step], tokens.Bits(), add);
      } else {
        Mma<Row>::Multiply(sums, weights.Plus(32U * step).Bits(), tokens.Bits(), add);
      }
    }
    hopyard::sm90::MmaCommit();
  }
};

// Weights decoded on the way, every scale in the operands: products add up in place.
template <class Row>
__device__ void MultiplyDecoded(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                const Work& work, Consumer<Row>& self,
                                float (&acc)[2][kSums<Row>]) {
  const KRange blocks = KBlocksHere<Row>(args);
  // Groups that may be under way while the next tile is decoded.
  constexpr int kPending = WeightTiles<Row>::kSets - 1;
  WeightTiles<Row> tiles;
  tiles.Begin(args, shared, work, self, blocks.begin);
  int previous = -1;
  for (int block = blocks.begin; block < blocks.end; ++block) {
    const int stage = self.ring.stage;
    tiles.NextScales(args, block);
    shared.AwaitFull(stage, self.ring.parity);
    tiles.TakeScales(shared, self);
    tiles.Prepare(shared, self, stage, 0);
    tiles.Issue(shared, self, stage, 0, block > blocks.begin, acc[0]);
    // The second tile of the stage before is done.
    hopyard::sm90::MmaWait<kPending>();
    if (kPending > 0 && previous >= 0) {
      Release<Row>(shared.Empty(previous));
    }
    tiles.Prepare(shared, self, stage, 1);
    tiles.Issue(shared, self, stage, 1, block > blocks.begin, acc[1]);
    hopyard::sm90::MmaWait<kPending>();
    if constexpr (kPending == 0) {
      Release<Row>(shared.Empty(stage));
    }
    previous = stage;
    self.ring.Advance();
  }
  hopyard::sm90::MmaWait<0>();
  if (kPending > 0 && previous >= 0) {
    Release<Row>(shared.Empty(previous));
  }
  hopyard::sm90::Touch(acc[0]);
  hopyard::sm90::Touch(acc[1]);
}

// Scales of tokens and 128x128 blocks: each tile's products over 128 of K are summed apart and then
// added in FP32, while the other warpgroup multiplies. (Two sets of partial sums, so that the own
// next tile is multiplied meanwhile, gained nothing: H100, 2026-11.)
template <class Row>
__device__ void MultiplyPromoted(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                 const Work& work, Consumer<Row>& self,
                                 float (&acc)[2][kSums<Row>]) {
  WeightTiles<Row> tiles;
  const KRange blocks = KBlocksHere<Row>(args);
  tiles.Begin(args, shared, work, self, blocks.begin);
  float part[kSums<Row>];
  const bool complete = ScalesAreComplete<Row>(args);
  Clear(acc);
  // Both warpgroups would multiply at the same time and then add at the same time. The second lets
  // the first go ahead by a tile of products; from then on one multiplies while the other adds.
  // Only where a work item fills the ring: else the first could arrive for the next item before the
  // second has waited for this one, and the barrier would take both arrivals for one turn.
  constexpr int kTurn = 4;
  const auto add = [&](int half, int stage, bool gives_turn) {
    hopyard::sm90::MmaWait<0>();
    hopyard::sm90::Touch(part);
    if (gives_turn) {
      hopyard::sm90::ArriveAtNamedBarrier(kTurn, 256);
    }
    if constexpr (Row::kConfig.tokens_are_m) {
      PromoteRows<Row>(shared, stage, self.number, half, complete, part, acc[half]);
    } else {
      PromoteColumns<Row>(shared, stage, 2 * self.number + half, complete, part, acc[half]);
    }
  };
  // Products are waited for where they were issued: with a branch between ptxas serializes all of
  // them (C7517, C7518). Tiles are decoded while the one before is multiplied, or after that where
  // registers are short.
  constexpr bool kAhead = WeightTiles<Row>::kSets == 2;
  const bool in_turn = Row::kConfig.consumers == 2 && BlocksPerProcessor(Row::kConfig) == 1 &&
                       blocks.end - blocks.begin >= Row::kConfig.stages &&
                       (!Row::kConfig.tokens_are_m || work.num_rows > kTileRows);
  tiles.NextScales(args, blocks.begin);
  shared.AwaitFull(self.ring.stage, self.ring.parity);
  tiles.TakeScales(shared, self);
  tiles.Prepare(shared, self, self.ring.stage, 0);
  for (int block = blocks.begin; block < blocks.end; ++block) {
    const int stage = self.ring.stage;
    if (in_turn && block == blocks.begin && self.number == 1) {
      hopyard::sm90::NamedBarrier(kTurn, 256);
    }
    tiles.Issue(shared, self, stage, 0, false, part);
    if constexpr (kAhead) {
      tiles.Prepare(shared, self, stage, 1);
    }
    add(0, stage, in_turn && block == blocks.begin && self.number == 0);
    if constexpr (!kAhead) {
      tiles.Prepare(shared, self, stage, 1);
    }
    tiles.Issue(shared, self, stage, 1, false, part);
    self.ring.Advance();
    const bool more = block + 1 < blocks.end;
    // Scales come ahead of the stage where there are registers for them.
    if (more) {
      if constexpr (kAhead) {
        tiles.NextScales(args, block + 1);
      }
      shared.AwaitFull(self.ring.stage, self.ring.parity);
      if constexpr (kAhead) {
        tiles.TakeScales(shared, self);
        tiles.Prepare(shared, self, self.ring.stage, 0);
      }
    }
    add(1, stage, false);
    if (!kAhead && more) {
      tiles.NextScales(args, block + 1);
      tiles.TakeScales(shared, self);
      tiles.Prepare(shared, self, self.ring.stage, 0);
    }
    if (!Row::kConfig.tokens_are_m || more) {
      Release<Row>(shared.Empty(stage));
    }
  }
}

// Passes the stages of a tile that has none of this consumer's tokens.
template <class Row>
__device__ __forceinline__ void PassStages(const Shared<Row>& shared, int k_blocks,
                                           Consumer<Row>& self) {
  for (int left = k_blocks; left > 0; --left) {
    shared.AwaitFull(self.ring.stage, self.ring.parity);
    if (!Row::kConfig.tokens_are_m || left > 1) {
      Release<Row>(shared.Empty(self.ring.stage));
    }
    self.ring.Advance();
  }
}

template <class Row>
__device__ __forceinline__ void Multiply(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                         const Work& work, Consumer<Row>& self,
                                         float (&acc)[2][kSums<Row>]) {
  if (Row::kConfig.cluster > 1 && work.num_rows == 0) {
    PassStages(shared, KBlocks<Row>(args), self);
  } else if constexpr (Row::kConfig.family == Family::kBf16) {
    // An expert's last tile may hold few tokens: the tensor cores work on half of it. Sums of the
    // others are not written. (The same spills in kernels with partial sums and gains nothing in
    // those that decode: H100, 2026-11.)
    constexpr int kTokens = Row::kConfig.tokens;
    constexpr int kFew = kTokens == 128 ? 64 : kTokens;
    if (kFew < kTokens && work.num_rows <= kFew) {
      MultiplyShared<Row, kFew>(shared, KBlocksHere<Row>(args), self, acc);
    } else {
      MultiplyShared<Row, kTokens>(shared, KBlocksHere<Row>(args), self, acc);
    }
  } else if constexpr (!Row::kConfig.promoted) {
    MultiplyDecoded<Row>(args, shared, work, self, acc);
  } else if (Row::kConfig.tokens_are_m && self.number * kTileRows >= work.num_rows) {
    PassStages(shared, KBlocks<Row>(args), self);
  } else {
    MultiplyPromoted<Row>(args, shared, work, self, acc);
  }
}

}  // namespace hopyard::gemm::sm90
