// SPDX-License-Identifier: Apache-2.0
// The GEMMs of a pass as the kernel table and the cost model see them: which kernels run each, and
// how long they are expected to take.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "gemm/sm90/cost.h"
#include "plan/sm90/layer_plan.h"

namespace hopyard::sm90 {

struct Role {
  const char* name = "";
  gemm::sm90::RowFormat rows;
  bool gated = false;
  gemm::sm90::GemmShape shape;  // of the local experts that rows are routed to
  int64_t shared_experts = 0;   // beside them, with every token's rows
  // GEMM1's output must be rounded for GEMM2, which kernels that can (`fused`) do themselves.
  bool rounded = false;
  bool fused = false;
  std::vector<int> kernels;  // that run it, by index
  int forced = -1;           // the kernel that a tactic names
};
// GEMM1, GEMM2, and the same of shared experts where their weights have another format. `rounded`:
// of RoundedOperandsOf where there are such. `orders` change what kernels are expected to take.
[[nodiscard]] std::vector<Role> RolesOf(const MoeSpec& spec, bool rounded,
                                        const WeightOrders& orders = {});

[[nodiscard]] bool Fits(int index, const Role& role);
// Index of the role's kernel of that name, its own or its MN-major twin's, or -1.
[[nodiscard]] int FindKernel(const Role& role, const std::string& name);
// Whether a pass of its own rounds what this kernel writes.
[[nodiscard]] bool RoundsApart(int index, const Role& role);
// The kernel that runs in the place of `index`: another one where weights are packed.
[[nodiscard]] int KernelThatRuns(int index, const Role& role);
// What comes of naming `index`: the kernel that runs, and whether a pass of its own rounds what it
// writes. Names of which the same comes are one choice.
[[nodiscard]] std::pair<int, bool> OutcomeOf(int index, const Role& role);
// Says that no kernel for packed weights takes the place of `index`.
[[nodiscard]] std::string NoPackedKernel(WeightFormat weights, int index);

// The kernel that a choice has for role `number` of RolesOf.
[[nodiscard]] int KernelOf(const TileChoice& choice, size_t number);
// Whether a plan may name kernels that round what the formats do not ask to be rounded.
[[nodiscard]] bool HasRounding(const MoeSpec& spec);

// A number of tokens, uniformly routed.
struct Batch {
  gemm::sm90::RowSpread routed;
  gemm::sm90::RowSpread shared;

  Batch(const MoeSpec& spec, int64_t tokens)
      : routed(tokens, static_cast<double>(spec.top_k) / spec.num_experts), shared(tokens, 1.0) {}
};
// What the cost model expects of kernel `index` in a role, with the pass that rounds for it.
[[nodiscard]] double Microseconds(int index, const Role& role, const Batch& batch);

}  // namespace hopyard::sm90
