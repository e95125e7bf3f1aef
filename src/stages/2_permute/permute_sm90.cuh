// SPDX-License-Identifier: Apache-2.0
// Three steps: count the slots of every chunk per expert, lay out segments and tiles, rank the
// slots of every chunk. Each step is a function of a whole block of kPermuteThreads. One block does
// all of it for a single chunk, and with a thread per slot where they are few.
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
  return static_cast<int>(sizeof(uint16_t)) * kPermuteWarps * args.segments;
}

__device__ __forceinline__ int64_t LiveSlots(const PermuteSm90Args& args) {
  return sm90::LiveTokens(args.num_tokens, args.max_tokens) * args.slots_per_token;
}

__device__ __forceinline__ int32_t ValidSegment(const PermuteSm90Args& args, int32_t segment) {
  return segment >= 0 && segment < args.segments ? segment : -1;
}

// Segment of a slot, or -1; -1 also beyond the live slots.
__device__ __forceinline__ int32_t SegmentOf(const PermuteSm90Args& args, int64_t slot,
                                             int64_t end) {
  return slot < end ? ValidSegment(args, args.local_slots[slot]) : -1;
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
  const int segments = args.segments;
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
  const int segments = args.segments;
  for (int s = static_cast<int>(threadIdx.x); s < segments; s += kPermuteThreads) {
    int32_t sum = 0;
    for (int w = 0; w < kPermuteWarps; ++w) {
      sum += counts[w * segments + s];
    }
    args.chunk_counts[chunk * segments + s] = sum;
  }
  __syncthreads();
}

__device__ __forceinline__ bool HasTwoLists(const PermuteSm90Args& args) {
  return args.tiles[1].expert != nullptr;
}

// They fit 32 bits, as the outputs do.
struct RowsAndTiles {
  int32_t rows = 0;
  int32_t tiles = 0;
  int32_t more_tiles = 0;  // of the second list

  __device__ __forceinline__ void Add(const RowsAndTiles& other) {
    rows += other.rows;
    tiles += other.tiles;
    more_tiles += other.more_tiles;
  }
};

// Exclusive prefix sum over the first kPermuteThreads of the block; `total` receives the sums.
// `warp_sums`, [kPermuteWarps], may be written again once all have met.
__device__ inline RowsAndTiles BlockScan(const PermuteSm90Args& args, const RowsAndTiles& mine,
                                         RowsAndTiles* warp_sums, RowsAndTiles& total) {
  const int lane = sm90::LaneId();
  const int warp = static_cast<int>(threadIdx.x) / sm90::kWarpSize;
  const bool two_lists = HasTwoLists(args);
  RowsAndTiles sum = mine;
  for (int distance = 1; distance < sm90::kWarpSize; distance *= 2) {
    const int32_t rows = __shfl_up_sync(sm90::kAllLanes, sum.rows, distance);
    const int32_t tiles = __shfl_up_sync(sm90::kAllLanes, sum.tiles, distance);
    sum.rows += lane >= distance ? rows : 0;
    sum.tiles += lane >= distance ? tiles : 0;
  }
  for (int distance = 1; two_lists && distance < sm90::kWarpSize; distance *= 2) {
    const int32_t tiles = __shfl_up_sync(sm90::kAllLanes, sum.more_tiles, distance);
    sum.more_tiles += lane >= distance ? tiles : 0;
  }
  if (lane == sm90::kWarpSize - 1) {
    warp_sums[warp] = sum;
  }
  __syncthreads();
  total = {};
  for (int w = 0; w < kPermuteWarps; ++w) {
    const RowsAndTiles& other = warp_sums[w];
    sum.rows += w < warp ? other.rows : 0;
    sum.tiles += w < warp ? other.tiles : 0;
    total.rows += other.rows;
    total.tiles += other.tiles;
  }
  for (int w = 0; two_lists && w < kPermuteWarps; ++w) {
    const int32_t other = warp_sums[w].more_tiles;
    sum.more_tiles += w < warp ? other : 0;
    total.more_tiles += other;
  }
  return {sum.rows - mine.rows, sum.tiles - mine.tiles, sum.more_tiles - mine.more_tiles};
}

// Turns the counts of a segment's chunks into what precedes each chunk; returns the total.
__device__ inline int32_t ScanChunks(const PermuteSm90Args& args, int segment, int64_t chunks) {
  int32_t sum = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    int32_t* count = args.chunk_counts + c * args.segments + segment;
    const int32_t here = *count;
    *count = sum;
    sum += here;
  }
  return sum;
}

