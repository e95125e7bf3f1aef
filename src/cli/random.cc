// SPDX-License-Identifier: Apache-2.0
#include "cli/random.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "hopyard/quantize.h"

#include "core/parallel.h"
#include "core/shape.h"

namespace hopyard::cli {
namespace {

// 16 KiB of bf16: stays in the first-level cache.
constexpr int kQuantileBits = 13;
constexpr int kQuantiles = 1 << kQuantileBits;
constexpr uint64_t kQuantileMask = kQuantiles - 1;
constexpr int kDrawsPerWord = 4;
constexpr int64_t kChunk = 1 << 15;

// x with P(X > x) = tail for a standard normal X, tail <= 0.5, by bisection.
double UpperQuantile(double tail) {
  double low = 0.0;
  double high = 8.0;
  for (int i = 0; i < 50; ++i) {
    const double middle = 0.5 * (low + high);
    (0.5 * std::erfc(middle / std::sqrt(2.0)) > tail ? low : high) = middle;
  }
  return 0.5 * (low + high);
}

const std::vector<double>& StandardQuantiles() {
  static const std::vector<double> quantiles = [] {
    std::vector<double> values(kQuantiles);
    for (int i = 0; i < kQuantiles / 2; ++i) {
      const double x = UpperQuantile((i + 0.5) / kQuantiles);
      values[static_cast<size_t>(i)] = -x;
      values[static_cast<size_t>(kQuantiles - 1 - i)] = x;
    }
    return values;
  }();
  return quantiles;
}

}  // namespace

GaussianSource::GaussianSource(double stddev) : quantiles_(kQuantiles) {
  std::vector<float> values(kQuantiles);
  std::transform(StandardQuantiles().begin(), StandardQuantiles().end(), values.begin(),
                 [&](double x) { return static_cast<float>(x * stddev); });
  QuantizedView destination;
  destination.codes = TensorView::Contiguous(quantiles_.data(), DType::kBf16, {1, kQuantiles});
  Quantize(TensorView::Contiguous(values.data(), DType::kFloat32, {1, kQuantiles}), destination);
}

void GaussianSource::Fill(uint16_t* out, int64_t count, uint64_t seed) const {
  const uint16_t* table = quantiles_.data();
  ParallelFor(0, CeilDiv(count, kChunk), 1, MaxThreads(), [&](int64_t chunk, int /*thread*/) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = std::min(begin + kChunk, count);
    int64_t i = begin;
    for (; i + kDrawsPerWord <= end; i += kDrawsPerWord) {
      const uint64_t bits = RandomBits(seed, static_cast<uint64_t>(i));
      out[i] = table[bits & kQuantileMask];
      out[i + 1] = table[(bits >> 16) & kQuantileMask];
      out[i + 2] = table[(bits >> 32) & kQuantileMask];
      out[i + 3] = table[(bits >> 48) & kQuantileMask];
    }
    for (; i < end; ++i) {
      out[i] = table[RandomBits(seed, static_cast<uint64_t>(i)) & kQuantileMask];
    }
  });
}

void GaussianSource::Fill(float* out, int64_t count, uint64_t seed) const {
  std::vector<uint16_t> bits(static_cast<size_t>(count));
  Fill(bits.data(), count, seed);
  std::transform(bits.begin(), bits.end(), out, [](uint16_t value) {
    return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
  });
}

}  // namespace hopyard::cli
