// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace hopyard {

// What can be allocated now: MemAvailable, lowered by a memory limit of the control group.
[[nodiscard]] int64_t AvailableMemory();

// Bytes of the CPU's last-level cache; 0 where the system does not say.
[[nodiscard]] int64_t LastLevelCacheBytes();

}  // namespace hopyard
