// SPDX-License-Identifier: Apache-2.0
#include "tune/same_rows.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include <fmt/format.h>

#include "core/parallel.h"
#include "formats/codes.h"

namespace hopyard::tune {
namespace {

// A row much smaller than the others is what large terms left of each other: its rounding is
// theirs.
constexpr double kSmallRow = 0.01;

struct RowDifference {
  double wanted = 0.0;  // norms; NaN where the row is not finite
  double apart = 0.0;
};

RowDifference CompareRow(const uint16_t* got, const uint16_t* wanted, int64_t cols) {
  double norm = 0.0;
  double apart = 0.0;
  for (int64_t c = 0; c < cols; ++c) {
    const double a = formats::DecodeBf16(got[c]);
    const double b = formats::DecodeBf16(wanted[c]);
    norm += b * b;
    apart += (a - b) * (a - b);
  }
  return {std::sqrt(norm), std::sqrt(apart)};
}

std::string NotFiniteText(size_t row) {
  return fmt::format("row {} of the output is not finite", row);
}

}  // namespace

double RowBound(ActivationFormat activations) {
  switch (activations) {
    case ActivationFormat::kBf16:
      return 0.012;
    case ActivationFormat::kFp8Block128:
    case ActivationFormat::kFp8PerTensor:
    case ActivationFormat::kFp8PerToken:
    case ActivationFormat::kMxFp8:
      return 0.12;
    case ActivationFormat::kNvFp4:
    case ActivationFormat::kNvFp4PerToken:
      return 0.40;
  }
  return 0.0;
}

std::string DescribeDifference(const std::vector<uint16_t>& got,
                               const std::vector<uint16_t>& wanted, int64_t cols, double bound) {
  const int64_t rows = static_cast<int64_t>(wanted.size()) / cols;
  std::vector<RowDifference> differences(static_cast<size_t>(rows));
  ParallelFor(0, rows, 16, MaxThreads(), [&](int64_t r, int /*thread*/) {
    differences[static_cast<size_t>(r)] =
        CompareRow(got.data() + r * cols, wanted.data() + r * cols, cols);
  });
  double sum = 0.0;
  int64_t finite = 0;
  for (const RowDifference& row : differences) {
    if (std::isfinite(row.wanted)) {
      sum += row.wanted;
      ++finite;
    }
  }
  const double floor = finite > 0 ? kSmallRow * sum / static_cast<double>(finite) : 0.0;
  for (size_t r = 0; r < differences.size(); ++r) {
    const RowDifference& row = differences[r];
    if (!std::isfinite(row.wanted)) {
      continue;
    }
    if (!std::isfinite(row.apart)) {
      return NotFiniteText(r);
    }
    const double allowed = row.wanted > 0.0 ? bound * std::max(row.wanted, floor) : 0.0;
    if (row.apart > allowed) {
      return fmt::format(
          "row {} of the output differs by {:.3g} of its norm {:.3g}; wanted at most "
          "{:.3g} of it",
          r, row.wanted > 0.0 ? row.apart / row.wanted : row.apart, row.wanted, bound);
    }
  }
  return {};
}

std::string DescribeNotFinite(const std::vector<uint16_t>& rows, int64_t cols) {
  // All ones: an infinity or no number.
  constexpr uint16_t kExponent = 0x7F80;
  const auto found = std::find_if(rows.begin(), rows.end(),
                                  [](uint16_t bits) { return (bits & kExponent) == kExponent; });
  if (found == rows.end()) {
    return {};
  }
  return NotFiniteText(static_cast<size_t>((found - rows.begin()) / cols));
}

}  // namespace hopyard::tune
