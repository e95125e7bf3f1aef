// SPDX-License-Identifier: Apache-2.0
// Statistics of times that were measured in turns: round i of one candidate ran beside round i of
// the other.
#pragma once

#include <vector>

namespace hopyard::tune {

// 0 of none; of an even number the mean of the two in the middle.
[[nodiscard]] double Median(std::vector<double> values);

// How much slower a candidate is than its reference, relative; negative: faster.
struct Difference {
  double median = 0.0;
  // Standard error of `median`. What slows a whole round (clocks, other programs) slows both and is
  // not in it; a single round that something fell into hardly is.
  double noise = 0.0;
};
// Of as many rounds each; {} of none.
[[nodiscard]] Difference Compare(const std::vector<double>& times,
                                 const std::vector<double>& reference);

}  // namespace hopyard::tune