// The tiles of a segment's `count` rows from row `begin` on, behind `tiles_begin` others.
__device__ inline void WriteTiles(const TileListSm90& list, int segment, int32_t count,
                                  int32_t begin, int32_t tiles_begin, int32_t tiles) {
  int32_t first = begin;
  int32_t left = count;
#pragma unroll 1
  for (int32_t i = tiles_begin; i < tiles_begin + tiles; ++i) {
    list.expert[i] = segment;
    list.row_begin[i] = first;
    // Past the segment's end where nothing is left.
    list.row_end[i] = first + min(left, list.tile);
    first += list.tile;
    left -= list.tile;
  }
}

// Clusters of tiles for `count` rows. No division where one holds them.
__device__ __forceinline__ int32_t ClustersOf(const TileListSm90& list, int32_t count) {
  const auto rows = static_cast<uint32_t>(count);
  const auto unit = static_cast<uint32_t>(list.tile * list.cluster);
  return static_cast<int32_t>(rows <= unit ? (rows > 0 ? 1U : 0U) : (rows + unit - 1) / unit);
}

// Of a segment with `count` slots.
__device__ inline RowsAndTiles RowsAndTilesOf(const PermuteSm90Args& args, int32_t count) {
  const TileListSm90& list = args.tiles[0];
  const TileListSm90& more = args.tiles[1];
  const int32_t clusters = ClustersOf(list, count);
  RowsAndTiles of_segment;
  of_segment.rows = args.padded ? clusters * list.tile * list.cluster : count;
  of_segment.tiles = clusters * list.cluster;
  if (HasTwoLists(args)) {
    of_segment.more_tiles = ClustersOf(more, count) * more.cluster;
  }
  return of_segment;
}

// What the segment's place is: `begin` is where its rows and tiles begin, `mine` how many it has.
// Padding rows are marked.
__device__ inline void WriteSegment(const PermuteSm90Args& args, int segment, int32_t count,
                                    const RowsAndTiles& begin, const RowsAndTiles& mine) {
  args.expert_offsets[segment] = begin.rows;
  args.expert_counts[segment] = count;
  WriteTiles(args.tiles[0], segment, count, begin.rows, begin.tiles, mine.tiles);
  if (HasTwoLists(args)) {
    WriteTiles(args.tiles[1], segment, count, begin.rows, begin.more_tiles, mine.more_tiles);
  }
#pragma unroll 1
  for (int32_t row = begin.rows + count; row < begin.rows + mine.rows; ++row) {
    args.row_to_slot[row] = -1;
    args.row_to_token[row] = -1;
  }
}

__device__ inline void WriteTotals(const PermuteSm90Args& args, const RowsAndTiles& total) {
  args.expert_offsets[args.segments] = total.rows;
  *args.num_rows = total.rows;
  *args.tiles[0].num_tiles = total.tiles;
  if (HasTwoLists(args)) {
    *args.tiles[1].num_tiles = total.more_tiles;
  }
}

// Slots are counted in 32 bits, as in the maps.
__device__ __forceinline__ void WriteSlot(const PermuteSm90Args& args, int32_t slot, int32_t row) {
  args.slot_to_row[slot] = row;
  if (row >= 0) {
    args.row_to_slot[row] = slot;
    args.row_to_token[row] = slot / args.slots_per_token;
  }
}

// Step 2, one block: segments, tiles and totals. Padding rows are marked where rows are aligned.
__device__ inline void LayOutSegments(const PermuteSm90Args& args, int64_t live,
                                      RowsAndTiles* shared) {
  const int segments = args.segments;
  const int64_t chunks = CeilDiv(live, kPermuteChunk);
  RowsAndTiles base;
  for (int first = 0; first < segments; first += kPermuteThreads) {
    const int segment = first + static_cast<int>(threadIdx.x);
    const bool real = segment < segments;
    const int32_t count = real ? ScanChunks(args, segment, chunks) : 0;
    const RowsAndTiles mine = RowsAndTilesOf(args, count);
    RowsAndTiles total;
    RowsAndTiles begin = BlockScan(args, mine, shared, total);
    begin.Add(base);
    if (real) {
      WriteSegment(args, segment, count, begin, mine);
    }
    base.Add(total);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    WriteTotals(args, base);
  }
  __syncthreads();
}

