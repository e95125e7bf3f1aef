// SPDX-License-Identifier: Apache-2.0
// The oracle, written from the definition: a list of slots per expert, laid out one after another.
#include <cstdint>
#include <vector>

#include "stages/2_permute/permute.h"

namespace hopyard::permute {
namespace {

void Put(const TensorView& tensor, int64_t index, int64_t value) {
  tensor.as<int32_t>()[index] = static_cast<int32_t>(value);
}

}  // namespace

void PermuteRef(const TensorView& local_slots, const PermuteOptions& options,
                const PermuteOutputs& outputs) {
  const auto* experts = local_slots.as<const int32_t>();
  const int64_t slots_per_token = local_slots.shape[1];
  std::vector<std::vector<int64_t>> slots_of(static_cast<size_t>(options.num_local_experts));
  for (int64_t slot = 0; slot < local_slots.shape[0] * slots_per_token; ++slot) {
    Put(outputs.slot_to_row, slot, -1);
    if (experts[slot] >= 0 && experts[slot] < options.num_local_experts) {
      slots_of[static_cast<size_t>(experts[slot])].push_back(slot);
    }
  }
  int64_t row = 0;
  int64_t tile = 0;
  for (int64_t expert = 0; expert < options.num_local_experts; ++expert) {
    const std::vector<int64_t>& slots = slots_of[static_cast<size_t>(expert)];
    const int64_t first_row = row;
    Put(outputs.expert_offsets, expert, first_row);
    Put(outputs.expert_counts, expert, static_cast<int64_t>(slots.size()));
    for (const int64_t slot : slots) {
      Put(outputs.slot_to_row, slot, row);
      Put(outputs.row_to_slot, row, slot);
      Put(outputs.row_to_token, row, slot / slots_per_token);
      ++row;
    }
    const int64_t end = row;
    for (int64_t begin = first_row; begin < end; begin += options.tile * options.cluster) {
      for (int64_t member = 0; member < options.cluster; ++member) {
        const int64_t tile_begin = begin + member * options.tile;
        const int64_t tile_end = tile_begin + options.tile;
        Put(outputs.tile_expert, tile, expert);
        Put(outputs.tile_row_begin, tile, tile_begin);
        Put(outputs.tile_row_end, tile, tile_end < end ? tile_end : end);
        ++tile;
      }
    }
    while ((row - first_row) % options.row_alignment != 0) {
      Put(outputs.row_to_slot, row, -1);
      Put(outputs.row_to_token, row, -1);
      ++row;
    }
  }
  Put(outputs.expert_offsets, options.num_local_experts, row);
  Put(outputs.num_tiles, 0, tile);
  Put(outputs.num_rows, 0, row);
}

}  // namespace hopyard::permute
