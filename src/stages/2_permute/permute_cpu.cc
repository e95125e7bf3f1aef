// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>

#include "core/shape.h"
#include "stages/2_permute/permute.h"

namespace hopyard::permute {
namespace {

// The outputs as plain pointers. expert_counts doubles as the cursor of each expert while rows are
// handed out, which is why nothing has to be allocated.
struct Maps {
  int64_t num_slots;
  int64_t slots_per_token;
  const int32_t* local_slots;
  int32_t* offsets;
  int32_t* counts;
  int32_t* slot_to_row;
  int32_t* row_to_slot;
  int32_t* row_to_token;
};

bool IsLocal(int32_t expert, const PermuteOptions& options) {
  return expert >= 0 && expert < options.num_local_experts;
}

void CountSlots(const PermuteOptions& options, const Maps& maps) {
  std::fill_n(maps.counts, options.num_local_experts, 0);
  for (int64_t slot = 0; slot < maps.num_slots; ++slot) {
    const int32_t expert = maps.local_slots[slot];
    if (IsLocal(expert, options)) {
      ++maps.counts[expert];
    }
  }
}

// Segments and tiles. Clusters are whole: the tiles behind an expert's last row are empty.
void LayOut(const PermuteOptions& options, const PermuteOutputs& outputs, const Maps& maps) {
  auto* const tile_expert = outputs.tile_expert.as<int32_t>();
  auto* const tile_begin = outputs.tile_row_begin.as<int32_t>();
  auto* const tile_end = outputs.tile_row_end.as<int32_t>();
  int64_t row = 0;
  int64_t tile = 0;
  for (int32_t expert = 0; expert < options.num_local_experts; ++expert) {
    maps.offsets[expert] = static_cast<int32_t>(row);
    const int64_t count = maps.counts[expert];
    const int64_t tiles = CeilDiv(count, options.tile * options.cluster) * options.cluster;
    for (int64_t i = 0; i < tiles; ++i, ++tile) {
      const int64_t begin = row + i * options.tile;
      tile_expert[tile] = expert;
      tile_begin[tile] = static_cast<int32_t>(begin);
      tile_end[tile] = static_cast<int32_t>(std::min(begin + options.tile, row + count));
    }
    row += RoundUp(count, options.row_alignment);
  }
  maps.offsets[options.num_local_experts] = static_cast<int32_t>(row);
  *outputs.num_tiles.as<int32_t>() = static_cast<int32_t>(tile);
  *outputs.num_rows.as<int32_t>() = static_cast<int32_t>(row);
}

// Slots in increasing order take the next row of their expert: the order is stable.
void AssignRows(const PermuteOptions& options, const Maps& maps) {
  std::fill_n(maps.counts, options.num_local_experts, 0);
  int64_t slot = 0;
  for (int64_t token = 0; slot < maps.num_slots; ++token) {
    for (int64_t choice = 0; choice < maps.slots_per_token; ++choice, ++slot) {
      const int32_t expert = maps.local_slots[slot];
      if (!IsLocal(expert, options)) {
        maps.slot_to_row[slot] = -1;
        continue;
      }
      const int32_t row = maps.offsets[expert] + maps.counts[expert]++;
      maps.slot_to_row[slot] = row;
      maps.row_to_slot[row] = static_cast<int32_t>(slot);
      maps.row_to_token[row] = static_cast<int32_t>(token);
    }
  }
}

void MarkPadding(const PermuteOptions& options, const Maps& maps) {
  for (int32_t expert = 0; expert < options.num_local_experts; ++expert) {
    const int32_t begin = maps.offsets[expert] + maps.counts[expert];
    const int32_t padding = maps.offsets[expert + 1] - begin;
    std::fill_n(maps.row_to_slot + begin, padding, -1);
    std::fill_n(maps.row_to_token + begin, padding, -1);
  }
}

}  // namespace

void PermuteCpu(const TensorView& local_slots, const PermuteOptions& options,
                const PermuteOutputs& outputs) {
  const Maps maps{local_slots.numel(),
                  local_slots.shape[1],
                  local_slots.as<const int32_t>(),
                  outputs.expert_offsets.as<int32_t>(),
                  outputs.expert_counts.as<int32_t>(),
                  outputs.slot_to_row.as<int32_t>(),
                  outputs.row_to_slot.as<int32_t>(),
                  outputs.row_to_token.as<int32_t>()};
  CountSlots(options, maps);
  LayOut(options, outputs, maps);
  AssignRows(options, maps);
  if (options.row_alignment > 1) {
    MarkPadding(options, maps);
  }
}

}  // namespace hopyard::permute
