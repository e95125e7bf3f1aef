// SPDX-License-Identifier: Apache-2.0
#include "tests/numerics.h"

#include <algorithm>
#include <cmath>

#include "formats/codes.h"

namespace hopyard::test {
namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

struct Worst {
  double error = 0.0;
  size_t index = 0;
};

Worst LargestError(const std::vector<double>& values, const std::vector<double>& oracle) {
  Worst worst;
  for (size_t i = 0; i < values.size(); ++i) {
    const double error = std::fabs(values[i] - oracle[i]);
    if (error > worst.error) {
      worst = {error, i};
    }
  }
  return worst;
}

AssertionResult CheckFinite(const Judged& judged) {
  const auto cols = static_cast<size_t>(judged.cols);
  for (size_t i = 0; i < judged.out.size(); ++i) {
    if (!std::isfinite(judged.out[i])) {
      return AssertionFailure() << "row " << i / cols << ", column " << i % cols << " is "
                                << judged.out[i] << "; the oracle says " << judged.oracle[i];
    }
  }
  return AssertionSuccess();
}

AssertionResult CheckRows(const Judged& judged, const Tolerance& tolerance) {
  const auto cols = static_cast<size_t>(judged.cols);
  for (size_t begin = 0; begin < judged.out.size(); begin += cols) {
    double error = 0.0;
    double size = 0.0;
    for (size_t i = begin; i < begin + cols; ++i) {
      error += (judged.out[i] - judged.oracle[i]) * (judged.out[i] - judged.oracle[i]);
      size += judged.oracle[i] * judged.oracle[i];
    }
    if (std::sqrt(error) > tolerance.worst_row * std::sqrt(size)) {
      return AssertionFailure() << "row " << begin / cols
                                << ": ||out - oracle|| = " << std::sqrt(error)
                                << ", ||oracle|| = " << std::sqrt(size) << "; the tolerance is "
                                << tolerance.worst_row;
    }
  }
  return AssertionSuccess();
}

}  // namespace

Tolerance ToleranceOf(ActivationFormat activations) {
  constexpr double kFloor = 5e-4;
  switch (activations) {
    case ActivationFormat::kBf16:
      return {0.012, kFloor};
    case ActivationFormat::kFp8Block128:
    case ActivationFormat::kFp8PerTensor:
    case ActivationFormat::kFp8PerToken:
    case ActivationFormat::kMxFp8:
      return {0.12, kFloor};
    case ActivationFormat::kNvFp4:
    case ActivationFormat::kNvFp4PerToken:
      return {0.40, kFloor};
  }
  return {};
}

AssertionResult Accurate(const Judged& judged, const Tolerance& tolerance) {
  if (judged.out.size() != judged.oracle.size() || judged.plain.size() != judged.oracle.size()) {
    return AssertionFailure() << "sizes differ: out " << judged.out.size() << ", oracle "
                              << judged.oracle.size() << ", plain " << judged.plain.size();
  }
  if (judged.oracle.empty()) {
    return AssertionSuccess();
  }
  const double rms = Rms(judged.oracle);
  if (!(rms >= 100.0 * tolerance.floor)) {
    return AssertionFailure() << "this test means nothing: rms(oracle) = " << rms
                              << " is below 100 x the floor " << tolerance.floor;
  }
  if (AssertionResult finite = CheckFinite(judged); !finite) {
    return finite;
  }
  const Worst out = LargestError(judged.out, judged.oracle);
  const Worst plain = LargestError(judged.plain, judged.oracle);
  if (!(out.error <= 2.0 * plain.error + tolerance.floor)) {
    const auto cols = static_cast<size_t>(judged.cols);
    return AssertionFailure() << "row " << out.index / cols << ", column " << out.index % cols
                              << ": got " << judged.out[out.index] << ", the oracle says "
                              << judged.oracle[out.index] << "; max|out - oracle| = " << out.error
                              << " > 2 x " << plain.error << " (plain) + " << tolerance.floor;
  }
  return CheckRows(judged, tolerance);
}

std::vector<double> FromBf16(const std::vector<uint16_t>& bits) {
  std::vector<double> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(),
                 [](uint16_t b) { return static_cast<double>(formats::DecodeBf16(b)); });
  return values;
}

double Rms(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) {
    sum += value * value;
  }
  return values.empty() ? 0.0 : std::sqrt(sum / static_cast<double>(values.size()));
}

}  // namespace hopyard::test
