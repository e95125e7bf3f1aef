// SPDX-License-Identifier: Apache-2.0
// What a plan for Hopper fixes: the formats between the stages, the kernels for every number of
// tokens, the workspace. Host arithmetic: no GPU is asked.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "hopyard/permute.h"
#include "hopyard/plan.h"
#include "hopyard/tune.h"

#include "gemm/sm90/operands.h"
#include "plan/routing_layout.h"

namespace hopyard::sm90 {

struct RankedTactics;  // plan/backend_sm90.h

// How a group of experts (routed or shared) reads its rows.
struct GroupFormats {
  WeightFormat weights = WeightFormat::kBf16;
  gemm::sm90::LayerOperands operands;
};
// `rounded`: RoundedOperandsOf where there are such.
[[nodiscard]] GroupFormats FormatsOf(const MoeSpec& spec, WeightFormat weights, bool rounded);

struct GroupKernels {
  int gemm1 = -1;  // gemm::sm90::KernelAt
  int gemm2 = -1;
  // GEMM1 writes BF16, which a pass of its own rounds to operands.h.
  bool rounds_apart = false;
};

inline constexpr int64_t kAnyTokens = std::numeric_limits<int64_t>::max();

// Kernels of passes with at most `max_tokens` tokens. Routed and shared experts take the same tiles
// in a GEMM; GEMM1 and GEMM2 may take different ones.
struct TileChoice {
  int64_t max_tokens = 0;
  GroupKernels routed;
  GroupKernels shared;
  std::string measured;  // times that it was taken for; empty: the cost model's choice
};

struct KernelChoice {
  Explanation explanation;
  std::vector<TileChoice> tiles;  // ascending; the last takes any number of tokens
  bool rounded = false;           // the tactic named a kernel of RoundedOperandsOf
};
// `tuned` ascends; its kernels are taken where this build has them and they fit, unless a tactic
// names some. Empty: by the cost model alone.
[[nodiscard]] KernelChoice ChooseKernels(const MoeSpec& spec, const PlanOptions& options,
                                         const std::vector<TunedRange>& tuned);
// Whether a TunedRange may name the tactic.
[[nodiscard]] bool HasTactic(const MoeSpec& spec, const std::string& tactic);
// Backend::Rank. Precondition: ChooseKernels supports the spec.
[[nodiscard]] RankedTactics RankTactics(const MoeSpec& spec, const PlanOptions& options,
                                        int64_t tokens);

// The choice for a pass over `tokens` tokens.
[[nodiscard]] const TileChoice& ChoiceFor(const std::vector<TileChoice>& tiles, int64_t tokens);

// Byte offsets of what a pass over up to `tokens` tokens keeps in the workspace.
struct Layout : RoutingLayout {
  int64_t num_tokens = 0;  // i32 [1] live tokens of the pass
  int64_t permute_scratch = 0;
  int64_t gemm2_tiles = 0;  // as `tiles`, where GEMM2 has its own
  int64_t x = 0;            // [tokens] rows of x_bytes
  int64_t x_bytes = 0;
  int64_t shared_x = 0;  // the same for shared experts; x where they read the same rows
  int64_t shared_x_bytes = 0;
  int64_t x_block_scales = 0;  // f32 [tokens, ceil(hidden / 128)]
  int64_t x_row_scales = 0;    // f32 [tokens]
  int64_t h = 0;               // [slots] rows of h_bytes, in the formats of their groups
  int64_t h_bytes = 0;
  int64_t h_block_scales = 0;  // f32 [slots, ceil(intermediate / 128)]
  int64_t h_row_scales = 0;    // f32 [slots]
  int64_t y = 0;               // bf16 [slots, hidden]
  // bf16 [slots, activation_pitch]: what is rounded apart to h, in y's memory, which GEMM2 writes
  // after.
  int64_t activation = 0;
  int64_t activation_pitch = 0;
};
// As large whichever kernels run. `rounded`: of KernelChoice.
[[nodiscard]] Layout MakeLayout(const MoeSpec& spec, bool rounded, int64_t tokens);

// Rows as GEMM1 (0) or GEMM2 (1) takes them.
[[nodiscard]] PermuteOptions PermuteOptionsFor(const MoeSpec& spec, const TileChoice& choice,
                                               int gemm);

struct LayerPlan {
  GroupFormats routed;
  GroupFormats shared;  // those of `routed` without shared experts
  std::vector<TileChoice> tiles;
  Layout layout;
};

}  // namespace hopyard::sm90
