// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup: weights by the copy engine, gathered token rows and their scales by
// threads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/sm90/copy.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/weight_scales.cuh"

namespace hopyard::gemm::sm90 {

// The weight tiles of a stage, one a thread: tile t is tile t % 2 of consumer t / 2. In a cluster
// each block copies every `cluster`th for all of them, when all have room. What does not
// change from stage to stage is computed once per work item; a stage costs a few instructions.
template <class Row>
struct WeightCopies {
  static constexpr GemmConfig kConfig = Row::kConfig;
  static constexpr int kTiles = 2 * kConfig.consumers;
  // The copy engine counts elements of one byte for packed codes.
  static constexpr int kStep =
      BlockK(kConfig.family) / (WeightRowBytes(kConfig.family) == 64 ? 2 : 1);
  // The smallest tiles: an expert's weights are read once. They must not push out of the L2 cache
  // what the other kernels and the next call need at once, their code above all. With tiles of 32
  // only where a box has whole cache lines (FP8 T = 256 256 -> 248 us); of 4-bit codes blocks read
  // slower, so with two consumers, and the rest of a 256-byte piece was gone before its use: NVFP4
  // T = 64 204 -> 237 us, MXFP4 x FP8 T = 256 205 -> 228. With tiles of 64 weights are read again:
  // FP8 T = 512 284 -> 295, of 8 experts 716 -> 936 us. (H100, 2026-11.)
  static constexpr bool kReadOnce =
      kConfig.consumers == 1 && kConfig.tokens <= (WeightRowBytes(kConfig.family) == 128 ? 32 : 16);
  // A block of K in kBlockKMajor: 128 bytes.
  static constexpr int kBlock = kConfig.family == Family::kBf16 ? 64 : 128;

  const void* map;
  int row;  // natural
  int expert;

  __device__ __forceinline__ static int Tile() { return static_cast<int>(threadIdx.x); }
  // The tiles that this block copies, for its whole cluster.
  __device__ __forceinline__ static bool IsMine() {
    return Tile() < kTiles &&
           (kConfig.cluster == 1 || Tile() % kConfig.cluster == ClusterRank<Row>());
  }
  __device__ __forceinline__ static const MatrixArgs& Matrix(const GroupedGemmArgs& args) {
    return kConfig.gated && Tile() % 2 == 1 ? args.second : args.first;
  }
  __device__ __forceinline__ void Begin(const GroupedGemmArgs& args, const Work& work) {
    if (!IsMine()) {
      return;
    }
    const MatrixArgs& matrix = Matrix(args);
    const bool each = matrix.expert_maps != nullptr;
    map = each ? static_cast<const void*>(matrix.expert_maps + work.expert)
               : static_cast<const void*>(&matrix.map);
    row = work.feature_begin + Tile() / 2 * FeaturesPerConsumer(kConfig) +
          (kConfig.gated ? 0 : Tile() % 2 * kTileRows);
    expert = each ? 0 : work.expert;
  }
  // Starts the copies of a stage.
  __device__ __forceinline__ void Issue(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                        int stage, int k_block) const {
    const Barrier barrier = shared.Full(stage);
    if (Tile() == 0) {
      barrier.ArriveAndExpect(WeightBytes(kConfig));
    }
    if (!IsMine()) {
      return;
    }
    const int k = k_block * kStep;
    const uint32_t tile = shared.Weights(stage, Tile() / 2, Tile() % 2);
    const MatrixArgs& matrix = Matrix(args);
    if constexpr (kConfig.mn_major) {
      // One map of both where gate and up alternate.
      const int column = kConfig.interleaved ? 2 * row + Tile() % 2 * kTileRows : row;
      const hopyard::sm90::BoxStart start{{column, k, 0, 0, expert}};
      return Copy(matrix, tile, barrier, start);
    }
    const bool whole = Row::kPlain || matrix.row_unit == 1;
    const bool blocks = !Row::kPlain && matrix.k_blocks_last != 0;
    const hopyard::sm90::BoxStart start{{blocks ? k % kBlock : k, whole ? row : 0, 0,
                                         whole ? 0 : row / matrix.row_unit,
                                         blocks ? k / kBlock : expert}};
    Copy(matrix, tile, barrier, start);
  }

