// SPDX-License-Identifier: Apache-2.0
#include "plan/routing_layout.h"

#include "core/shape.h"

namespace hopyard {

int64_t RoutingLayout::Take(int64_t size) {
  const int64_t offset = bytes;
  bytes += RoundUp(size, kWorkspaceAlignment);
  return offset;
}

void RoutingLayout::TakeRouting(const MoeSpec& spec, int64_t pass_tokens, int64_t most_tiles) {
  constexpr int64_t kWord = 4;
  tokens = pass_tokens;
  slots = tokens * spec.slots_per_token();
  segments = spec.num_local_experts() + spec.shared.count;
  max_tiles = most_tiles;
  ids = Take(tokens * spec.top_k * kWord);
  weights = Take(tokens * spec.top_k * kWord);
  slot_weights = Take(slots * kWord);
  local_slots = Take(slots * kWord);
  expert_offsets = Take((segments + 1) * kWord);
  expert_counts = Take(segments * kWord);
  slot_to_row = Take(slots * kWord);
  row_to_slot = Take(slots * kWord);
  row_to_token = Take(slots * kWord);
  tiles = Take((3 * max_tiles + 2) * kWord);
}

}  // namespace hopyard