// Step 3: the rows of a chunk's slots, in slot order within each segment. Uses up what CountByWarp
// left.
__device__ inline void RankCounted(const PermuteSm90Args& args, int64_t chunk, int64_t live,
                                   uint16_t* counts) {
  const int segments = args.segments;
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
      WriteSlot(args, static_cast<int32_t>(slot),
                args.expert_offsets[segment] + args.chunk_counts[chunk * segments + segment] +
                    before + rank);
      if (rank == 0) {
        mine[segment] = static_cast<uint16_t>(before + __popc(peers));
      }
    } else if (slot < range.end) {
      WriteSlot(args, static_cast<int32_t>(slot), -1);
    }
    __syncwarp();
  }
}

// ---- one chunk by one block: nothing is read back from global memory

inline constexpr int kChunkRounds = static_cast<int>(kPermuteChunk / kPermuteThreads);

// Shared memory: counts as in CountByWarp, then where each segment's rows begin. 40.6 KiB at 2048
// routed and 32 shared experts.
__host__ __device__ inline int ChunkSharedBytes(const PermuteSm90Args& args) {
  return PermuteSharedBytes(args) + static_cast<int>(sizeof(int32_t)) * args.segments;
}

// Where a slot of round r of this warp goes: segment (-1: nowhere), and how many of the warp's
// slots are ahead of it there.
struct ChunkSlots {
  int32_t segments[kChunkRounds];
  int32_t ahead[kChunkRounds];
};

// Fills `slots`, and leaves in `counts` the warps' slots by segment.
__device__ inline void CountChunk(const PermuteSm90Args& args, const WarpRange& range,
                                  uint16_t* counts, ChunkSlots& slots) {
  const int segments = args.segments;
  const int lane = sm90::LaneId();
#pragma unroll
  for (int r = 0; r < kChunkRounds; ++r) {
    slots.segments[r] = SegmentOf(args, range.begin + 32 * r + lane, range.end);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kPermuteWarps * segments; i += kPermuteThreads) {
    counts[i] = 0;
  }
  __syncthreads();
  uint16_t* mine = counts + threadIdx.x / 32 * segments;
#pragma unroll
  for (int r = 0; r < kChunkRounds; ++r) {
    if (range.begin + 32 * r < range.end) {
      const int32_t segment = slots.segments[r];
      const unsigned peers = __match_any_sync(sm90::kAllLanes, segment);
      const int rank = __popc(peers & ((1U << lane) - 1U));
      const int32_t before = segment >= 0 ? mine[segment] : 0;
      __syncwarp();
      if (segment >= 0 && rank == 0) {
        mine[segment] = static_cast<uint16_t>(before + __popc(peers));
      }
      __syncwarp();
      slots.ahead[r] = before + rank;
    }
  }
  __syncthreads();
}

// Segments, tiles and totals. Leaves in `counts` how many of a segment's slots earlier warps have,
// in `begins` its first row.
__device__ inline void LayOutChunk(const PermuteSm90Args& args, uint16_t* counts, int32_t* begins,
                                   RowsAndTiles* shared) {
  const int segments = args.segments;
  RowsAndTiles base;
#pragma unroll 1
  for (int first = 0; first < segments; first += kPermuteThreads) {
    const int segment = first + static_cast<int>(threadIdx.x);
    const bool real = segment < segments;
    int32_t count = 0;
    if (real) {
#pragma unroll
      for (int w = 0; w < kPermuteWarps; ++w) {
        const uint16_t here = counts[w * segments + segment];
        counts[w * segments + segment] = static_cast<uint16_t>(count);
        count += here;
      }
    }
    const RowsAndTiles mine = RowsAndTilesOf(args, count);
    RowsAndTiles total;
    RowsAndTiles begin = BlockScan(args, mine, shared, total);
    begin.Add(base);
    if (real) {
      WriteSegment(args, segment, count, begin, mine);
      begins[segment] = begin.rows;
    }
    base.Add(total);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    WriteTotals(args, base);
  }
}

// All steps by one block, for at most one chunk. `memory` is the shared memory of ChunkSharedBytes,
// `shared` the [kPermuteWarps] of BlockScan.
__device__ inline void PermuteOneChunk(const PermuteSm90Args& args, int32_t* memory,
                                       RowsAndTiles* shared) {
  const int segments = args.segments;
  auto* const counts = static_cast<uint16_t*>(static_cast<void*>(memory + segments));
  const WarpRange range(0, LiveSlots(args));
  ChunkSlots slots;
  CountChunk(args, range, counts, slots);
  LayOutChunk(args, counts, memory, shared);
  const uint16_t* before = counts + threadIdx.x / 32 * segments;
#pragma unroll
  for (int r = 0; r < kChunkRounds; ++r) {
    const auto slot = static_cast<int32_t>(range.begin + 32 * r + sm90::LaneId());
    if (slot < range.end) {
      const int32_t segment = slots.segments[r];
      WriteSlot(args, slot, segment >= 0 ? memory[segment] + before[segment] + slots.ahead[r] : -1);
    }
  }
}

