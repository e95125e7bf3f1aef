// SPDX-License-Identifier: Apache-2.0
// Stage 2 on Hopper: the integers of PermuteCpu. A stable counting sort over chunks of slots,
// without atomics whose order could show: one launch up to kPermuteChunk slots, three beyond.
#pragma once

#include <cstdint>

#include "hopyard/permute.h"

#include "device/queue.h"

namespace hopyard::permute {

// Slots that one block ranks; 16-bit counters suffice within it.
inline constexpr int64_t kPermuteChunk = 2048;

// The rows as tiles of one size. Device memory, as in PermuteOutputs.
struct TileListSm90 {
  int tile = 1;  // rows
  int cluster = 1;
  int32_t* expert = nullptr;
  int32_t* row_begin = nullptr;
  int32_t* row_end = nullptr;
  int32_t* num_tiles = nullptr;
};

// All pointers are device memory; outputs as in PermuteOutputs.
struct PermuteSm90Args {
  int segments = 0;
  bool padded = false;  // rows fill the clusters of the first list; else they are dense
  int64_t max_tokens = 0;
  int slots_per_token = 1;
  const int32_t* num_tokens = nullptr;  // read by the kernel, clamped to [0, max_tokens]; null: all
  const int32_t* local_slots = nullptr;  // [max_tokens, slots_per_token]
  int32_t* chunk_counts = nullptr;       // scratch: PermuteScratchInts
  int32_t* expert_offsets = nullptr;
  int32_t* expert_counts = nullptr;
  int32_t* slot_to_row = nullptr;
  int32_t* row_to_slot = nullptr;
  int32_t* row_to_token = nullptr;
  int32_t* num_rows = nullptr;
  // The second is for GEMMs that take the same rows in other tiles; without pointers: none.
  TileListSm90 tiles[2];
};

// Elements of chunk_counts.
[[nodiscard]] int64_t PermuteScratchInts(int64_t num_slots, int segments);

// Enqueues the kernels. Throws Error{kCuda} when a launch fails.
void PermuteSm90(const PermuteSm90Args& args, const device::Queue& queue);

}  // namespace hopyard::permute
