// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "hopyard/permute.h"
#include "hopyard/plan.h"

#include "core/cpu_features.h"

namespace hopyard {

namespace sm90 {
struct LayerPlan;
}  // namespace sm90

// Byte offsets of everything that one pass of the CPU over `tokens` tokens keeps in the workspace:
// the one place that knows, used for the size query and for carving.
struct WorkspaceLayout {
  int64_t tokens = 0;
  int64_t slots = 0;     // tokens * slots_per_token
  int64_t segments = 0;  // local experts + shared experts
  PermuteOptions permute;
  int64_t max_tiles = 0;
  int64_t x_pitch = 0;  // floats
  int64_t h_pitch = 0;
  int64_t scratch_floats = 0;  // per thread

  int64_t ids = 0;             // i32 [tokens, top_k] global
  int64_t weights = 0;         // f32 [tokens, top_k]
  int64_t slot_weights = 0;    // f32 [tokens, slots_per_token]
  int64_t local_slots = 0;     // i32 [tokens, slots_per_token]
  int64_t expert_offsets = 0;  // i32 [segments + 1]
  int64_t expert_counts = 0;   // i32 [segments]
  int64_t active = 0;          // i32 [segments]
  int64_t slot_to_row = 0;     // i32 [slots]
  int64_t row_to_slot = 0;
  int64_t row_to_token = 0;
  int64_t tiles = 0;    // i32 3 * [max_tiles] + 2: tile_expert, begin, end, num_tiles, num_rows
  int64_t x = 0;        // f32 [tokens, x_pitch]
  int64_t h = 0;        // f32 [slots, h_pitch]
  int64_t y = 0;        // bf16 [slots, hidden]
  int64_t scratch = 0;  // f32 [threads, scratch_floats]
  int64_t bytes = 0;
};

[[nodiscard]] WorkspaceLayout MakeWorkspaceLayout(const MoeSpec& spec, int64_t tokens,
                                                  int num_threads);

struct Plan::Impl {
  MoeSpec spec;
  PlanOptions options;
  Device device;
  Isa isa = Isa::kScalar;
  int num_threads = 1;
  int64_t tokens_per_chunk = 0;
  int64_t workspace_bytes = 0;
  WorkspaceLayout layout;                       // CPU
  std::shared_ptr<const sm90::LayerPlan> sm90;  // GPU
  Explanation explanation;
};

}  // namespace hopyard
