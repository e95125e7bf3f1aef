// SPDX-License-Identifier: Apache-2.0
// Whether two tactics compute the same layer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/spec.h"

namespace hopyard::tune {

// How far two kernels' outputs may be apart in a row, relative in the root mean square: what the
// numeric tests allow each of them from the exact result (docs/numerics.md, "How it is tested").
// They sum in another order, so that some intermediate values and outputs round to a neighbour; a
// tile that is missing, or another expert's, is 1/10 and more of a row, of all of them.
[[nodiscard]] double RowBound(ActivationFormat activations);

// bf16 [rows, cols] of a candidate and of what it is held to. Empty, or where and how they differ:
// a value that is not finite, or a row beyond `bound`. Rows that are not finite in `wanted` are not
// looked at; where it has zeros, zeros are wanted.
[[nodiscard]] std::string DescribeDifference(const std::vector<uint16_t>& got,
                                             const std::vector<uint16_t>& wanted, int64_t cols,
                                             double bound);

// The first of these rows that is not finite, in words; empty where all are.
[[nodiscard]] std::string DescribeNotFinite(const std::vector<uint16_t>& rows, int64_t cols);

}  // namespace hopyard::tune
