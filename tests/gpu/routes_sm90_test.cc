// SPDX-License-Identifier: Apache-2.0
// The ways in which experts are named, kept local and shared, on a GPU.
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/mixed_tactics.h"
#include "tests/gpu/runner_sm90.h"

namespace hopyard::test {
namespace {

constexpr int64_t kTokens = 37;

MoeSpec PlainSpec() {
  return SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
}

class GpuIds : public ::testing::TestWithParam<IdPattern> {};

TEST_P(GpuIds, GivenIdsMatchTheCpu) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(PlainSpec()));
  const std::vector<int32_t> ids = MakeIds(GetParam(), layer.spec(), kTokens);
  const std::vector<float> weights = MakeWeights(layer.spec(), kTokens);
  const bool none = GetParam() == IdPattern::kAllInvalid;
  const auto judge = [&](const LayerInputs& inputs, const RunOptions& options) {
    const RunResult got = layer.Run(inputs, options);
    if (none) {
      EXPECT_TRUE(SameBits(got.output, std::vector<uint16_t>(got.output.size(), 0)));
    } else {
      layer.Judge(inputs, got, options);
    }
  };
  RunOptions wide;
  wide.load_dtype = DType::kInt64;
  if (!none) {  // 16 bits turn some of these into valid ones
    LayerInputs packed(layer.spec(), kTokens);
    judge(packed.Packed(ids, weights), {});
  }
  LayerInputs unpacked(layer.spec(), kTokens);
  judge(unpacked.Unpacked(ids, weights), wide);
  LayerInputs unpacked_bf16(layer.spec(), kTokens);
  judge(unpacked_bf16.Unpacked(ids, weights, DType::kBf16), {});
  for (const DType dtype : {DType::kInt16, DType::kInt32}) {
    if ((none || GetParam() == IdPattern::kSomeInvalid) && dtype == DType::kInt16) {
      continue;  // some of them need 32 bits
    }
    LayerInputs replay(layer.spec(), kTokens);
    judge(replay.Logits().Replay(ids, dtype), wide);
  }
}

INSTANTIATE_TEST_SUITE_P(Patterns, GpuIds, ::testing::ValuesIn(kAllIdPatterns),
                         [](const auto& test) { return ToString(test.param); });

TEST(GpuRoutes, HashTableNamesTheExperts) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(PlainSpec()));
  LayerInputs inputs(layer.spec(), kTokens);
  layer.RunAndJudge(inputs.Logits().HashTable(11));
}

TEST(GpuRoutes, EveryRuleMatchesTheCpu) {
  HOPYARD_NEEDS_GPU();
  for (const RoutingRule& rule :
       {RoutingRule::Default(), RoutingRule::Renormalize(), RoutingRule::DeepSeekV3(4, 2, 2.5F),
        RoutingRule::Llama4(), RoutingRule::TopK(), RoutingRule::SigmoidRenorm(),
        RoutingRule::MiniMax2(1.5F), RoutingRule::SqrtSoftplus(1.5F)}) {
    MoeSpec spec = PlainSpec();
    spec.routing = rule;
    TwinLayer layer(SourceOf(spec));
    LayerInputs inputs(spec, kTokens);
    inputs.Logits();
    if (rule.use_bias) {
      inputs.RoutingBias();
    }
    SCOPED_TRACE(ToString(rule));
    layer.RunAndJudge(inputs);
  }
}

TEST(GpuRoutes, TokensGoToOneExpertOrToAllOfThem) {
  HOPYARD_NEEDS_GPU();
  MoeSpec spec = PlainSpec();
  for (const int top_k : {1, spec.num_experts}) {
    spec.top_k = top_k;
    TwinLayer layer(SourceOf(spec));
    // Of one tile, of a whole one, of more, and past what one launch routes and permutes.
    for (const int64_t tokens : {15, 16, 17, 33, 257}) {
      LayerInputs inputs(spec, tokens);
      SCOPED_TRACE(std::to_string(tokens) + " tokens, top " + std::to_string(top_k));
      layer.RunAndJudge(inputs.Logits(), {}, {0, tokens / 2, tokens - 1});
    }
  }
}

// A rank of the layer: all experts, a range of them, or a table that moves and copies them.
struct Rank {
  const char* name;
  ExpertMap map;
  std::vector<int> slots;
  std::vector<int32_t> table;
};

std::vector<Rank> Ranks() {
  return {{"All", {}, {}, {}},
          {"Range", {ExpertMap::Kind::kRange, 3, 4}, {}, {}},
          {"Table", {ExpertMap::Kind::kTable, 0, 4}, {6, 1, 6, 0}, {3, 1, -1, -1, -1, -1, 2, -1}}};
}

