// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hopyard::cli {

// Compact text bars of tokens per expert: one row per group of neighbouring experts when there are
// many, with a summary line.
[[nodiscard]] std::string LoadHistogram(const std::vector<int64_t>& load);

}  // namespace hopyard::cli
