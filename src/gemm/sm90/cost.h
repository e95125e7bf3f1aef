// SPDX-License-Identifier: Apache-2.0
// How long a grouped GEMM takes with each row of configs.def, from a small model in bytes and
// cycles: what plans choose kernels by. Host arithmetic without a GPU; +, -, *, / only, so that
// every host comes to the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "hopyard/spec.h"

#include "gemm/sm90/config.h"

namespace hopyard::gemm::sm90 {

// Rows of one expert where each of `tokens` tokens chooses it with the same chance: a binomial
// distribution.
class RowSpread {
 public:
  RowSpread(int64_t tokens, double chance);
  [[nodiscard]] double average() const { return average_; }
  // Chance that the expert has rows.
  [[nodiscard]] double touched() const { return Above(0); }
  // Expected number of tiles of `rows` rows.
  [[nodiscard]] double Tiles(int64_t rows) const;
  // Variance of that number.
  [[nodiscard]] double TileVariance(int64_t rows) const;

 private:
  // Chance of more than `rows` rows.
  [[nodiscard]] double Above(int64_t rows) const;

  double average_;
  int64_t first_ = 0;          // fewer rows do not happen
  std::vector<double> above_;  // chance of more than first_ + i rows; 0 behind the end
};

// One GEMM of `experts` alike.
struct GemmShape {
  WeightFormat weights = WeightFormat::kBf16;
  int64_t k = 0;
  int64_t features = 0;  // of the output
  int64_t experts = 0;
  bool packed = false;  // weights in units of gemm/packed_order.h
};

// Microseconds on an H100, weights cold.
[[nodiscard]] double EstimateMicroseconds(const GemmConfig& config, const GemmShape& shape,
                                          const RowSpread& rows);
// The same of row `index` of the table; where weights are packed, of the row that takes its place.
[[nodiscard]] double EstimateMicroseconds(int index, const GemmShape& shape, const RowSpread& rows);

// Microseconds of a pass of its own that rounds `rows` rows of `cols` values between the GEMMs.
[[nodiscard]] double EstimateRounding(double rows, int64_t cols);

}  // namespace hopyard::gemm::sm90
