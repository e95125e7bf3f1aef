// SPDX-License-Identifier: Apache-2.0
// Three steps: count the slots of every chunk per expert, lay out segments and tiles, rank the
// slots of every chunk. Each step is a function of a whole block of kPermuteThreads; small batches
// run them in one block.
#pragma once

#include <cstdint>

#include "core/shape.h"
#include "device/sm90/numbers.cuh"
#include "device/sm90/warp.cuh"
#include "stages/2_permute/permute_sm90.h"

namespace hopyard::permute {

inline constexpr int kPermuteThreads = 256;
inline constexpr int kPermuteWarps = kPermuteThreads / 32;

// Of the counters per warp and segment: 32.5 KiB at 2048 routed and 32 shared experts.
__host__ __device__ inline int PermuteSharedBytes(const PermuteSm90Args& args) {
  return static_cast<int>(sizeof(uint16_t)) * kPermuteWarps * args.options.num_local_experts;
}

__device__ __forceinline__ int64_t LiveSlots(const PermuteSm90Args& args) {
  return sm90::LiveTokens(args.num_tokens, args.max_tokens) * args.slots_per_token;
}

// Segment of a slot, or -1; -1 also beyond the live slots.
__device__ __forceinline__ int32_t SegmentOf(const PermuteSm90Args& args, int64_t slot,
                                             int64_t end) {
  if (slot >= end) {
    return -1;
  }
  const int32_t segment = args.local_slots[slot];
  return segment >= 0 && segment < args.options.num_local_experts ? segment : -1;
}

// Slots [begin, end) that a warp of this block ranks: an even share of the chunk's live ones, in
// whole rounds of the warp. A live count below the last warps' shares leaves them none.
struct WarpRange {
  int64_t begin;
  int64_t end;

  __device__ WarpRange(int64_t chunk, int64_t live) {
    const int64_t first = chunk * kPermuteChunk;
    const int64_t slots = live - first < kPermuteChunk ? live - first : kPermuteChunk;
    const int64_t share = RoundUp(CeilDiv(slots, kPermuteWarps), 32);
    begin = first + static_cast<int64_t>(threadIdx.x) / 32 * share;
    end = begin + share < first + slots ? begin + share : first + slots;
  }
};

// counts[warp][segment] of the chunk, one row of shared memory per warp. The lanes that share a
// segment elect a leader, so no atomics are needed.
__device__ inline void CountByWarp(const PermuteSm90Args& args, int64_t chunk, int64_t live,
                                   uint16_t* counts) {
  const int segments = args.options.num_local_experts;
  for (int i = static_cast<int>(threadIdx.x); i < kPermuteWarps * segments; i += kPermuteThreads) {
    counts[i] = 0;
  }
  __syncthreads();
  uint16_t* mine = counts + threadIdx.x / 32 * segments;
  const WarpRange range(chunk, live);
  const int lane = sm90::LaneId();
  for (int64_t slot = range.begin + lane; slot - lane < range.end; slot += 32) {
    const int32_t segment = SegmentOf(args, slot, range.end);
    const unsigned peers = __match_any_sync(sm90::kAllLanes, segment);
    if (segment >= 0 && __ffs(static_cast<int>(peers)) - 1 == lane) {
      mine[segment] = static_cast<uint16_t>(mine[segment] + __popc(peers));
    }
    __syncwarp();
  }
  __syncthreads();
}

// Step 1: chunk_counts[chunk][segment], the sums of what CountByWarp left.
__device__ inline void SumWarps(const PermuteSm90Args& args, int64_t chunk,
                                const uint16_t* counts) {
  const int segments = args.options.num_local_experts;
  for (int s = static_cast<int>(threadIdx.x); s < segments; s += kPermuteThreads) {
    int32_t sum = 0;
    for (int w = 0; w < kPermuteWarps; ++w) {
      sum += counts[w * segments + s];
    }
    args.chunk_counts[chunk * segments + s] = sum;
  }
  __syncthreads();
}

// Exclusive prefix sum over the block's threads of two values; `totals` receive the sums.
struct RowsAndTiles {
  int64_t rows = 0;
  int64_t tiles = 0;
};

__device__ inline RowsAndTiles BlockScan(RowsAndTiles value, RowsAndTiles* shared,
                                         RowsAndTiles& total) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  __syncthreads();
  for (int distance = 1; distance < kPermuteThreads; distance *= 2) {
    RowsAndTiles other;
    if (thread >= distance) {
      other = shared[thread - distance];
    }
    __syncthreads();
    shared[thread].rows += other.rows;
    shared[thread].tiles += other.tiles;
    __syncthreads();
  }
  total = shared[kPermuteThreads - 1];
  const RowsAndTiles inclusive = shared[thread];
  __syncthreads();
  return {inclusive.rows - value.rows, inclusive.tiles - value.tiles};
}

