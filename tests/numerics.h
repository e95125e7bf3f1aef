// SPDX-License-Identifier: Apache-2.0
// The accuracy rule of every numeric test: three conditions, all required, and a guard that the
// test means something. Tested itself by numerics_test.cc with planted faults.
#pragma once

#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/spec.h"

namespace hopyard::test {

struct Tolerance {
  double worst_row = 0.0;  // ||out_r - oracle_r|| / ||oracle_r||, for every row r
  double floor = 0.0;      // absolute; the oracle's rms must be at least 100 times as large
};

[[nodiscard]] Tolerance ToleranceOf(ActivationFormat activations);

// What is judged: `out` [rows, cols] as floats (poisoned before the call), against `oracle` and
// the `plain` implementation in the same formats.
struct Judged {
  std::vector<double> out;
  std::vector<double> oracle;
  std::vector<double> plain;
  int64_t cols = 0;
};

// Fails, naming the place and the numbers, unless
//  a. every element is finite,
//  b. max|out - oracle| <= 2 max|plain - oracle| + floor,
//  c. every row's relative error is within tolerance; a row whose oracle is all zero must be zero,
// and rms(oracle) >= 100 floor. No elements at all pass.
[[nodiscard]] ::testing::AssertionResult Accurate(const Judged& judged, const Tolerance& tolerance);

// Bit equality of two arrays of codes (bf16 bits, ids); names the first difference.
template <class T>
[[nodiscard]] ::testing::AssertionResult SameBits(const std::vector<T>& got,
                                                  const std::vector<T>& wanted) {
  if (got.size() != wanted.size()) {
    return ::testing::AssertionFailure()
           << got.size() << " elements; wanted " << wanted.size() << " elements";
  }
  int64_t different = 0;
  size_t first = 0;
  for (size_t i = got.size(); i > 0; --i) {
    if (got[i - 1] != wanted[i - 1]) {
      ++different;
      first = i - 1;
    }
  }
  if (different == 0) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure()
         << different << " of " << got.size() << " elements differ, the first at " << first
         << ": got " << +got[first] << ", wanted " << +wanted[first];
}

[[nodiscard]] std::vector<double> FromBf16(const std::vector<uint16_t>& bits);
[[nodiscard]] double Rms(const std::vector<double>& values);

}  // namespace hopyard::test
