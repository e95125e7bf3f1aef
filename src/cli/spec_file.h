// SPDX-License-Identifier: Apache-2.0
// A layer stated in a .json file by the field names of hopyard/spec.h.
#pragma once

#include <string>

#include "hopyard/spec.h"

namespace hopyard::cli {

// hidden_size, intermediate_size, num_experts and top_k are required, all else defaults as MoeSpec
// does. Formats and activations by the names that ToString prints; routing by the method names of
// docs/routing.md, alone or as {"method": ..., parameters}. Throws Error{kInvalidArgument} naming
// file and key for what is not JSON, unknown keys, wrong types and unknown names; whether the layer
// makes sense is for Explain and MakePlan to say.
[[nodiscard]] MoeSpec ReadSpecFile(const std::string& path);

}  // namespace hopyard::cli
