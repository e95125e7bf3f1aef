// SPDX-License-Identifier: Apache-2.0
// The ways in which experts are named, skipped, kept local and shared.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"
#include "hopyard/routing.h"

#include "formats/codes.h"
#include "stages/layer_ref.h"
#include "tests/forward_runner.h"

namespace hopyard::test {
namespace {

struct Layer {
  explicit Layer(const MoeSpec& spec)
      : source(SourceOf(spec)), storage(source), weights(storage.Make()) {}
  static WeightSource SourceOf(const MoeSpec& spec) {
    WeightSource source;
    source.spec = spec;
    return source;
  }
  [[nodiscard]] const MoeSpec& spec() const { return source.spec; }
  [[nodiscard]] RunResult Run(const LayerInputs& inputs, const RunOptions& options = {}) const {
    return RunLayer(spec(), weights, inputs.get(), options);
  }
  [[nodiscard]] ::testing::AssertionResult Judge(const LayerInputs& inputs,
                                                 const RunResult& result) const {
    return MatchesOracle(spec(), weights, inputs.get(), result);
  }

  WeightSource source;
  LayerWeights storage;
  Weights weights;
};

MoeSpec PlainSpec() {
  MoeSpec spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  spec.hidden_size = 64;
  spec.intermediate_size = 48;
  return spec;
}

// Slots that report a local row, and the rows of each expert.
int64_t CountLocal(const RunResult& result) {
  return std::count_if(result.slot_to_row.begin(), result.slot_to_row.end(),
                       [](int32_t row) { return row >= 0; });
}

bool AllZero(const std::vector<uint16_t>& output, int64_t begin, int64_t count) {
  return std::all_of(output.begin() + begin, output.begin() + begin + count,
                     [](uint16_t bits) { return bits == 0; });
}

class ForwardIds : public ::testing::TestWithParam<IdPattern> {};

TEST_P(ForwardIds, UnpackedPackedAndBf16WeightsMatchOracle) {
  const Layer layer(PlainSpec());
  constexpr int64_t kTokens = 13;
  const std::vector<int32_t> ids = MakeIds(GetParam(), layer.spec(), kTokens);
  const std::vector<float> weights = MakeWeights(layer.spec(), kTokens);
  LayerInputs unpacked(layer.spec(), kTokens);
  unpacked.Unpacked(ids, weights);
  LayerInputs unpacked_bf16(layer.spec(), kTokens);
  unpacked_bf16.Unpacked(ids, weights, DType::kBf16);
  const RunResult f32 = layer.Run(unpacked);
  const RunResult bf16 = layer.Run(unpacked_bf16);
  if (GetParam() == IdPattern::kAllInvalid) {
    EXPECT_TRUE(AllZero(f32.output, 0, static_cast<int64_t>(f32.output.size())));
    EXPECT_EQ(CountLocal(f32), 0);
  } else {
    EXPECT_TRUE(layer.Judge(unpacked, f32));
    EXPECT_TRUE(layer.Judge(unpacked_bf16, bf16));
  }
  // Packed ids hold 16 bits: what does not fit is another invalid id.
  std::vector<int32_t> narrow = ids;
  for (int32_t& id : narrow) {
    id = id == static_cast<int16_t>(id) ? id : -1;
  }
  LayerInputs packed(layer.spec(), kTokens);
  packed.Packed(narrow, weights);
  EXPECT_TRUE(SameBits(layer.Run(packed).output, bf16.output));
}

TEST_P(ForwardIds, IdsReplayAndLoadAreThoseGiven) {
  const Layer layer(PlainSpec());
  constexpr int64_t kTokens = 11;
  std::vector<int32_t> ids = MakeIds(GetParam(), layer.spec(), kTokens);
  LayerInputs inputs(layer.spec(), kTokens);
  inputs.Unpacked(ids, MakeWeights(layer.spec(), kTokens));
  const RunResult result = layer.Run(inputs);
  std::vector<int32_t> load(static_cast<size_t>(layer.spec().num_experts), 0);
  for (size_t i = 0; i < ids.size(); ++i) {
    const bool valid = ids[i] >= 0 && ids[i] < layer.spec().num_experts;
    ids[i] = valid ? ids[i] : -1;
    if (valid) {
      ++load[static_cast<size_t>(ids[i])];
    } else {
      EXPECT_EQ(result.weights[i], 0.0F);
    }
    EXPECT_EQ(result.replay[i], ids[i]);
  }
  EXPECT_TRUE(SameBits(result.ids, ids));
  EXPECT_TRUE(SameBits(result.load, load));
  for (size_t i = ids.size(); i < result.replay.size(); ++i) {
    EXPECT_EQ(result.replay[i], -1) << "rows beyond the tokens are untouched";
  }
}

INSTANTIATE_TEST_SUITE_P(Patterns, ForwardIds, ::testing::ValuesIn(kAllIdPatterns),
                         [](const auto& test) { return ToString(test.param); });

TEST(ForwardRouting, NegativePackedWeightsKeepTheirIds) {
  const Layer layer(PlainSpec());
  std::vector<float> weights = MakeWeights(layer.spec(), 6);
  for (size_t i = 0; i < weights.size(); i += 2) {
    weights[i] = -weights[i];
  }
  const std::vector<int32_t> ids = MakeIds(IdPattern::kRandom, layer.spec(), 6);
  LayerInputs inputs(layer.spec(), 6);
  inputs.Packed(ids, weights);
  const RunResult result = layer.Run(inputs);
  EXPECT_TRUE(SameBits(result.ids, ids));
  for (size_t i = 0; i < weights.size(); ++i) {
    EXPECT_EQ(result.weights[i], formats::RoundToBf16(weights[i]));
  }
  EXPECT_TRUE(layer.Judge(inputs, result));
}

std::vector<RoutingRule> Rules() {
  return {RoutingRule::Default(),
          RoutingRule::Renormalize(),
          RoutingRule::TopK(),
          RoutingRule::SigmoidRenorm(),
          RoutingRule::MiniMax2(1.5F),
          RoutingRule::Sigmoid(),
          RoutingRule::TopKSigmoid(),
          RoutingRule::SqrtSoftplus(2.0F),
          RoutingRule::DeepSeekV3(4, 2, 2.5F)};
}

TEST(ForwardRouting, EveryRuleMatchesOracleAndTheStandAloneRoute) {
  for (const RoutingRule& rule : Rules()) {
    for (const DType dtype : {DType::kFloat32, DType::kBf16}) {
      MoeSpec spec = PlainSpec();
      spec.routing = rule;
      const Layer layer(spec);
      LayerInputs inputs(spec, 9);
      inputs.Logits(dtype);
      if (rule.use_bias) {
        inputs.RoutingBias();
      }
      const RunResult result = layer.Run(inputs);
      EXPECT_TRUE(layer.Judge(inputs, result)) << ToString(rule);
      RouteInputs route;
      route.logits = inputs.get().logits;
      route.bias = inputs.get().routing_bias;
      std::vector<int32_t> ids(18);
      std::vector<float> weights(18);
      RouteOutputs out;
      out.expert_ids = TensorView::Contiguous(ids.data(), DType::kInt32, {9, 2});
      out.weights = TensorView::Contiguous(weights.data(), DType::kFloat32, {9, 2});
      Route(rule, spec.top_k, route, out);
      EXPECT_TRUE(SameBits(result.ids, ids)) << ToString(rule);
      EXPECT_TRUE(SameBits(result.weights, weights)) << ToString(rule);
    }
  }
}

TEST(ForwardRouting, TopKOfOneAndOfEveryExpert) {
  for (const int top_k : {1, 8}) {
    MoeSpec spec = PlainSpec();
    spec.top_k = top_k;
    const Layer layer(spec);
    LayerInputs inputs(spec, 5);
    inputs.Logits();
    EXPECT_TRUE(layer.Judge(inputs, layer.Run(inputs))) << "top " << top_k;
  }
}

TEST(ForwardRouting, ReplayedIdsGiveTheOriginalBits) {
  for (const RoutingRule& rule : Rules()) {
    MoeSpec spec = PlainSpec();
    spec.routing = rule;
    const Layer layer(spec);
    LayerInputs inputs(spec, 12);
    inputs.Logits();
    const RunResult original = layer.Run(inputs);
    std::vector<int32_t> ids(original.replay.begin(), original.replay.begin() + 24);
    for (const DType dtype : {DType::kInt16, DType::kInt32}) {
      inputs.Replay(ids, dtype);
      const RunResult replayed = layer.Run(inputs);
      EXPECT_TRUE(SameBits(replayed.output, original.output)) << ToString(rule);
      EXPECT_TRUE(SameBits(replayed.weights, original.weights)) << ToString(rule);
    }
    ids[5] = -1;  // and a skipped slot is skipped
    inputs.Replay(ids, DType::kInt32);
    const RunResult skipped = layer.Run(inputs);
    EXPECT_EQ(skipped.ids[5], -1);
    EXPECT_TRUE(layer.Judge(inputs, skipped)) << ToString(rule);
  }
}

TEST(ForwardRouting, HashTableNamesTheExperts) {
  MoeSpec spec = PlainSpec();
  spec.routing = RoutingRule::SqrtSoftplus(1.5F);
  const Layer layer(spec);
  LayerInputs inputs(spec, 10);
  inputs.Logits().HashTable(37);
  inputs.get().token_ids.as<int64_t>()[3] = 37;  // outside the table: every slot is skipped
  inputs.get().token_ids.as<int64_t>()[4] = -1;
  const RunResult result = layer.Run(inputs);
  EXPECT_TRUE(layer.Judge(inputs, result));
  EXPECT_TRUE(AllZero(result.output, 3 * spec.hidden_size, 2 * spec.hidden_size));
  const auto* table = inputs.get().token_to_experts.as<const int32_t>();
  const int64_t row = inputs.get().token_ids.as<int64_t>()[0];
  const std::multiset<int32_t> wanted(table + row * 2, table + row * 2 + 2);
  EXPECT_EQ(std::multiset<int32_t>(result.ids.begin(), result.ids.begin() + 2), wanted);
}

TEST(ForwardRouting, ANanLogitSpoilsItsOwnTokenOnly) {
  const Layer layer(PlainSpec());
  LayerInputs inputs(layer.spec(), 8);
  inputs.Logits();
  const RunResult clean = layer.Run(inputs);
  auto* logits = inputs.get().logits.as<float>();
  logits[3 * 8 + 2] = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(logits + 5 * 8, 8, std::numeric_limits<float>::quiet_NaN());
  const RunResult spoilt = layer.Run(inputs);
  const int64_t hidden = layer.spec().hidden_size;
  for (int64_t t = 0; t < 8; ++t) {
    const auto first = static_cast<size_t>(t * 2);
    EXPECT_NE(spoilt.ids[first], spoilt.ids[first + 1]);
    EXPECT_GE(*std::min_element(spoilt.ids.begin() + t * 2, spoilt.ids.begin() + t * 2 + 2), 0);
    EXPECT_LT(*std::max_element(spoilt.ids.begin() + t * 2, spoilt.ids.begin() + t * 2 + 2), 8);
    const std::vector<uint16_t> got(spoilt.output.begin() + t * hidden,
                                    spoilt.output.begin() + (t + 1) * hidden);
    if (t == 3 || t == 5) {
      EXPECT_TRUE(std::isnan(FromBf16(got)[0]));
      continue;
    }
    EXPECT_TRUE(SameBits(
        got, {clean.output.begin() + t * hidden, clean.output.begin() + (t + 1) * hidden}));
  }
}

TEST(ForwardRouting, RouterWeightOnInputMatchesOracle) {
  for (const FormatPair pair : {FormatPair{WeightFormat::kBf16, ActivationFormat::kBf16},
                                FormatPair{WeightFormat::kMxFp8, ActivationFormat::kMxFp8}}) {
    WeightSource source;
    source.spec = SmallSpec(pair.weights, pair.activations);
    source.spec.router_weight_on_input = true;
    source.spec.routing = RoutingRule::TopKSigmoid();
    source.bias = true;
    const LayerWeights storage(source);
    LayerInputs inputs(source.spec, 6);
    inputs.Logits();
    const RunResult result = RunLayer(source.spec, storage.Make(), inputs.get());
    EXPECT_TRUE(MatchesOracle(source.spec, storage.Make(), inputs.get(), result));
    MoeSpec usual = source.spec;
    usual.router_weight_on_input = false;
    EXPECT_FALSE(MatchesOracle(usual, storage.Make(), inputs.get(), result));
  }
}

TEST(ForwardRouting, SharedExpertsMatchOracle) {
  struct Case {
    WeightFormat routed;
    WeightFormat shared;
    ActivationFormat activations;
  };
  for (const Case& c :
       {Case{WeightFormat::kBf16, WeightFormat::kBf16, ActivationFormat::kBf16},
        Case{WeightFormat::kMxFp4, WeightFormat::kBf16, ActivationFormat::kBf16},
        Case{WeightFormat::kMxFp4, WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128}}) {
    for (const bool per_token : {false, true}) {
      WeightSource source;
      source.spec = SmallSpec(c.routed, c.activations);
      source.spec.shared = {2, per_token, 0.75F, c.shared};
      source.spec.activation.limit.each = {1, 2, 3, 1, 2, 3, 1, 2};
      source.bias = true;
      const LayerWeights storage(source);
      LayerInputs inputs(source.spec, 5);
      inputs.Logits();
      if (per_token) {
        inputs.SharedWeights(DType::kBf16);
      }
      const RunResult result = RunLayer(source.spec, storage.Make(), inputs.get());
      EXPECT_TRUE(MatchesOracle(source.spec, storage.Make(), inputs.get(), result));
      for (size_t t = 0; t < 5; ++t) {
        EXPECT_EQ(result.ids[t * 4 + 2], 8);
        EXPECT_EQ(result.ids[t * 4 + 3], 9);
      }
    }
  }
}

// Sums the outputs of several ranks as the caller's all-reduce would.
struct RankSum {
  std::vector<double> values;
  void Add(const std::vector<uint16_t>& output) {
    const std::vector<double> part = FromBf16(output);
    values.resize(part.size(), 0.0);
    for (size_t i = 0; i < part.size(); ++i) {
      values[i] += part[i];
    }
  }
};

::testing::AssertionResult SumIsWhole(const Layer& whole, const LayerInputs& inputs,
                                      const RankSum& sum) {
  ref::LayerRefOptions options;
  const ref::LayerRefPair pair =
      ref::LayerRefBoth(whole.spec(), whole.weights, inputs.get(), 0, options);
  Judged judged{sum.values, pair.exact.output, pair.plain.output, whole.spec().hidden_size};
  return Accurate(judged, ToleranceOf(whole.spec().activations));
}

TEST(ForwardRouting, ExpertRangesSumToTheWhole) {
  const Layer whole(PlainSpec());
  constexpr int64_t kTokens = 16;
  LayerInputs inputs(whole.spec(), kTokens);
  inputs.Logits();
  const RunResult all = whole.Run(inputs);
  RankSum sum;
  int64_t zero_tokens = 0;
  for (const ExpertMap map :
       {ExpertMap{ExpertMap::Kind::kRange, 0, 3}, ExpertMap{ExpertMap::Kind::kRange, 3, 1},
        ExpertMap{ExpertMap::Kind::kRange, 4, 4}}) {
    MoeSpec spec = whole.spec();
    spec.local = map;
    const Layer rank(spec);
    const RunResult part = rank.Run(inputs);
    EXPECT_TRUE(SameBits(part.ids, all.ids)) << "ids stay global";
    EXPECT_TRUE(SameBits(part.weights, all.weights)) << "weights are those of all experts";
    EXPECT_TRUE(SameBits(part.load, all.load));
    for (int64_t t = 0; t < kTokens; ++t) {
      const auto is_local = [&](int32_t id) {
        return id >= map.offset && id < map.offset + map.count;
      };
      if (std::none_of(part.ids.begin() + t * 2, part.ids.begin() + t * 2 + 2, is_local)) {
        EXPECT_TRUE(AllZero(part.output, t * spec.hidden_size, spec.hidden_size));
        ++zero_tokens;
      }
    }
    sum.Add(part.output);
  }
  EXPECT_GT(zero_tokens, 0);
  EXPECT_TRUE(SumIsWhole(whole, inputs, sum));
}

// Two ranks of five slots hold eight experts, moved about; expert 3 exists twice, and each rank's
// table says who serves it.
TEST(ForwardRouting, ExpertTablesWithMovedAndCopiedExpertsSumToTheWhole) {
  const Layer whole(PlainSpec());
  LayerInputs inputs(whole.spec(), 16);
  inputs.Logits();
  struct Rank {
    std::vector<int> slots;      // logical expert in each slot
    std::vector<int32_t> table;  // logical -> slot
  };
  const std::vector<Rank> ranks = {
      {{6, 3, 0, 1, 3}, {2, 3, -1, 4, -1, -1, 0, -1}},
      {{7, 5, 4, 2, 3}, {-1, -1, 3, 5, 2, 1, std::numeric_limits<int32_t>::min(), 0}}};
  RankSum sum;
  for (const Rank& rank : ranks) {
    WeightSource source;
    source.spec = whole.spec();
    source.spec.local = {ExpertMap::Kind::kTable, 0, 5};
    source.experts = rank.slots;
    const LayerWeights storage(source);
    inputs.ExpertTable(rank.table);
    const RunResult part = RunLayer(source.spec, storage.Make(), inputs.get());
    sum.Add(part.output);
  }
  inputs.mutable_inputs()->expert_table = {};
  EXPECT_TRUE(SumIsWhole(whole, inputs, sum));
}

}  // namespace
}  // namespace hopyard::test
