// SPDX-License-Identifier: Apache-2.0
// Tables as text. The format is documented in docs/tuning.md.
#pragma once

#include <string>
#include <string_view>

#include "hopyard/tune.h"

namespace hopyard::tune {

inline constexpr int kTableVersion = 2;
// Far above what all layers of all models take: 1 KB each for some hundreds of them.
inline constexpr uint64_t kMaxTableBytes = 64U << 20;

// `file` names the text in messages.
[[nodiscard]] TuningTable ParseTable(std::string_view text, const std::string& file);

}  // namespace hopyard::tune
