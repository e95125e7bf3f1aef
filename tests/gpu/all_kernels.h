// SPDX-License-Identifier: Apache-2.0
// Whether this build has every row of configs.def. One of a few kernels has none for packed
// weights.
#pragma once

#include <cstddef>
#include <iterator>

#include "gemm/sm90/rows.h"

namespace hopyard::test {

[[nodiscard]] inline bool HasAllKernels() {
  return static_cast<size_t>(gemm::sm90::NumKernels()) == std::size(gemm::sm90::kConfigTable);
}

}  // namespace hopyard::test
