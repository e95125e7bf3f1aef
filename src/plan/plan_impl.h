// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hopyard/permute.h"
#include "hopyard/plan.h"

#include "core/cpu_features.h"
#include "plan/cpu_choice.h"
#include "plan/routing_layout.h"

namespace hopyard {

namespace sm90 {
struct LayerPlan;
}  // namespace sm90

// Byte offsets of everything that one pass of the CPU over `tokens` tokens keeps in the workspace.
struct WorkspaceLayout : RoutingLayout {
  PermuteOptions permute;
  int64_t x_pitch = 0;  // floats
  int64_t h_pitch = 0;
  int64_t scratch_floats = 0;  // per thread

  int64_t active = 0;   // i32 [segments]
  int64_t x = 0;        // f32 [tokens, x_pitch]
  int64_t h = 0;        // f32 [slots, h_pitch]
  int64_t y = 0;        // bf16 [slots, hidden]
  int64_t scratch = 0;  // f32 [threads, scratch_floats]
};

[[nodiscard]] WorkspaceLayout MakeWorkspaceLayout(const MoeSpec& spec, int64_t tokens,
                                                  int num_threads);

struct Plan::Impl {
  MoeSpec spec;
  PlanOptions options;
  Device device;
  std::vector<IsaRange> isas;  // CPU
  int num_threads = 1;
  int64_t tokens_per_chunk = 0;
  int64_t workspace_bytes = 0;
  WorkspaceLayout layout;                       // CPU
  std::shared_ptr<const sm90::LayerPlan> sm90;  // GPU
  Explanation explanation;

  // Of a CPU's pass over 1 .. max_tokens tokens.
  [[nodiscard]] Isa IsaFor(int64_t tokens) const;
};

}  // namespace hopyard