 private:
  __device__ __forceinline__ void Copy(const MatrixArgs& matrix, uint32_t tile, Barrier barrier,
                                       const hopyard::sm90::BoxStart& start) const {
    if (kReadOnce && matrix.whole_lines) {
      hopyard::sm90::CopyBox(map, tile, barrier, start, hopyard::sm90::kEvictFirst);
    } else if constexpr (kConfig.cluster == 1) {
      hopyard::sm90::CopyBox(map, tile, barrier, start);
    } else {
      hopyard::sm90::CopyBoxToBlocks(map, tile, barrier, start, (1U << kConfig.cluster) - 1U);
    }
  }
};

// The same of packed weights: a unit a consumer, a thread each.
template <class Row>
struct PackedCopies {
  static constexpr GemmConfig kConfig = Row::kConfig;
  // As in WeightCopies, and to more effect: units are whole cache lines whatever K is, and are not
  // read in parts (K of 2880, FP8, T = 1, 8, 64: 58.2, 189, 591 -> 49.4, 175, 573 us; with two
  // consumers x BF16, T = 1 59.7 -> 51.8; tiles of 32, K of 2048, FP8, T = 256 173 -> 160. H100,
  // 2026-11).
  static constexpr bool kReadOnce = kConfig.tokens <= 32;

  const uint8_t* units;
  // Of the consumer, that have rows to read. Nothing comes of others but where rows of the output
  // fill up groups of 128, with zeros: elsewhere they are left out.
  int tiles;
  int half_block;  // of K, whose second half does not exist

  __device__ __forceinline__ static int Consumer() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ void Begin(const GroupedGemmArgs& args, const Work& work) {
    constexpr int kFeatures = FeaturesPerConsumer(kConfig);
    const int64_t unit = work.feature_begin / kFeatures + Consumer();
    const int blocks = KBlocks<Row>(args);
    units = args.first.packed + work.expert * args.first.packed_stride +
            unit * blocks * ConsumerWeightBytes(kConfig);
    tiles = 2;
    if (!kConfig.gated && !args.out_format.fills_groups()) {
      const auto left = static_cast<int>(args.features - unit * kFeatures);
      tiles = left > kTileRows ? 2 : left > 0 ? 1 : 0;
    }
    const int k_of_last = static_cast<int>(args.k) - (blocks - 1) * kKGroup;
    half_block = k_of_last <= kKGroup / 2 ? blocks - 1 : -1;
  }
  // Starts the copies of a stage. What is left out stays what it was, of an earlier stage or none.
  // In the second half of K: 4-bit codes are finite, the unit's scales are there, and the token
  // rows are zero (RowFormat::order). Of rows that do not exist sums may be anything, scales of a
  // unit without rows being left out, too: the epilogue stores no more than args.features.
  __device__ __forceinline__ void Issue(const GroupedGemmArgs& /*args*/, const Shared<Row>& shared,
                                        int stage, int k_block) const {
    constexpr auto kHalfBytes = static_cast<uint32_t>(kPackedHalfBytes);
    constexpr uint32_t kUnitBytes = ConsumerWeightBytes(kConfig);
    if (Consumer() >= kConfig.consumers) {
      return;
    }
    const Barrier barrier = shared.Full(stage);
    const uint8_t* const from = units + int64_t{k_block} * kUnitBytes;
    const uint32_t to = shared.PackedUnit(stage, Consumer());
    uint32_t first = kUnitBytes - (k_block == half_block ? kHalfBytes : 0);
    uint32_t second = 0;
    if (!kConfig.gated && tiles < 2) {
      second = tiles == 1 && k_block != half_block ? kHalfBytes / 2 : 0;
      first = tiles == 1 ? kUnitBytes - 3 * kHalfBytes / 2 : 0;
    }
    if (Consumer() == 0) {
      barrier.ArriveAndExpect(first + second);
    } else {
      barrier.Expect(first + second);
    }
    if (first > 0) {
      Copy(from, to, barrier, first);
    }
    if (!kConfig.gated && second > 0) {
      constexpr uint32_t kSecond = kUnitBytes - kHalfBytes;
      Copy(from + kSecond, to + kSecond, barrier, second);
    }
  }

 private:
  __device__ __forceinline__ static void Copy(const uint8_t* from, uint32_t to, Barrier barrier,
                                              uint32_t bytes) {
    if constexpr (kReadOnce) {
      hopyard::sm90::CopyBytes(from, to, barrier, bytes, hopyard::sm90::kEvictFirst);
    } else {
      hopyard::sm90::CopyBytes(from, to, barrier, bytes);
    }
  }
};

// A thread's share of a tile's token rows: 16 bytes of every 16th row. A copy costs a few
// instructions: everything that can be is computed once per stage or per work item.
template <class Row>
struct TokenRows {
  static constexpr GemmConfig kConfig = Row::kConfig;
  static constexpr int kRows = kConfig.tokens / 16;
  static constexpr int kElementBytes = TokenElementBytes(kConfig.family);
  static constexpr bool kInShared = SourceBytes(kConfig) > 0;

  uint32_t begins[kInShared ? 1 : kRows];  // of the rows in x, in units of 16 bytes
  int valid;                               // the first so many of them exist
  int place;  // of row 0 in a panel; 16 further the swizzle is the same

