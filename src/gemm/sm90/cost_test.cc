// SPDX-License-Identifier: Apache-2.0
// The cost model against hand-made distributions, against what no kernel can be faster than, and
// against the times that the benchmarks recorded.
#include "gemm/sm90/cost.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "gemm/sm90/rows.h"
#include "tests/measured.h"

namespace hopyard::gemm::sm90 {
namespace {

// Null where the table has no such row (any more).
const KernelRow* FindRow(const std::string& name) {
  for (const KernelRow& row : kConfigTable) {
    if (row.name == name) {
      return &row;
    }
  }
  return nullptr;
}

TEST(RowSpread, IsTheBinomialDistribution) {
  // Of 4 tokens 0, 1, 2, 3, 4 choose an expert in 81, 108, 54, 12, 1 of 256 cases.
  const RowSpread four(4, 0.25);
  EXPECT_DOUBLE_EQ(four.average(), 1.0);
  EXPECT_NEAR(four.touched(), 175.0 / 256, 1e-12);
  EXPECT_NEAR(four.Tiles(1), 1.0, 1e-12);
  EXPECT_NEAR(four.Tiles(2), (108 + 54 + 2 * (12 + 1)) / 256.0, 1e-12);
  EXPECT_NEAR(four.Tiles(3), (108 + 54 + 12 + 2 * 1) / 256.0, 1e-12);
  EXPECT_NEAR(four.Tiles(4), four.touched(), 1e-12);
  const double tiles = four.Tiles(2);
  EXPECT_NEAR(four.TileVariance(2), (108 + 54 + 4 * (12 + 1)) / 256.0 - tiles * tiles, 1e-12);
  EXPECT_NEAR(four.TileVariance(4), four.touched() * (1.0 - four.touched()), 1e-12);
}

TEST(RowSpread, AllOrManyTokens) {
  const RowSpread all(300, 1.0);
  EXPECT_EQ(all.touched(), 1.0);
  EXPECT_EQ(all.Tiles(128), 3.0);
  EXPECT_EQ(all.TileVariance(128), 0.0);
  EXPECT_EQ(all.Tiles(100), 3.0);
  EXPECT_EQ(all.Tiles(300), 1.0);
  const RowSpread one(1, 8.0 / 128);
  EXPECT_NEAR(one.touched(), 8.0 / 128, 1e-12);
  EXPECT_NEAR(one.Tiles(16), 8.0 / 128, 1e-12);
  for (const int64_t tokens : {100, 4096, 400000, 50000000}) {
    const RowSpread rows(tokens, 1.0 / 16);
    EXPECT_NEAR(rows.Tiles(1) / rows.average(), 1.0, 1e-9) << tokens;
    EXPECT_GE(rows.Tiles(16) * 16, rows.average());
    EXPECT_GE(rows.Tiles(16), rows.Tiles(128));
    EXPECT_LE(rows.Tiles(128), rows.average() / 128 + 1.0);
  }
}

GemmShape ShapeOf(const MoeSpec& spec, bool first) {
  return {spec.weights, first ? spec.hidden_size : spec.intermediate_size,
          first ? spec.intermediate_size : spec.hidden_size, spec.num_local_experts()};
}
double Chance(const MoeSpec& spec) {
  return static_cast<double>(spec.top_k) / spec.num_experts;
}

// Rows of the table that multiply some layer's weights, at every number of tokens: a time that no
// kernel beats, and that grows with the tokens.
TEST(Cost, IsAboveTheFloorAndGrows) {
  constexpr double kBytesPerUs = 3.2e6;
  constexpr double kFlopsPerUs = 1979e6;  // e4m3, as published
  for (const bench::ModelShape& model : bench::ModelShapes()) {
    for (const KernelRow& row : kConfigTable) {
      MoeSpec spec = model.spec;
      spec.weights = row.config.family == Family::kBf16  ? WeightFormat::kBf16
                     : row.config.family == Family::kFp8 ? WeightFormat::kFp8Block128
                                                         : WeightFormat::kMxFp4;
      if (!ReadsWeights(row.config.family, spec.weights)) {
        continue;
      }
      const GemmShape shape = ShapeOf(spec, row.config.gated);
      const double matrix =
          static_cast<double>(shape.k * shape.features * (row.config.gated ? 2 : 1));
      double previous = 0.0;
      for (int64_t tokens = 1; tokens <= 65536; tokens *= 4) {
        SCOPED_TRACE(std::string(row.name) + ' ' + std::string(model.name) + ' ' +
                     std::to_string(tokens));
        const RowSpread rows(tokens, Chance(spec));
        const double us = EstimateMicroseconds(row.config, shape, rows);
        const double bytes = static_cast<double>(shape.experts) * rows.touched() * matrix *
                             (row.config.family == Family::kBf16  ? 2.0
                              : row.config.family == Family::kFp8 ? 1.0
                                                                  : 0.5);
        const double flops = 2.0 * static_cast<double>(shape.experts) * rows.average() * matrix;
        ASSERT_TRUE(std::isfinite(us));
        EXPECT_GE(us, bytes / kBytesPerUs);
        EXPECT_GE(us, flops / kFlopsPerUs);
        // A tile more or less in the last turn may save something.
        EXPECT_GE(us, 0.98 * previous);
        previous = us;
      }
    }
  }
}

// Times of single GEMMs. Kernels have become faster or slower since some were taken: a wide margin.
TEST(Cost, IsNearTheTimesOfGemms) {
  int compared = 0;
  double log_errors = 0.0;
  for (const test::Measured& one : test::ReadMeasured("bench/results/h100/gemm.jsonl")) {
    const KernelRow* const row = FindRow(one.tactic());
    if (row == nullptr) {
      continue;
    }
    const GemmShape shape = ShapeOf(one.spec, one.line["gemm"] == 1);
    const double us =
        EstimateMicroseconds(row->config, shape, RowSpread(one.tokens(), Chance(one.spec)));
    EXPECT_GT(us, 0.6 * one.us()) << one.line;
    EXPECT_LT(us, 1.7 * one.us()) << one.line;
    log_errors += std::abs(std::log(us / one.us()));
    ++compared;
  }
  ASSERT_GT(compared, 40);
  EXPECT_LT(log_errors / compared, 0.2);
}

// Where several rows were timed for one GEMM, the one that is estimated to be the fastest is not
// much slower than the one that was.
TEST(Cost, PicksAmongTimedRowsAGoodOne) {
  struct Timed {
    double estimated;
    double us;
    std::string tactic;
  };
  std::map<std::tuple<std::string, int, int64_t>, std::vector<Timed>> cases;
  for (const test::Measured& one : test::ReadMeasured("bench/results/h100/gemm.jsonl")) {
    const KernelRow* const row = FindRow(one.tactic());
    if (row != nullptr) {
      const int gemm = one.line["gemm"].get<int>();
      const double us = EstimateMicroseconds(row->config, ShapeOf(one.spec, gemm == 1),
                                             RowSpread(one.tokens(), Chance(one.spec)));
      cases[{one.name(), gemm, one.tokens()}].push_back({us, one.us(), one.tactic()});
    }
  }
  int compared = 0;
  double losses = 0.0;
  for (const auto& [key, timed] : cases) {
    if (timed.size() < 2) {
      continue;
    }
    const Timed& pick = *std::min_element(
        timed.begin(), timed.end(), [](auto& a, auto& b) { return a.estimated < b.estimated; });
    const Timed& best =
        *std::min_element(timed.begin(), timed.end(), [](auto& a, auto& b) { return a.us < b.us; });
    EXPECT_LT(pick.us, 1.2 * best.us)
        << std::get<0>(key) << " GEMM" << std::get<1>(key) << " T=" << std::get<2>(key) << ": "
        << pick.tactic << " takes " << pick.us << " us, " << best.tactic << ' ' << best.us;
    losses += pick.us / best.us - 1.0;
    ++compared;
  }
  ASSERT_GT(compared, 10);
  EXPECT_LT(losses / compared, 0.03);
}

}  // namespace
}  // namespace hopyard::gemm::sm90
