// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "hopyard/checkpoint.h"

#include "checkpoint/family.h"
#include "checkpoint/tensor_store.h"

namespace hopyard::checkpoint {

// The MoE layer `index`, which is one of family.moe_layers. Views into the store's maps; weight
// scales that the checkpoint does not hold as f32 are converted into memory of `weights.owner`,
// which keeps the store alive too.
[[nodiscard]] CheckpointLayer ReadLayer(const Family& family,
                                        const std::shared_ptr<const TensorStore>& store, int index);

}  // namespace hopyard::checkpoint
