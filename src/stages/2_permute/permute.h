// SPDX-License-Identifier: Apache-2.0
// Stage 2: ids of slots -> rows in expert order, tiles and maps (spec 3).
#pragma once

#include <string>

#include "hopyard/permute.h"

namespace hopyard::permute {

// Oracle and CPU backend of hopyard::Permute; validated arguments, CPU memory. PermuteCpu allocates
// nothing and works in place on the outputs.
void PermuteRef(const TensorView& local_slots, const PermuteOptions& options,
                const PermuteOutputs& outputs);
void PermuteCpu(const TensorView& local_slots, const PermuteOptions& options,
                const PermuteOutputs& outputs);

// Independent checker of the invariants of spec 8.5 (and stability of the order): returns an empty
// string or the first violation in words. Every backend's output is run through it.
[[nodiscard]] std::string CheckPermutation(const TensorView& local_slots,
                                           const PermuteOptions& options,
                                           const PermuteOutputs& outputs);

}  // namespace hopyard::permute
