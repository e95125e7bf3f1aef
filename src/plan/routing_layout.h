// SPDX-License-Identifier: Apache-2.0
// Where a pass keeps its routing and permutation in the workspace, on every backend: the one place
// that knows, used for the size query and for carving.
#pragma once

#include <cstdint>

#include "hopyard/spec.h"

namespace hopyard {

inline constexpr int64_t kWorkspaceAlignment = 256;

// Byte offsets. A backend's layout begins with these and takes what else it keeps after them.
struct RoutingLayout {
  int64_t tokens = 0;
  int64_t slots = 0;     // tokens * slots_per_token
  int64_t segments = 0;  // local experts + shared experts
  int64_t max_tiles = 0;

  int64_t ids = 0;             // i32 [tokens, top_k] global
  int64_t weights = 0;         // f32 [tokens, top_k]
  int64_t slot_weights = 0;    // f32 [tokens, slots_per_token]
  int64_t local_slots = 0;     // i32 [tokens, slots_per_token]
  int64_t expert_offsets = 0;  // i32 [segments + 1]
  int64_t expert_counts = 0;   // i32 [segments]
  int64_t slot_to_row = 0;     // i32 [slots]
  int64_t row_to_slot = 0;
  int64_t row_to_token = 0;
  int64_t tiles = 0;  // i32 3 * [max_tiles] + 2: tile_expert, begin, end, num_tiles, num_rows
  int64_t bytes = 0;  // of all that was taken

  // Offset of the next `size` bytes.
  int64_t Take(int64_t size);
  // Fills the fields above for passes of up to `pass_tokens` tokens with at most `most_tiles`
  // tiles.
  void TakeRouting(const MoeSpec& spec, int64_t pass_tokens, int64_t most_tiles);
};

}  // namespace hopyard