// ---- few slots: a thread each, and nothing is read back from global memory

inline constexpr int kFewSlots = kPermuteThreads;

struct FewSlots {
  int32_t* segments;        // [kFewSlots] of each slot, or -1
  int32_t* counts;          // [segments] of slots, then where the segment's rows begin
  RowsAndTiles* warp_sums;  // [kPermuteWarps]
};
__host__ __device__ inline int FewSlotsBytes(const PermuteSm90Args& args) {
  const int counts = (args.segments + 3) / 4 * 4;
  return static_cast<int>(sizeof(RowsAndTiles)) * kPermuteWarps + 4 * (kFewSlots + counts);
}
// `shared` is 16-byte aligned.
__device__ inline FewSlots FewSlotsIn(void* shared) {
  auto* const segments = static_cast<int32_t*>(shared);
  auto* const sums = static_cast<RowsAndTiles*>(static_cast<void*>(segments + kFewSlots));
  return {segments, static_cast<int32_t*>(static_cast<void*>(sums + kPermuteWarps)), sums};
}
// No slots yet. By the first kPermuteThreads, which meet the others before a slot is put there.
__device__ inline void ClearFewSlots(const PermuteSm90Args& args, const FewSlots& few) {
  few.segments[threadIdx.x] = -1;
#pragma unroll 1
  for (int s = static_cast<int>(threadIdx.x); s < args.segments; s += kPermuteThreads) {
    few.counts[s] = 0;
  }
}

// Of the slots with the same segment as slot `slot`: how many there are, and how many come before.
struct Peers {
  int same = 0;
  int before = 0;
};
__device__ inline Peers CountPeers(const FewSlots& few, int live, int slot, int32_t segment) {
  const auto* fours = static_cast<const int4*>(static_cast<const void*>(few.segments));
  const int own = slot / 4;
  Peers peers;
#pragma unroll 1
  for (int i = 0; i < (live + 3) / 4; ++i) {
    const int4 four = fours[i];
    peers.before = i == own ? peers.same : peers.before;
    peers.same += (four.x == segment ? 1 : 0) + (four.y == segment ? 1 : 0);
    peers.same += (four.z == segment ? 1 : 0) + (four.w == segment ? 1 : 0);
  }
  const int4 four = fours[own];
  peers.before += slot % 4 > 0 && four.x == segment ? 1 : 0;
  peers.before += slot % 4 > 1 && four.y == segment ? 1 : 0;
  peers.before += slot % 4 > 2 && four.z == segment ? 1 : 0;
  return peers;
}

// All steps for `live` <= kFewSlots slots by kPermuteThreads. Precondition: few.segments has those
// of the slots and -1 beyond, few.counts zeros, and all threads have met since.
__device__ inline void PermuteFewSlots(const PermuteSm90Args& args, int live, const FewSlots& few) {
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t segment = few.segments[thread];
  Peers peers;
  if (segment >= 0) {
    peers = CountPeers(few, live, thread, segment);
    if (peers.before == 0) {
      few.counts[segment] = peers.same;
    }
  }
  __syncthreads();
  const int segments = args.segments;
  const int share = (segments + kPermuteThreads - 1) / kPermuteThreads;
  const int first = min(thread * share, segments);
  const int last = min(first + share, segments);
  RowsAndTiles mine;
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    const RowsAndTiles of_segment = RowsAndTilesOf(args, few.counts[s]);
    mine.Add(of_segment);
  }
  RowsAndTiles total;
  RowsAndTiles begin = BlockScan(args, mine, few.warp_sums, total);
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    const int32_t count = few.counts[s];
    const RowsAndTiles of_segment = RowsAndTilesOf(args, count);
    WriteSegment(args, s, count, begin, of_segment);
    few.counts[s] = begin.rows;
    begin.Add(of_segment);
  }
  if (thread == 0) {
    WriteTotals(args, total);
  }
  __syncthreads();
  if (thread < live) {
    WriteSlot(args, thread, segment >= 0 ? few.counts[segment] + peers.before : -1);
  }
}

}  // namespace hopyard::permute