  __device__ void Begin(const GroupedGemmArgs& args, const Shared<Row>& shared, const Work& work) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int first = thread / 8;
    valid = (work.num_rows - first + 15) / 16;
    place = first * 128 + (((thread % 8) ^ (first % 8)) << 4);
    const auto pitch = static_cast<uint32_t>(args.x_pitch * kElementBytes / 16);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t begin = static_cast<uint32_t>(Source(args, work, first + 16 * i)) * pitch;
      if constexpr (kInShared) {
        // The 8 threads of a row write the same; only they read it.
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(BeginsAt(shared) + 4U * i), "r"(begin)
                     : "memory");
      } else {
        begins[i] = begin;
      }
    }
    __syncwarp();
  }
  __device__ static int64_t Source(const GroupedGemmArgs& args, const Work& work, int row) {
    if (row >= work.num_rows) {
      return 0;
    }
    const int64_t at = int64_t{work.row_begin} + row;
    return args.row_to_source != nullptr ? args.row_to_source[at] : at;
  }
  // Starts the copies of a stage. Where no byte of a piece exists its address is not used.
  __device__ __forceinline__ void Issue(const GroupedGemmArgs& args, const Shared<Row>& shared,
                                        int stage, int k_block) const {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    // Rows in an order of groups of 128 are zero up to the end of the group.
    const auto row_k = static_cast<int>(OrderOf(kConfig.family) == KOrder::kNatural
                                            ? args.k
                                            : (args.k + kKGroup - 1) / kKGroup * kKGroup);
    uint32_t from_x[kRows];
    LoadBegins(shared, from_x);
#pragma unroll
    for (int panel = 0; panel < TokenPanels(kConfig); ++panel) {
      const int begin =
          (k_block * TokenPanels(kConfig) + panel) * 128 + thread % 8 * 16;  // bytes of the row
      const int left = row_k * kElementBytes - begin;
      const uint8_t* const from = static_cast<const uint8_t*>(args.x) + begin;
      const uint32_t to = shared.Tokens(stage, panel) + static_cast<uint32_t>(place);
      if (left >= 16) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          hopyard::sm90::CopyWholePiece(to + 2048U * i, from + uint64_t{from_x[i]} * 16, i < valid);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          hopyard::sm90::CopyPiece(to + 2048U * i, from + uint64_t{from_x[i]} * 16,
                                   i < valid && left > 0 ? left : 0);
        }
      }
    }
  }

 private:
  // Of this thread's rows.
  __device__ __forceinline__ static uint32_t BeginsAt(const Shared<Row>& shared) {
    return shared.base + Shared<Row>::kSources + threadIdx.x % 128 / 8 * (4U * kRows);
  }
  __device__ __forceinline__ void LoadBegins(const Shared<Row>& shared,
                                             uint32_t (&out)[kRows]) const {
    if constexpr (kInShared) {
#pragma unroll
      for (int i = 0; i < kRows; i += 4) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[i]), "=r"(out[i + 1]), "=r"(out[i + 2]), "=r"(out[i + 3])
                     : "r"(BeginsAt(shared) + 4U * i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        out[i] = begins[i];
      }
    }
  }
};

// A stage's scales (config.h), one token a thread; any where the tile has no token, for those sums
// are not written. Without square scales they are copied; with them
// each thread multiplies its token's scale, read a block of K ahead, by those of the weights.
template <class Row>
struct StageScales {
  static constexpr GemmConfig kConfig = Row::kConfig;
  static constexpr bool kWrites = Shared<Row>::kWritesScales;
  static constexpr int kSets = ScaleSets(kConfig);

  const float* token;  // steps of 1 or, at kOne, 0
  const float* weights[kSets > 0 ? kSets : 1];
  int token_step;
  int weight_step;
  bool complete;
  int last;  // block of K
  float next_token;
  float next_weights[kSets > 0 ? kSets : 1];

