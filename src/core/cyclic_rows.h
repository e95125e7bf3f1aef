// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace hopyard {

// `count` of the rows [n, cols], n >= 1, from row `first` on; behind the last comes the first.
template <class T>
[[nodiscard]] std::vector<T> CyclicRows(const std::vector<T>& rows, int64_t cols, int64_t first,
                                        int64_t count) {
  const int64_t n = static_cast<int64_t>(rows.size()) / cols;
  std::vector<T> out;
  out.reserve(static_cast<size_t>(count * cols));
  for (int64_t i = 0; i < count; ++i) {
    const auto row = rows.begin() + (first + i) % n * cols;
    out.insert(out.end(), row, row + cols);
  }
  return out;
}

}  // namespace hopyard
