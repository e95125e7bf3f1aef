// SPDX-License-Identifier: Apache-2.0
// What a plan says of every kernel that it could have taken.
#pragma once

#include <string>
#include <vector>

#include "plan/sm90/kernel_roles.h"

namespace hopyard::sm90 {

// The kernels of `roles`, and those that take the place of one or are taken by name only. `tiles`
// is empty where no kernels fit each other.
[[nodiscard]] std::vector<Candidate> ListCandidates(const MoeSpec& spec, const PlanOptions& options,
                                                    const std::vector<Role>& roles,
                                                    const KernelChoice& choice);
// Why no kernels fit each other.
[[nodiscard]] std::string NoTileReason(const MoeSpec& spec, const std::vector<Role>& roles,
                                       const PlanOptions& options);

}  // namespace hopyard::sm90
