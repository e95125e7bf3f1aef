// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace hopyard {

// False where the variable is 0, true where it is 1, empty or absent. Any other value is an error.
[[nodiscard]] bool EnvironmentSwitch(const char* name);

}  // namespace hopyard