// What shared experts add to a pair: their own format, which may want other operands.
struct Mix {
  FormatPair pair;
  WeightFormat shared;
};

std::vector<Mix> Mixes() {
  using W = WeightFormat;
  using A = ActivationFormat;
  std::vector<Mix> mixes;
  for (const FormatPair& pair : SupportedPairs()) {
    mixes.push_back({pair, pair.weights});
  }
  const std::vector<Mix> others = {{{W::kBf16, A::kBf16}, W::kMxFp4},
                                   {{W::kMxFp4, A::kBf16}, W::kBf16},
                                   {{W::kMxFp4, A::kMxFp8}, W::kMxFp8},
                                   {{W::kMxFp4, A::kFp8Block128}, W::kFp8Block128},
                                   {{W::kMxFp4, A::kFp8PerTensor}, W::kFp8PerTensor},
                                   {{W::kFp8PerChannel, A::kFp8PerToken}, W::kMxFp4},
                                   {{W::kNvFp4, A::kFp8PerToken}, W::kFp8PerTensor}};
  mixes.insert(mixes.end(), others.begin(), others.end());
  return mixes;
}

class GpuShared : public ::testing::TestWithParam<Mix> {};

TEST_P(GpuShared, EveryRankMatchesOracle) {
  HOPYARD_NEEDS_GPU();
  for (const Rank& rank : Ranks()) {
    for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kRelu2}) {
      MoeSpec spec = SmallSpec(GetParam().pair.weights, GetParam().pair.activations);
      spec.local = rank.map;
      spec.shared = {2, kind == ActivationKind::kSwiGlu, 0.75F, GetParam().shared};
      spec.activation.kind = kind;
      WeightSource source = SourceOf(spec);
      source.experts = rank.slots;
      TwinLayer layer(source);
      LayerInputs inputs(spec, kTokens);
      inputs.Logits();
      if (!rank.table.empty()) {
        inputs.ExpertTable(rank.table);
      }
      if (spec.shared.per_token_weight) {
        inputs.SharedWeights(rank.table.empty() ? DType::kFloat32 : DType::kBf16);
      }
      SCOPED_TRACE(std::string(rank.name) + " " + std::string(ToString(kind)));
      layer.RunAndJudge(inputs);
    }
  }
}

// Routed and shared experts share the tiles of a GEMM, whose kernels may want clusters or not.
TEST_P(GpuShared, MixedTilesMatchOracle) {
  HOPYARD_NEEDS_GPU();
  MoeSpec spec = SmallSpec(GetParam().pair.weights, GetParam().pair.activations);
  spec.shared = {2, true, 0.75F, GetParam().shared};
  const std::vector<std::string> tactics = MixedTactics(spec);
  if (tactics.empty()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  TwinLayer layer(SourceOf(spec));
  LayerInputs inputs(spec, 300);
  inputs.Logits().SharedWeights(DType::kFloat32);
  const RunResult plain = layer.Run(inputs);
  for (const std::string& tactic : tactics) {
    RunOptions options;
    options.plan.tactic = tactic;
    const RunResult got = layer.Run(inputs, options);
    SCOPED_TRACE(tactic);
    EXPECT_TRUE(SameBits(got.slot_to_row, plain.slot_to_row));
    EXPECT_TRUE(MatchesOracle(spec, layer.cpu(), inputs.get(), got, {0, 150, 299}));
  }
}

INSTANTIATE_TEST_SUITE_P(Mixes, GpuShared, ::testing::ValuesIn(Mixes()), [](const auto& test) {
  return ToString(test.param.pair) + "_and_" + std::string(ToString(test.param.shared));
});

// A rank on which nothing is local gives exact zeros.
TEST(GpuRoutes, ARankWithoutATokensExpertsGivesZeros) {
  HOPYARD_NEEDS_GPU();
  MoeSpec spec = PlainSpec();
  spec.local = {ExpertMap::Kind::kRange, 6, 2};
  TwinLayer layer(SourceOf(spec));
  LayerInputs inputs(spec, kTokens);
  const std::vector<int32_t> ids(static_cast<size_t>(kTokens * spec.top_k), 1);
  inputs.Unpacked(ids, MakeWeights(spec, kTokens));
  const RunResult result = layer.Run(inputs);
  EXPECT_TRUE(SameBits(result.output, std::vector<uint16_t>(result.output.size(), 0)));
}

}  // namespace
}  // namespace hopyard::test
