// SPDX-License-Identifier: Apache-2.0
// Which kernels of a layer are worth a measurement.
#pragma once

#include <cstdint>

#include "hopyard/plan.h"

#include "plan/backend_sm90.h"
#include "tune/lab.h"

namespace hopyard::tune {

// Those that the cost model does not rule out, and the untuned ones.
[[nodiscard]] Kernels Prune(const sm90::RankedTactics& ranked);

// Of a plan for `tokens` tokens. Error{kUnsupported} where there is none.
[[nodiscard]] Kernels KernelsOf(const MoeSpec& spec, Device device, const PlanOptions& options,
                                int64_t tokens);

// Whether the kernels of the tactic run the layer, and fit each other.
[[nodiscard]] bool FitsLayer(const MoeSpec& spec, Device device, const PlanOptions& options,
                             const std::string& tactic);

}  // namespace hopyard::tune