// Turns the counts of a segment's chunks into what precedes each chunk; returns the total.
__device__ inline int32_t ScanChunks(const PermuteSm90Args& args, int segment, int64_t chunks) {
  int32_t sum = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    int32_t* count = args.chunk_counts + c * args.options.num_local_experts + segment;
    const int32_t here = *count;
    *count = sum;
    sum += here;
  }
  return sum;
}

__device__ inline void WriteTiles(const PermuteSm90Args& args, int segment, int32_t count,
                                  const RowsAndTiles& begin, int64_t tiles) {
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = begin.rows + i * args.options.tile;
    const int64_t last = begin.rows + count;
    const int64_t end = first + args.options.tile;
    args.tile_expert[begin.tiles + i] = segment;
    args.tile_row_begin[begin.tiles + i] = static_cast<int32_t>(first);
    args.tile_row_end[begin.tiles + i] = static_cast<int32_t>(end < last ? end : last);
  }
}

// Step 2, one block: segments, tiles and totals. Padding rows are marked where rows are aligned.
__device__ inline void LayOutSegments(const PermuteSm90Args& args, int64_t live,
                                      RowsAndTiles* shared) {
  const PermuteOptions& options = args.options;
  const int segments = options.num_local_experts;
  const int64_t chunks = CeilDiv(live, kPermuteChunk);
  RowsAndTiles base;
  for (int first = 0; first < segments; first += kPermuteThreads) {
    const int segment = first + static_cast<int>(threadIdx.x);
    const bool real = segment < segments;
    const int32_t count = real ? ScanChunks(args, segment, chunks) : 0;
    RowsAndTiles mine;
    mine.rows = RoundUp(count, options.row_alignment);
    mine.tiles = CeilDiv(count, options.tile * options.cluster) * options.cluster;
    RowsAndTiles total;
    RowsAndTiles begin = BlockScan(mine, shared, total);
    begin.rows += base.rows;
    begin.tiles += base.tiles;
    if (real) {
      args.expert_offsets[segment] = static_cast<int32_t>(begin.rows);
      args.expert_counts[segment] = count;
      WriteTiles(args, segment, count, begin, mine.tiles);
      for (int64_t row = begin.rows + count; row < begin.rows + mine.rows; ++row) {
        args.row_to_slot[row] = -1;
        args.row_to_token[row] = -1;
      }
    }
    base.rows += total.rows;
    base.tiles += total.tiles;
  }
  if (threadIdx.x == 0) {
    args.expert_offsets[segments] = static_cast<int32_t>(base.rows);
    *args.num_rows = static_cast<int32_t>(base.rows);
    *args.num_tiles = static_cast<int32_t>(base.tiles);
  }
  __syncthreads();
}

// Step 3: the rows of a chunk's slots, in slot order within each segment. Uses up what CountByWarp
// left.
__device__ inline void RankCounted(const PermuteSm90Args& args, int64_t chunk, int64_t live,
                                   uint16_t* counts) {
  const int segments = args.options.num_local_experts;
  for (int s = static_cast<int>(threadIdx.x); s < segments; s += kPermuteThreads) {
    uint16_t before = 0;
    for (int w = 0; w < kPermuteWarps; ++w) {
      const uint16_t here = counts[w * segments + s];
      counts[w * segments + s] = before;
      before = static_cast<uint16_t>(before + here);
    }
  }
  __syncthreads();
  uint16_t* mine = counts + threadIdx.x / 32 * segments;
  const WarpRange range(chunk, live);
  const int lane = sm90::LaneId();
  for (int64_t slot = range.begin + lane; slot - lane < range.end; slot += 32) {
    const int32_t segment = SegmentOf(args, slot, range.end);
    const unsigned peers = __match_any_sync(sm90::kAllLanes, segment);
    const int rank = __popc(peers & ((1U << lane) - 1U));
    const int32_t before = segment >= 0 ? mine[segment] : 0;
    __syncwarp();
    if (segment >= 0) {
      const int32_t row = args.expert_offsets[segment] +
                          args.chunk_counts[chunk * segments + segment] + before + rank;
      args.slot_to_row[slot] = row;
      args.row_to_slot[row] = static_cast<int32_t>(slot);
      args.row_to_token[row] = static_cast<int32_t>(slot / args.slots_per_token);
      if (rank == 0) {
        mine[segment] = static_cast<uint16_t>(before + __popc(peers));
      }
    } else if (slot < range.end) {
      args.slot_to_row[slot] = -1;
    }
    __syncwarp();
  }
}

// All steps by one block, for at most one chunk. `counts` is the shared memory of
// PermuteSharedBytes, `shared` that of BlockScan.
__device__ inline void PermuteOneChunk(const PermuteSm90Args& args, uint16_t* counts,
                                       RowsAndTiles* shared) {
  const int64_t live = LiveSlots(args);
  if (live > 0) {
    CountByWarp(args, 0, live, counts);
    SumWarps(args, 0, counts);
  }
  LayOutSegments(args, live, shared);
  if (live > 0) {
    RankCounted(args, 0, live, counts);
  }
}

}  // namespace hopyard::permute
