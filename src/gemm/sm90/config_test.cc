// SPDX-License-Identifier: Apache-2.0
// Every row of configs.def against the machine's limits, and the table against the formats: each
// pair that the spec allows has its kernels, in a full build and in the dev subset.
#include "gemm/sm90/config.h"

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "formats/format_rules.h"
#include "gemm/sm90/operands.h"
#include "gemm/sm90/rows.h"
#include "tests/inputs.h"

namespace hopyard::gemm::sm90 {
namespace {

using test::FormatPair;
using test::SupportedPairs;

TEST(Configs, RowsFitTheMachine) {
  for (const KernelRow& row : kConfigTable) {
    SCOPED_TRACE(row.name);
    EXPECT_TRUE(IsValid(row.config));
    // Of a multiprocessor: 228 KiB, of which the system keeps one per block, and 65536 registers.
    const int blocks = BlocksPerProcessor(row.config);
    EXPECT_LE(blocks * (SharedBytes(row.config) + 1024), 228 * 1024);
    const int registers =
        ProducerRegisters(row.config) + row.config.consumers * ConsumerRegisters(row.config);
    EXPECT_LE(blocks * 128 * registers, 65536);
    // Barriers, factors and staging keep their alignment behind the stages.
    EXPECT_EQ(TokenBytes(row.config) % 1024, 0);
    EXPECT_EQ(WeightBytes(row.config) % (row.config.packed ? 16 : 1024), 0);
    EXPECT_EQ(StagingBytes(row.config) % 16, 0);
    EXPECT_EQ(FactorBytes(row.config) % 8, 0);
  }
}

TEST(Configs, NamesAreDistinctAndTellTheTile) {
  std::set<std::string_view> names;
  for (const KernelRow& row : kConfigTable) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
    const std::string tile = "_m" + std::to_string(FeaturesPerBlock(row.config)) + 'n' +
                             std::to_string(row.config.tokens) + "_s" +
                             std::to_string(row.config.stages);
    EXPECT_NE(row.name.find(tile), std::string_view::npos) << row.name << ", wanted " << tile;
    EXPECT_EQ(row.name.find("_gated_") != std::string_view::npos, row.config.gated) << row.name;
  }
}

// What is compiled and tested stays within CI's time.
TEST(Configs, TheTableIsShort) {
  EXPECT_LE(std::size(kConfigTable), 150U);
}

// Tiles for which a kernel runs, among all rows or those of the dev subset.
std::set<int> Tiles(WeightFormat weights, const RowFormat& x, bool gated, bool dev) {
  std::set<int> tiles;
  for (int i = 0; i < NumKernels(); ++i) {
    const bool built = !dev || IsInDevSubset(kKernelRows[static_cast<size_t>(i)].config);
    if (built && Runs(i, weights, x, gated)) {
      tiles.insert(KernelAt(i).tokens);
    }
  }
  return tiles;
}

// Both GEMMs of a pass may take tiles of as many rows, which are then listed once.
void ExpectCommonTile(const FormatPair& pair, const LayerOperands& operands, bool gated, bool dev) {
  const std::set<int> gemm1 = Tiles(pair.weights, operands.x, gated, dev);
  const std::set<int> gemm2 = Tiles(pair.weights, operands.h, false, dev);
  EXPECT_TRUE(
      std::any_of(gemm1.begin(), gemm1.end(), [&](int tile) { return gemm2.contains(tile); }))
      << ToString(pair.weights) << " x " << ToString(pair.activations) << ", gated " << gated
      << ", dev subset " << dev << ": " << gemm1.size() << " tiles of GEMM1, " << gemm2.size()
      << " of GEMM2";
}

TEST(Configs, EveryPairHasBothGemmsWithACommonTile) {
  const std::vector<FormatPair> pairs = SupportedPairs();
  for (const WeightFormat weights : test::kWeightFormats) {
    for (const ActivationFormat activations : test::kActivationFormats) {
      const bool listed = std::any_of(pairs.begin(), pairs.end(), [&](const FormatPair& pair) {
        return pair.weights == weights && pair.activations == activations;
      });
      EXPECT_EQ(formats::IsSupportedPair(weights, activations), listed)
          << ToString(weights) << " x " << ToString(activations);
    }
  }
  for (const FormatPair& pair : pairs) {
    for (const bool dev : {false, true}) {
      const LayerOperands exact = OperandsOf(pair.weights, pair.activations);
      const LayerOperands rounded =
          RoundedOperandsOf(pair.weights, pair.activations).value_or(exact);
      for (const bool gated : {false, true}) {
        ExpectCommonTile(pair, exact, gated, dev);
        ExpectCommonTile(pair, rounded, gated, dev);
      }
    }
  }
}

// Whether the row runs a GEMM of a layer, exactly or, by name, rounding its operands.
bool RunsSomeLayer(int index) {
  for (const FormatPair& pair : SupportedPairs()) {
    const LayerOperands exact = OperandsOf(pair.weights, pair.activations);
    for (const LayerOperands& operands :
         {exact, RoundedOperandsOf(pair.weights, pair.activations).value_or(exact)}) {
      if (Runs(index, pair.weights, operands.x, true) ||
          Runs(index, pair.weights, operands.x, false) ||
          Runs(index, pair.weights, operands.h, false)) {
        return true;
      }
    }
  }
  return false;
}

TEST(Configs, NoRowIsWithoutALayer) {
  for (int i = 0; i < NumKernels(); ++i) {
    EXPECT_TRUE(RunsSomeLayer(i)) << KernelAt(i).name;
  }
}

// Plans do not know the order of the weights that calls will bring.
TEST(Configs, EveryBf16RowHasTwinsForMnMajorWeights) {
  std::set<int> twins;  // rows with clusters or parts of K have those of the row without
  for (int i = 0; i < NumKernels(); ++i) {
    const GemmConfig& config = kKernelRows[static_cast<size_t>(i)].config;
    for (const bool interleaved : {false, true}) {
      const int twin = MnMajorTwin(i, interleaved);
      const bool wanted =
          config.family == Family::kBf16 && !config.mn_major && (config.gated || !interleaved);
      ASSERT_EQ(twin >= 0, wanted) << KernelAt(i).name;
      if (wanted) {
        EXPECT_TRUE(KernelAt(twin).mn_major);
        EXPECT_EQ(KernelAt(twin).interleaved, interleaved);
        EXPECT_EQ(KernelAt(twin).tokens, KernelAt(i).tokens);
        EXPECT_EQ(KernelAt(twin).features, KernelAt(i).features);
        EXPECT_EQ(KernelAt(twin).gated, KernelAt(i).gated);
        twins.insert(twin);
      }
    }
  }
  for (int i = 0; i < NumKernels(); ++i) {
    EXPECT_EQ(twins.contains(i), KernelAt(i).mn_major) << KernelAt(i).name;
  }
}

// Nor whether they will be packed.
TEST(Configs, EveryRowOfPackableWeightsHasATwinForPackedOnes) {
  std::set<int> twins;
  for (int i = 0; i < NumKernels(); ++i) {
    const GemmConfig& config = kKernelRows[static_cast<size_t>(i)].config;
    const int twin = PackedTwin(i);
    const bool wanted =
        !config.packed &&
        (config.family == Family::kMxFp4AsBf16 || config.family == Family::kMxFp4AsFp8 ||
         (config.family == Family::kNvFp4AsBf16 && !config.promoted));
    ASSERT_EQ(twin >= 0, wanted) << KernelAt(i).name;
    if (wanted) {
      EXPECT_TRUE(KernelAt(twin).packed);
      EXPECT_EQ(KernelAt(twin).tokens, KernelAt(i).tokens);
      EXPECT_EQ(KernelAt(twin).cluster, KernelAt(i).cluster);
      EXPECT_EQ(KernelAt(twin).gated, KernelAt(i).gated);
      EXPECT_GE(KernelAt(twin).rounds, KernelAt(i).rounds);
      twins.insert(twin);
    }
  }
  for (int i = 0; i < NumKernels(); ++i) {
    EXPECT_EQ(twins.contains(i), KernelAt(i).packed) << KernelAt(i).name;
  }
}

// The layout of units is the kernels' own.
TEST(Configs, UnitsOfPackedWeightsAreWhatAConsumerReads) {
  for (const KernelRow& row : kConfigTable) {
    if (row.config.packed) {
      EXPECT_EQ(ConsumerWeightBytes(row.config), PackedUnitBytes(ScaleBytes(row.config.family)))
          << row.name;
      EXPECT_EQ(2 * kPackedHalfTileBytes, TileBytes(row.config)) << row.name;
    }
  }
}

// A feature of an interleaved tile has a row of its own, of the pair in which its columns lie.
TEST(Configs, InterleavedRowsKeepEveryFeatureOnce) {
  std::set<int> features;
  for (int row = 0; row < kTileRows; ++row) {
    EXPECT_EQ(FeatureOfRow(false, row), row);
    const int feature = FeatureOfRow(true, row);
    features.insert(feature);
    // Columns 2 f and 2 f + 1 of 128: in the first tile for even rows, else in the second.
    EXPECT_EQ(2 * feature / kTileRows, row % 2);
    EXPECT_EQ(2 * feature % kTileRows / 2, row / 2);
  }
  EXPECT_EQ(features.size(), size_t{kTileRows});
}

// A row nobody can run would only cost time.
TEST(Configs, EveryRowRunsSomePair) {
  const std::vector<FormatPair> pairs = SupportedPairs();
  for (int i = 0; i < NumKernels(); ++i) {
    const bool gated = KernelAt(i).gated;
    EXPECT_TRUE(std::any_of(pairs.begin(), pairs.end(), [&](const FormatPair& pair) {
      const LayerOperands exact = OperandsOf(pair.weights, pair.activations);
      const LayerOperands rounded =
          RoundedOperandsOf(pair.weights, pair.activations).value_or(exact);
      const RowFormat rows[] = {exact.x, exact.h, rounded.x, rounded.h};
      return std::any_of(std::begin(rows), std::end(rows),
                         [&](const RowFormat& x) { return Runs(i, pair.weights, x, gated); });
    })) << KernelAt(i).name;
  }
}

}  // namespace
}  // namespace hopyard::gemm::sm90