  __device__ __forceinline__ void Begin(const GroupedGemmArgs& args, const Work& work,
                                        int first_block) {
    if constexpr (kConfig.promoted) {
      last = KBlocks<Row>(args) - 1;
      const int thread = static_cast<int>(threadIdx.x);
      const bool given = args.x_block_scales != nullptr;
      token = given ? args.x_block_scales +
                          TokenRows<Row>::Source(args, work, thread) * ((args.k + 127) / 128)
                    : &kOne;
      token_step = given ? 1 : 0;
      if constexpr (kWrites) {
        complete = ScalesAreComplete<Row>(args);
        const bool reads = ReadsSquareScales<Row>(args) && complete;
        weight_step = reads ? 1 : 0;
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          const int row = work.feature_begin + (kConfig.gated ? 0 : set * 2 * kTileRows);
          weights[set] = reads ? SquareScales(kConfig.gated && set == 1 ? args.second : args.first,
                                              work.expert, row)
                               : &kOne;
        }
        Load(first_block);
      }
    }
  }
  // Call with block = first_block, + 1, + 2, ... < end.
  __device__ __forceinline__ void Issue(const GroupedGemmArgs& args, const Work& work,
                                        const Shared<Row>& shared, int stage, int block, int end) {
    if constexpr (kConfig.promoted) {
      if (kWrites && !complete) {
        StoreBlocksOfRows(args, work, shared, stage, Real(block));
      }
      const int thread = static_cast<int>(threadIdx.x);
      if (thread < kConfig.tokens) {
        const uint32_t at = shared.Scales(stage, 0) + Shared<Row>::ScaleAt(thread);
        if constexpr (kWrites) {
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            const float scale = __fmul_rn(next_token, next_weights[set]);
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(
                             at + static_cast<uint32_t>(set * ScaleSetBytes(kConfig))),
                         "f"(scale)
                         : "memory");
          }
          if (block + 1 < end) {
            Load(block + 1);
          }
        } else {
          hopyard::sm90::CopyWord(at, token + Real(block) * token_step);
        }
      }
    }
  }

 private:
  // What stands behind the last block (KBlocksHere) is zero, whatever it is multiplied by.
  __device__ __forceinline__ int Real(int block) const {
    return kConfig.k_parts > 1 && block > last ? last : block;
  }
  __device__ __forceinline__ void Load(int block) {
    next_token = __ldg(token + Real(block) * token_step);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      next_weights[set] = __ldg(weights[set] + Real(block) * weight_step);
    }
  }
  // A thread per tile: both blocks' scales, and how many rows lie in the first.
  __device__ static void StoreBlocksOfRows(const GroupedGemmArgs& args, const Work& work,
                                           const Shared<Row>& shared, int stage, int block) {
    const int tile = static_cast<int>(threadIdx.x);
    if (tile >= 2 * kConfig.consumers) {
      return;
    }
    const MatrixArgs& matrix = kConfig.gated && tile % 2 == 1 ? args.second : args.first;
    const int row = work.feature_begin + tile / 2 * FeaturesPerConsumer(kConfig) +
                    (kConfig.gated ? 0 : tile % 2 * kTileRows);
    const float first = __ldg(SquareScales(matrix, work.expert, row) + block);
    const float second = __ldg(SquareScales(matrix, work.expert, row + kTileRows - 1) + block);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared.TileScales(stage, tile)),
                 "f"(first), "f"(second), "r"(RowsOfFirstBlock(matrix, row)), "r"(0)
                 : "memory");
  }
};

// A thread's part of a stage is under way, or written.
template <class Row>
__device__ __forceinline__ void Announce(const Shared<Row>& shared, int stage) {
  if constexpr (Shared<Row>::kWritesScales) {
    shared.Full(stage).Arrive();
  }
  hopyard::sm90::ArriveAfterPieces(shared.Full(stage));
}

// The copies of a stage announce themselves on its barrier: the producer never waits for them, only
// for room.
template <class Row>
__device__ void Produce(const GroupedGemmArgs& args, const Shared<Row>& shared) {
  const KRange blocks = KBlocksHere<Row>(args);
  RingPosition<Row::kConfig.stages> fill;
  RingPosition<WorkSlots(Row::kConfig)> slot;
  Scheduler<Row> scheduler(args);
  Work work{};
  while (scheduler.Next(work)) {
    typename std::conditional<Row::kConfig.packed, PackedCopies<Row>, WeightCopies<Row>>::type
        weights;
    weights.Begin(args, work);
    TokenRows<Row> rows;
    StageScales<Row> scales;
    const auto begin = [&] {
      rows.Begin(args, shared, work);
      scales.Begin(args, work, blocks.begin);
    };
    // These loads depend on each other. Small tiles send for their first weights before them; large
    // ones have stages in store, and a producer without the registers for it.
    constexpr bool kWeightsFirst = Row::kConfig.consumers == 1;
    if constexpr (!kWeightsFirst) {
      begin();
    }
    for (int block = blocks.begin; block < blocks.end; ++block) {
      shared.Empty(fill.stage).Wait(fill.parity ^ 1U);
      if (block == blocks.begin && threadIdx.x == 0) {
        shared.PostWork(slot.stage, work);
      }
      weights.Issue(args, shared, fill.stage, block);
      if (kWeightsFirst && block == blocks.begin) {
        begin();
      }
      rows.Issue(args, shared, fill.stage, block);
      scales.Issue(args, work, shared, fill.stage, block, blocks.end);
      Announce(shared, fill.stage);
      fill.Advance();
    }
    slot.Advance();
  }
  shared.Empty(fill.stage).Wait(fill.parity ^ 1U);
  if (threadIdx.x == 0) {
    work.expert = -1;
    shared.PostWork(slot.stage, work);
  }
}

}  // namespace hopyard::gemm::sm90
