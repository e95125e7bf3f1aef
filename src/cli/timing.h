// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <vector>

namespace hopyard::cli {

// Value at quantile q in [0, 1] of a non-empty sample (nearest rank).
[[nodiscard]] inline double Quantile(std::vector<double> sample, double q) {
  std::sort(sample.begin(), sample.end());
  return sample[static_cast<size_t>(std::lround(q * static_cast<double>(sample.size() - 1)))];
}

// Seconds that fn() takes.
template <class Fn>
[[nodiscard]] double TimeSeconds(Fn&& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace hopyard::cli
