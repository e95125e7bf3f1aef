// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/cost.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "core/shape.h"
#include "formats/format_rules.h"
#include "gemm/sm90/rows.h"

namespace hopyard::gemm::sm90 {
namespace {

// The machine: an H100 SXM, 2026-11. An H200 reads 1.5 times as fast; plans are the same there.
constexpr double kProcessors = 132.0;
constexpr double kCyclesPerUs = 1700.0;     // between 1980 MHz when idle and 1400 at 700 W
constexpr double kReadBytesPerUs = 3.16e6;  // cold, of bench/gpu.h
// Constants below were fitted to the lines of bench/results/h100 as they stood at a511f5a and to
// the pairs of times in docs/perf-notes.md, 300 cases of eleven layers and T = 1 .. 16384: the
// median error of a layer's time was 2 %, of nine tenths below 8 %. 23 of those were read off the
// notes rather than measured, and the fit was drawn to the kernels that had been taken. What is
// said of bench_gemm was set to 424 lines of 0787b56; cost_test compares those of gemm.jsonl.
// Those of packed weights were fitted on their own, to the 65 packed layers of forward.jsonl and to
// pairs of kernels and winners of src/tune/tables/h100.json, as they stood at 523e3c6. What
// OrderCost has, and what CostOf says of 4-bit weights that are not packed, was then moved until
// the model expected the least loss of its choices against those of 240 lines of forward.jsonl
// (523e3c6 and de61c7a): 0.3 % in the mean, 12 % at most.

// A kernel: launch, first reads, the last block's end.
constexpr double kKernelUs = 7.0;
constexpr double kMostRereads = 3.0;  // by then tiles of an expert keep each other company
// Adding up the sums of a part of K: through another block's shared memory. A guess.
constexpr double kPartCycles = 1500.0;
// Parts of K took so much more than the rest of the model says (bench_gemm, 11 GEMMs, T = 1 .. 16).
constexpr double kPartsMargin = 1.05;
// Clusters: what sharing weights saves of computing where tiles are BF16 (of 8 experts of 14336
// features 0.89 at T = 1024 and 0.96 at 16384, of 128 of 768 0.99 to 1.05 from T = 3584 on:
// gemm.jsonl, tune.jsonl), and what an empty tile that fills one up costs, of a full one. FP8
// clusters win as often as they lose, and empty tiles cost as much as full ones.
constexpr double kClusterGain = 0.97;
constexpr double kEmptyTile = 0.3;
// Two consumers on tiles of 16 and 32 rows decode as fast together as two blocks of one, but with
// fewer registers each: with fewer than some 700 blocks, of which the last ones find the
// multiprocessors half empty, they lose up to 15 % (bench_gemm, T = 8 .. 32).
constexpr double kManyBlocks = 700.0;
// A launch, and what bench_layer gives for rounding (docs/perf-notes.md).
constexpr double kRoundingUs = 1.5;
constexpr double kRoundingBytesPerUs = 2.6e6;

// What depends on whether a stage's weights come in one piece.
struct OrderCost {
  // Of the shorter of reading and computing so much is not hidden behind the other.
  double exposed;
  // Part of an expert's weights that each further tile reads again from memory: other blocks have
  // read them, but not always just before. With two consumers and tiles of 64 rows on: `large`.
  double reread;
  double reread_large;
  double few_blocks_margin;  // see kManyBlocks
  // By the number of blocks that share a multiprocessor, one to four: what they take beside one of
  // as many warpgroups, and how much later than two they begin.
  std::array<double, 5> neighbours;
  std::array<double, 5> start_us;
};
// Two blocks copy token rows twice: from 0.9 to 1.4 were seen of two-consumer rows where all blocks
// find room at once (T = 1 and 2). Four blocks of tiles of 16 with FP8 products took 0.98 to 1.03
// of the layer's time with two from T = 8 on (experiments.jsonl, H100), where fewer waits alone
// would make it 0.92 to 0.94. At T = 1 three and four took 1.00 to 1.03: a tenth of a microsecond a
// GEMM keeps the model off them. One large block fills its stages later.
constexpr OrderCost kNatural = {
    0.09, 0.045, 0.16, 1.075, {1.0, 1.0, 1.01, 1.026, 1.1}, {0.0, 1.3, 0.0, 0.05, 0.1}};
// The fit cannot tell why: less is hidden, and tiles beyond an expert's first cost more, of what
// takes less time altogether.
constexpr OrderCost kPacked = {
    0.26, 0.53, 0.5, 1.06, {1.0, 1.0, 1.0, 1.17, 1.11}, {0.0, 5.3, 0.0, 0.0, 0.0}};
constexpr const OrderCost& OrderCostOf(const GemmConfig& config) {
  return config.packed ? kPacked : kNatural;
}

// Cycles of a consumer warpgroup while two of them share a multiprocessor.
struct FamilyCost {
  double stage;   // decoding, issuing, waiting for a stage
  double column;  // of a stage, per token: products, adding up, the copies of the row
  double item;    // start and end of a work item
  // Part of the time that is waiting: it does not grow where more warpgroups share the
  // multiprocessor. The rest grows with their number.
  double waiting;
};

FamilyCost CostOf(const GemmConfig& config) {
  switch (config.family) {
    case Family::kBf16:
      return {305.0, 8.8, 850.0, 0.6};
    case Family::kFp8:
      // Where tokens are M, 1780 cycles a stage of 128 tokens were measured (docs/perf-notes.md).
      return config.tokens_are_m ? FamilyCost{1835.0, 0.0, 3230.0, 0.3}
                                 : FamilyCost{220.0, 13.9, 6140.0, 0.3};
    // Rows of these two have not been measured one against the other: as MXFP4, whose decoding is
    // as long.
    case Family::kFp8AsBf16:
    case Family::kMxFp8AsBf16:
    case Family::kMxFp4AsBf16:
      return config.packed ? FamilyCost{671.0, 15.7, 2760.0, 0.09}
                           : FamilyCost{1347.0, 14.7, 2790.0, 0.17};
    case Family::kNvFp4AsBf16:
    case Family::kMxInt4AsBf16:
      return config.packed ? FamilyCost{702.0, 17.4, 1790.0, 0.11}
                           : FamilyCost{1512.0, 12.1, 2900.0, 0.19};
    case Family::kMxFp4AsFp8:
    case Family::kNvFp4AsFp8:
      return config.packed ? FamilyCost{759.0, 13.5, 2190.0, 0.40}
                           : FamilyCost{972.0, 12.7, 4690.0, 0.15};
  }
  return {};
}

double BytesPerWeight(WeightFormat weights) {
  const formats::WeightFormatRule rule = formats::RuleOf(weights);
  const double code = static_cast<double>(SizeOf(rule.code_dtype)) / rule.codes_per_byte;
  const double scale = rule.scale_block > 0
                           ? static_cast<double>(SizeOf(rule.scale_dtype)) /
                                 static_cast<double>(rule.scale_block * rule.scale_block_rows)
                           : 0.0;
  return code + scale;
}

// Time of a warpgroup's work where `warpgroups` share the multiprocessor, over that with two.
double Slowdown(const FamilyCost& cost, double warpgroups) {
  return cost.waiting + (1.0 - cost.waiting) * warpgroups / 2.0;
}

// Work items that the busiest multiprocessor does one after the other, `places` at a time, of an
// average with a deviation. Up to one for every place they are spread evenly, though the number is
// a guess: a quarter above a whole one some multiprocessor has another. Beyond, the expected number
// of turns.
double ItemsOfBusiest(double average, double deviation, double places) {
  if (average <= 1.0) {
    return 1.0;
  }
  if (average <= places) {
    const auto everywhere = static_cast<double>(static_cast<int64_t>(average));
    return everywhere + std::min(1.0, 4.0 * (average - everywhere));
  }
  // Rounded up: one more than k wherever there are more than k. Spread evenly over three
  // deviations, near enough to the normal distribution, and every machine finds the same digits.
  const double reach = std::max(1.5 * deviation, 1e-3);
  const auto first = static_cast<int64_t>(std::max(0.0, average - reach));
  auto turns = static_cast<double>(first);
  for (int64_t k = first; static_cast<double>(k) < average + reach; ++k) {
    turns += std::min(1.0, (average + reach - static_cast<double>(k)) / (2.0 * reach));
  }
  return turns;
}

// Time of so many items on one multiprocessor, in those of an item with two warpgroups there.
double TurnsOf(const GemmConfig& config, const FamilyCost& cost, int64_t items) {
  const int64_t places = BlocksPerProcessor(config);
  const auto turn = [&](int64_t blocks) {
    return OrderCostOf(config).neighbours[static_cast<size_t>(blocks)] *
           Slowdown(cost, static_cast<double>(blocks * config.consumers));
  };
  const int64_t rounds = items / places;
  const int64_t left = items % places;
  return static_cast<double>(rounds) * turn(places) + (left > 0 ? turn(left) : 0.0);
}

// Cycles of a stage. In tiles of 128 rows no more than 64 of which are there, BF16 products are
// half as long, and where tokens are M one warpgroup does nothing.
double StageCycles(const GemmConfig& config, const FamilyCost& cost, const RowSpread& rows) {
  constexpr int kLarge = 128;
  const double filled =
      config.tokens == kLarge ? rows.Tiles(kLarge / 2) / (2.0 * rows.Tiles(kLarge)) : 1.0;
  return config.tokens_are_m ? cost.stage * (3.0 + filled) / 4.0
                             : cost.stage + cost.column * config.tokens * filled;
}

double ComputeMicroseconds(const GemmConfig& config, const GemmShape& shape, const RowSpread& rows,
                           double tiles) {
  const FamilyCost cost = CostOf(config);
  const double items =
      tiles *
      static_cast<double>(CeilDiv(shape.features, FeaturesPerBlock(config)) * config.k_parts);
  const double deviation =
      items / tiles *
      std::sqrt(static_cast<double>(shape.experts) * rows.TileVariance(config.tokens));
  const double busiest = ItemsOfBusiest(items / kProcessors, deviation / kProcessors,
                                        static_cast<double>(BlocksPerProcessor(config)));
  const auto whole = static_cast<int64_t>(busiest);
  const double part = busiest - static_cast<double>(whole);
  const double turns =
      TurnsOf(config, cost, whole) * (1.0 - part) + TurnsOf(config, cost, whole + 1) * part;
  // Of a block's part of K.
  const auto stages =
      static_cast<double>(CeilDiv(shape.k, int64_t{BlockK(config.family)} * config.k_parts));
  const double cycles =
      stages * StageCycles(config, cost, rows) + cost.item + kPartCycles * (config.k_parts - 1);
  return turns * cycles / kCyclesPerUs;
}

double ReadMicroseconds(const GemmConfig& config, const GemmShape& shape, const RowSpread& rows,
                        double tiles) {
  const auto experts = static_cast<double>(shape.experts);
  const double touched = experts * rows.touched();
  const double matrix = static_cast<double>(shape.features * (config.gated ? 2 : 1) * shape.k) *
                        BytesPerWeight(shape.weights);
  const OrderCost& order = OrderCostOf(config);
  const double reread = config.cluster > 1                            ? order.reread_large / 2.0
                        : config.consumers > 1 && config.tokens >= 64 ? order.reread_large
                                                                      : order.reread;
  const double further = std::clamp(tiles / touched - 1.0, 0.0, kMostRereads);
  const double out = experts * rows.average() * static_cast<double>(shape.features) * 2.0;
  return (touched * matrix * (1.0 + reread * further) + out) / kReadBytesPerUs;
}

}  // namespace

RowSpread::RowSpread(int64_t tokens, double chance)
    : average_(static_cast<double>(tokens) * chance) {
  if (chance >= 1.0) {
    first_ = tokens;
    above_ = {0.0};
    return;
  }
  // From the likeliest number of rows down and up, each from its neighbour, until they do not
  // matter; then their sum is 1.
  constexpr double kNegligible = 1e-12;
  const double odds = chance / (1.0 - chance);
  const auto likeliest =
      std::min(tokens, static_cast<int64_t>(static_cast<double>(tokens + 1) * chance));
  std::vector<double> below;
  double one = 1.0;
  for (int64_t x = likeliest; x > 0 && one > kNegligible; --x) {
    one *= static_cast<double>(x) / (static_cast<double>(tokens - x + 1) * odds);
    below.push_back(one);
  }
  std::vector<double> chances(below.rbegin(), below.rend());
  first_ = likeliest - static_cast<int64_t>(below.size());
  one = 1.0;
  for (int64_t x = likeliest; x <= tokens && one > kNegligible; ++x) {
    chances.push_back(one);
    one *= static_cast<double>(tokens - x) * odds / static_cast<double>(x + 1);
  }
  above_.assign(chances.size(), 0.0);
  double sum = 0.0;
  for (size_t i = chances.size(); i > 0; --i) {
    above_[i - 1] = sum;
    sum += chances[i - 1];
  }
  for (double& above : above_) {
    above /= sum;
  }
}

double RowSpread::Above(int64_t rows) const {
  if (rows < first_) {
    return 1.0;
  }
  const auto at = static_cast<size_t>(rows - first_);
  return at < above_.size() ? above_[at] : 0.0;
}

double RowSpread::Tiles(int64_t rows) const {
  // Tile t is there where an expert has more than t * rows rows.
  const int64_t sure = CeilDiv(first_, rows);
  auto tiles = static_cast<double>(sure);
  const int64_t last = first_ + static_cast<int64_t>(above_.size());
  for (int64_t begin = sure * rows; begin < last; begin += rows) {
    tiles += Above(begin);
  }
  return tiles;
}

double RowSpread::TileVariance(int64_t rows) const {
  const int64_t sure = CeilDiv(first_, rows);
  auto squares = static_cast<double>(sure * sure);
  const int64_t last = first_ + static_cast<int64_t>(above_.size());
  for (int64_t tile = sure; tile * rows < last; ++tile) {
    squares += static_cast<double>(2 * tile + 1) * Above(tile * rows);
  }
  const double average = Tiles(rows);
  return std::max(0.0, squares - average * average);
}

double EstimateMicroseconds(const GemmConfig& config, const GemmShape& shape,
                            const RowSpread& rows) {
  // Tiles come in whole clusters.
  const bool shared = config.cluster > 1 && config.family == Family::kBf16;
  const double whole =
      static_cast<double>(config.cluster) * rows.Tiles(int64_t{config.tokens} * config.cluster);
  const double full = shared ? rows.Tiles(config.tokens) : whole;
  const double tiles = static_cast<double>(shape.experts) * (full + kEmptyTile * (whole - full));
  const double compute =
      (shared ? kClusterGain : 1.0) * ComputeMicroseconds(config, shape, rows, tiles);
  const double read = ReadMicroseconds(config, shape, rows, tiles);
  const double items =
      tiles * static_cast<double>(CeilDiv(shape.features, FeaturesPerBlock(config)));
  const bool few = items > kProcessors && items < kManyBlocks;
  const OrderCost& order = OrderCostOf(config);
  const bool two = config.consumers == 2 && config.tokens <= 32;
  const double margin = config.k_parts > 1 ? kPartsMargin
                        : two && few       ? order.few_blocks_margin
                                           : 1.0;
  const double start = kKernelUs + order.start_us[static_cast<size_t>(BlocksPerProcessor(config))];
  return margin * (start + std::max(compute, read) + order.exposed * std::min(compute, read));
}

double EstimateMicroseconds(int index, const GemmShape& shape, const RowSpread& rows) {
  const int twin = shape.packed ? PackedTwin(index) : -1;
  return EstimateMicroseconds(kKernelRows[static_cast<size_t>(twin < 0 ? index : twin)].config,
                              shape, rows);
}

double EstimateRounding(double rows, int64_t cols) {
  // BF16 in, codes out.
  return kRoundingUs + rows * static_cast<double>(cols) * 3.0 / kRoundingBytesPerUs;
}

}  // namespace hopyard::gemm::sm90
