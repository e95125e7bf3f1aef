// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace hopyard {

// False where the variable is 0, true where it is 1, empty or absent. Any other value is an error.
[[nodiscard]] bool EnvironmentSwitch(const char* name);

// The variable's value; empty where it is absent.
[[nodiscard]] std::string EnvironmentText(const char* name);

}  // namespace hopyard
