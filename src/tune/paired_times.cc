// SPDX-License-Identifier: Apache-2.0
#include "tune/paired_times.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace hopyard::tune {
namespace {

// A normal distribution's standard deviation over its median absolute deviation, and the standard
// error of a median over that of a mean, sqrt(pi / 2).
constexpr double kSigmaOfMad = 1.4826;
constexpr double kErrorOfMedian = 1.2533;
// The deviation of n values about their own median is too small by n / (n - 0.8) on average (Croux
// and Rousseeuw 1992).
constexpr double kSmallSample = 0.8;

}  // namespace

double Median(std::vector<double> values) {
  if (values.empty()) {
    return 0.0;
  }
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) {
    return *middle;
  }
  return 0.5 * (*middle + *std::max_element(values.begin(), middle));
}

Difference Compare(const std::vector<double>& times, const std::vector<double>& reference) {
  Difference difference;
  std::vector<double> values;
  for (size_t i = 0; i < std::min(times.size(), reference.size()); ++i) {
    values.push_back(times[i] / reference[i] - 1.0);
  }
  if (values.empty()) {
    return difference;
  }
  difference.median = Median(values);
  for (double& value : values) {
    value = std::abs(value - difference.median);
  }
  const auto count = static_cast<double>(values.size());
  const double sigma = kSigmaOfMad * Median(values) * count / (count - kSmallSample);
  difference.noise = kErrorOfMedian * sigma / std::sqrt(count);
  return difference;
}

}  // namespace hopyard::tune
