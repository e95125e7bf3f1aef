// SPDX-License-Identifier: Apache-2.0
// --device cpu|cuda[:N]
#pragma once

#include <string>

#include "hopyard/tensor.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11 has it so
class App;
}

namespace hopyard::cli {

void AddDeviceOption(CLI::App& command, std::string* device);

// Error{kInvalidArgument} for anything else.
[[nodiscard]] Device ParseDevice(const std::string& text);
[[nodiscard]] std::string ToString(const Device& device);

}  // namespace hopyard::cli
