// SPDX-License-Identifier: Apache-2.0
// The kernels of a CPU plan: one instruction set, or, where measurements say so, one for each range
// of numbers of tokens. All give the same bits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/plan.h"
#include "hopyard/tune.h"

#include "core/cpu_features.h"

namespace hopyard {

// Numbers of tokens up to `last` that one instruction set runs.
struct IsaRange {
  int64_t last = 0;
  Isa isa = Isa::kScalar;

  friend bool operator==(const IsaRange&, const IsaRange&) = default;
};

struct CpuChoice {
  Explanation explanation;
  std::vector<IsaRange> ranges;  // ascending, up to max_tokens; empty where nothing runs
};
[[nodiscard]] CpuChoice ChooseCpu(const MoeSpec& spec, const PlanOptions& options,
                                  const std::vector<TunedRange>& tuned);

// Whether `tactic` is a kernel that this machine runs.
[[nodiscard]] bool HasCpuTactic(const MoeSpec& spec, const std::string& tactic);

}  // namespace hopyard
