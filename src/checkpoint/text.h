// SPDX-License-Identifier: Apache-2.0
// Text of untrusted names and of shapes, for messages.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "hopyard/tensor.h"

namespace hopyard::checkpoint {

// At most 200 bytes; control characters and bytes that are not ASCII become \xNN, so that a hostile
// name can neither flood a log nor drive a terminal.
[[nodiscard]] std::string Printable(std::string_view text);

[[nodiscard]] std::string ShapeText(const std::vector<int64_t>& shape);  // "[4, 64]"
[[nodiscard]] std::vector<int64_t> ShapeOf(const TensorView& view);

}  // namespace hopyard::checkpoint
