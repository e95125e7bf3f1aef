// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "hopyard/tensor.h"

namespace hopyard {

// How slots are laid out as rows. A slot is token * slots_per_token + choice; a row is a slot in
// expert order. Every local expert owns one segment of rows; a segment starts at a multiple of
// `row_alignment` and is cut into tiles of `tile` rows.
struct PermuteOptions {
  int num_local_experts = 0;  // segments
  int64_t tile = 1;           // rows per tile
  int64_t cluster = 1;  // tiles come in whole clusters (spec 3.4); a trailing tile may be empty
  int64_t row_alignment = 1;  // 1: dense rows; otherwise tile * cluster (FlashInfer's padded view)
};

// Exact upper bounds, int64 throughout (spec 3.3): every one of min(experts, slots) experts takes
// one slot first, the rest fill whole clusters.
[[nodiscard]] int64_t MaxTiles(int64_t num_slots, const PermuteOptions& options);
// Rows that any routing can need: slots when dense, MaxTiles * tile when padded.
[[nodiscard]] int64_t MaxRows(int64_t num_slots, const PermuteOptions& options);

// Output arrays, all i32, contiguous. Entries beyond the live counts are left untouched.
struct PermuteOutputs {
  TensorView expert_offsets;  // [num_local_experts + 1] first row of each segment; last = num rows
  TensorView expert_counts;   // [num_local_experts] slots per local expert
  TensorView slot_to_row;     // [num_slots] row, or -1 where the slot is not local
  TensorView row_to_slot;     // [MaxRows] slot, or -1 in padding rows
  TensorView row_to_token;    // [MaxRows] token, or -1 in padding rows
  TensorView tile_expert;     // [MaxTiles] local expert of a tile
  TensorView tile_row_begin;  // [MaxTiles] first row of a tile
  TensorView tile_row_end;    // [MaxTiles] end of its valid rows; <= begin for an empty tile
  TensorView num_tiles;       // [1] live tiles, including the empty ones of trailing clusters
  TensorView num_rows;        // [1] rows in use, including padding
};

// Stable permutation: within an expert, rows follow increasing slot. `local_slots` [T,
// slots_per_token] i32 holds each slot's local expert in [0, num_local_experts); anything else is
// not local.
void Permute(const TensorView& local_slots, const PermuteOptions& options,
             const PermuteOutputs& outputs);

}  // namespace hopyard
