// SPDX-License-Identifier: Apache-2.0
// Shared experts beside every kind of expert map, routing rule and weight, judged by the oracle.
#include <cstdint>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "tests/layer.h"

namespace hopyard::test {
namespace {

constexpr int64_t kTokens = 7;
constexpr int kShared = 2;

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

enum class WeightOf : uint8_t { kConstant, kTokenF32, kTokenBf16 };

struct Rule {
  const char* name;
  RoutingRule rule;
  int top_k;

  friend std::ostream& operator<<(std::ostream& out, const Rule& rule) { return out << rule.name; }
};

const std::vector<Rule>& Rules() {
  static const std::vector<Rule> rules = {
      {"DeepSeekGrouped", RoutingRule::DeepSeekV3(4, 2, 2.5F), 2},
      {"DeepSeekUngrouped", RoutingRule::DeepSeekV3(1, 1, 2.5F), 3},
      {"MiniMax2", RoutingRule::MiniMax2(1.5F), 2},
      {"Llama4", RoutingRule::Llama4(), 1},
      {"Renormalize", RoutingRule::Renormalize(), 2},
  };
  return rules;
}

// A rank of the layer: all experts, a range of them, or a table that moves and copies them.
struct Rank {
  const char* name;
  ExpertMap map;
  std::vector<int> slots;
  std::vector<int32_t> table;

  friend std::ostream& operator<<(std::ostream& out, const Rank& rank) { return out << rank.name; }
};

const std::vector<Rank>& Ranks() {
  static const std::vector<Rank> ranks = {
      {"All", {}, {}, {}},
      {"Range", {ExpertMap::Kind::kRange, 3, 4}, {}, {}},
      {"Table", {ExpertMap::Kind::kTable, 0, 4}, {6, 1, 6, 0}, {3, 1, -1, -1, -1, -1, 2, -1}},
  };
  return ranks;
}

class ForwardShared : public ::testing::TestWithParam<std::tuple<Rule, Rank, WeightOf>> {
 protected:
  static WeightSource Source(const FormatPair& pair = {},
                             WeightFormat shared = WeightFormat::kBf16) {
    const auto& [rule, rank, weight] = GetParam();
    WeightSource source;
    source.spec = MiniSpec(pair);
    source.spec.routing = rule.rule;
    source.spec.top_k = rule.top_k;
    source.spec.local = rank.map;
    source.spec.shared = {kShared, weight != WeightOf::kConstant, 0.75F, shared};
    source.spec.activation.limit.all = 1.5F;
    source.experts = rank.slots;
    source.bias = true;
    return source;
  }
  static LayerInputs Inputs(const MoeSpec& spec) {
    const auto& [rule, rank, weight] = GetParam();
    LayerInputs inputs(spec, kTokens);
    inputs.Logits();
    if (rule.rule.use_bias) {
      inputs.RoutingBias();
    }
    if (!rank.table.empty()) {
      inputs.ExpertTable(rank.table);
    }
    if (spec.shared.per_token_weight) {
      inputs.SharedWeights(weight == WeightOf::kTokenF32 ? DType::kFloat32 : DType::kBf16);
    }
    return inputs;
  }
};

TEST_P(ForwardShared, MatchesOracleInEveryMixOfFormats) {
  struct Mix {
    FormatPair pair;
    WeightFormat shared;
  };
  using W = WeightFormat;
  using A = ActivationFormat;
  for (const Mix& mix :
       {Mix{{W::kBf16, A::kBf16}, W::kBf16}, Mix{{W::kMxFp4, A::kMxFp8}, W::kMxFp8},
        Mix{{W::kNvFp4, A::kNvFp4}, W::kNvFp4},
        Mix{{W::kFp8Block128, A::kFp8Block128}, W::kFp8Block128}}) {
    const TestLayer layer(Source(mix.pair, mix.shared));
    const LayerInputs inputs = Inputs(layer.spec());
    EXPECT_TRUE(layer.RunAndJudge(inputs)) << ToString(mix.pair);
  }
}

// Replay, ids, weights and counters of the routed slots are those of the layer without them.
TEST_P(ForwardShared, RoutedSlotsAreThoseWithoutSharedExperts) {
  WeightSource source = Source();
  const TestLayer layer(source);
  const RunResult got = layer.Run(Inputs(source.spec));
  source.spec.shared = {};
  const TestLayer routed_only(source);
  const RunResult wanted = routed_only.Run(Inputs(source.spec));
  EXPECT_TRUE(SameBits(got.replay, wanted.replay));
  EXPECT_TRUE(SameBits(got.load, wanted.load));
  const int64_t top_k = source.spec.top_k;
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t first = t * (top_k + kShared);
    for (int64_t k = 0; k < top_k; ++k) {
      EXPECT_EQ(got.ids[Index(first + k)], wanted.ids[Index(t * top_k + k)]);
      EXPECT_EQ(got.weights[Index(first + k)], wanted.weights[Index(t * top_k + k)]);
    }
    for (int64_t j = 0; j < kShared; ++j) {
      EXPECT_EQ(got.ids[Index(first + top_k + j)], source.spec.num_experts + j);
      EXPECT_GE(got.slot_to_row[Index(first + top_k + j)], 0) << "shared experts are local";
    }
  }
}

// The oracle sees a wrong weight of a shared expert, and a missing one.
TEST_P(ForwardShared, TheOracleRejectsOtherSharedExperts) {
  const TestLayer layer(Source());
  LayerInputs inputs = Inputs(layer.spec());
  const RunResult result = layer.Run(inputs);
  ASSERT_TRUE(layer.Judge(inputs, result));
  MoeSpec heavier = layer.spec();
  heavier.shared.per_token_weight = false;
  heavier.shared.weight = 1.0F;
  MoeInputs constant = inputs.get();
  constant.shared_weights = {};
  EXPECT_FALSE(MatchesOracle(heavier, layer.weights(), constant, result));
  heavier.shared.weight = 0.0F;
  EXPECT_FALSE(MatchesOracle(heavier, layer.weights(), constant, result));
}

std::string SharedName(const ::testing::TestParamInfo<ForwardShared::ParamType>& test) {
  constexpr const char* kWeights[] = {"_Constant", "_TokenF32", "_TokenBf16"};
  return std::string(std::get<0>(test.param).name) + "_" + std::get<1>(test.param).name +
         kWeights[static_cast<int>(std::get<2>(test.param))];
}

INSTANTIATE_TEST_SUITE_P(Ranks, ForwardShared,
                         ::testing::Combine(::testing::ValuesIn(Rules()),
                                            ::testing::ValuesIn(Ranks()),
                                            ::testing::Values(WeightOf::kConstant,
                                                              WeightOf::kTokenF32,
                                                              WeightOf::kTokenBf16)),
                         SharedName);

}  // namespace
}  // namespace hopyard::test
