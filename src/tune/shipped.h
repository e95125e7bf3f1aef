// SPDX-License-Identifier: Apache-2.0
// The tables that come with the library: src/tune/tables/*.json, which CMake puts into it.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "hopyard/tune.h"

namespace hopyard::tune {

struct ShippedFile {
  std::string_view name;
  std::string_view text;
};
// Defined in the source file that CMake writes.
[[nodiscard]] std::span<const ShippedFile> ShippedFiles();

// Parsed when first asked for.
[[nodiscard]] const std::vector<std::shared_ptr<const TuningTable>>& ShippedTables();

}  // namespace hopyard::tune
