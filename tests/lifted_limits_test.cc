// SPDX-License-Identifier: Apache-2.0
// Calls that other implementations refuse or leave undefined, and that run here: docs/errors.md
// lists them by the names of these tests.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "formats/codes.h"
#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

using W = WeightFormat;
using A = ActivationFormat;

// Layers this small would spend their time waiting for a second thread.
RunOptions OneThread() {
  RunOptions options;
  options.plan.num_threads = 1;
  return options;
}

// A layer small enough that the oracle judges hundreds of them: hidden 64, intermediate 32.
struct Layer {
  explicit Layer(const MoeSpec& spec, bool bias = false) : source(SourceOf(spec)) {
    source.bias = bias;
    storage = std::make_unique<LayerWeights>(source);
    weights = storage->Make();
  }
  [[nodiscard]] RunResult Run(const LayerInputs& inputs) const {
    return RunLayer(source.spec, weights, inputs.get(), OneThread());
  }
  [[nodiscard]] ::testing::AssertionResult Judge(const LayerInputs& inputs) const {
    return MatchesOracle(source.spec, weights, inputs.get(), Run(inputs));
  }

  WeightSource source;
  std::unique_ptr<LayerWeights> storage;
  Weights weights;
};

::testing::AssertionResult RunsFromLogits(const MoeSpec& spec, int64_t tokens = 3) {
  LayerInputs inputs(spec, tokens);
  inputs.Logits();
  if (spec.routing.use_bias) {
    inputs.RoutingBias();
  }
  return Layer(spec).Judge(inputs) << ToString(spec);
}

MoeSpec WithExperts(int num_experts, int top_k, const RoutingRule& rule) {
  MoeSpec spec = TinySpec();
  spec.num_experts = num_experts;
  spec.top_k = top_k;
  spec.routing = rule;
  return spec;
}

std::vector<RoutingRule> EveryRule() {
  return {RoutingRule::Default(),
          RoutingRule::Renormalize(),
          RoutingRule::TopK(),
          RoutingRule::SigmoidRenorm(),
          RoutingRule::MiniMax2(1.5F),
          RoutingRule::Sigmoid(),
          RoutingRule::Llama4(),
          RoutingRule::SqrtSoftplus(2.0F),
          RoutingRule::SigmoidRenorm(false),
          RoutingRule::DeepSeekV3(1, 1, 2.5F)};
}

TEST(LiftedLimits, AnyNumberOfExpertsAndAnyTopK) {
  for (const RoutingRule& rule : EveryRule()) {
    EXPECT_TRUE(RunsFromLogits(WithExperts(7, 3, rule)));
    EXPECT_TRUE(RunsFromLogits(WithExperts(13, 13, rule)));
    EXPECT_TRUE(RunsFromLogits(WithExperts(33, 10, rule)));
    EXPECT_TRUE(RunsFromLogits(WithExperts(38, 32, rule)));
    EXPECT_TRUE(RunsFromLogits(WithExperts(1, 1, rule)));
  }
}

TEST(LiftedLimits, TwoThousandExpertsWithTopK32) {
  for (RoutingRule rule : {RoutingRule::Default(), RoutingRule::DeepSeekV3(64, 16, 1.0F)}) {
    rule.scaling_factor = 64.0F;  // the output of 32 among 2048 softmax weights is small
    MoeSpec spec = WithExperts(kMaxExperts, kMaxTopK, rule);
    spec.hidden_size = 16;
    spec.intermediate_size = 8;
    EXPECT_TRUE(RunsFromLogits(spec, 2));
  }
}

TEST(LiftedLimits, GroupsOfAnyShapeWithAnyRule) {
  const struct {
    int experts, groups, top_groups, top_k;
  } shapes[] = {{36, 12, 6, 5}, {80, 2, 1, 9}, {12, 4, 2, 6}, {10, 10, 7, 7}, {12, 3, 3, 2}};
  for (RoutingRule rule : EveryRule()) {
    for (const auto& shape : shapes) {
      rule.num_groups = shape.groups;
      rule.top_groups = shape.top_groups;
      EXPECT_TRUE(RunsFromLogits(WithExperts(shape.experts, shape.top_k, rule)));
    }
  }
}

TEST(LiftedLimits, AMissingRoutingBiasIsZeros) {
  for (const RoutingRule& rule : {RoutingRule::MiniMax2(1.5F), RoutingRule::DeepSeekV3(1, 1, 2.5F),
                                  RoutingRule::DeepSeekV3(4, 2, 2.5F)}) {
    const Layer layer(WithExperts(16, 3, rule));
    LayerInputs inputs(layer.source.spec, 6);
    inputs.Logits();
    const RunResult absent = layer.Run(inputs);
    inputs.RoutingBias();
    std::fill_n(inputs.get().routing_bias.as<float>(), 16, 0.0F);
    const RunResult zeros = layer.Run(inputs);
    EXPECT_TRUE(SameBits(absent.ids, zeros.ids));
    EXPECT_TRUE(SameBits(absent.output, zeros.output));
  }
}

// 1 + 2^-12 is no bf16 number: rounded, all biases would tie and expert 0 would win.
TEST(LiftedLimits, TheRoutingBiasKeepsItsPrecision) {
  for (const int groups : {1, 4}) {
    const Layer layer(WithExperts(16, 1, RoutingRule::DeepSeekV3(groups, 1, 1.0F)));
    LayerInputs inputs(layer.source.spec, 2);
    inputs.Logits().RoutingBias();
    std::fill_n(inputs.get().logits.as<float>(), 32, 0.0F);
    std::fill_n(inputs.get().routing_bias.as<float>(), 16, 1.0F);
    inputs.get().routing_bias.as<float>()[6] = 1.0F + 0x1p-12F;
    EXPECT_EQ(layer.Run(inputs).ids, (std::vector<int32_t>{6, 6}));
  }
}

TEST(LiftedLimits, RoutingWeightsAreFp32) {
  const Layer layer(WithExperts(16, 4, RoutingRule::Renormalize()));
  LayerInputs inputs(layer.source.spec, 5);
  inputs.Logits(DType::kBf16);
  const RunResult result = layer.Run(inputs);
  int finer = 0;
  for (const float weight : result.weights) {
    finer += weight != formats::RoundToBf16(weight) ? 1 : 0;
  }
  EXPECT_GT(finer, 10) << "of 20 weights";
  EXPECT_TRUE(MatchesOracle(layer.source.spec, layer.weights, inputs.get(), result));
}

// Replay is written for ids that were given, too: packed, unpacked, forced and from a table.
TEST(LiftedLimits, ReplayOfEveryEntry) {
  MoeSpec spec = WithExperts(9, 3, RoutingRule::SqrtSoftplus(1.0F));
  const Layer layer(spec);
  const std::vector<int32_t> ids = MakeIds(IdPattern::kRandom, spec, 4);
  const std::vector<float> weights = MakeWeights(spec, 4);
  std::vector<std::unique_ptr<LayerInputs>> entries(4);
  for (auto& entry : entries) {
    entry = std::make_unique<LayerInputs>(spec, 4);
  }
  entries[0]->Packed(ids, weights);
  entries[1]->Unpacked(ids, weights);
  entries[2]->Logits().Replay(ids, DType::kInt16);
  entries[3]->Logits().HashTable(5);
  for (const auto& entry : entries) {
    const RunResult result = layer.Run(*entry);
    ASSERT_EQ(result.replay.size(), (4 + 3) * 3U);
    for (size_t i = 0; i < result.replay.size(); ++i) {
      EXPECT_EQ(result.replay[i], i < result.ids.size() ? result.ids[i] : -1);
    }
    EXPECT_TRUE(MatchesOracle(spec, layer.weights, entry->get(), result));
    if (entry != entries[3]) {
      EXPECT_TRUE(SameBits(result.ids, ids));
    }
  }
}

TEST(LiftedLimits, SharedExpertsWithAnyRuleAndReplay) {
  for (const RoutingRule& rule : EveryRule()) {
    MoeSpec spec = WithExperts(8, 2, rule);
    spec.shared.count = 3;
    const Layer layer(spec);
    LayerInputs inputs(spec, 4);
    inputs.Logits();
    const RunResult result = layer.Run(inputs);
    EXPECT_TRUE(MatchesOracle(spec, layer.weights, inputs.get(), result)) << ToString(spec);
    for (size_t t = 0; t < 4; ++t) {
      EXPECT_EQ(result.replay[t * 2], result.ids[t * 5]) << "shared experts are not recorded";
      EXPECT_EQ(result.replay[t * 2 + 1], result.ids[t * 5 + 1]);
    }
  }
  MoeSpec spec = WithExperts(8, 2, RoutingRule::SqrtSoftplus(1.5F));
  spec.shared.count = 2;
  LayerInputs hash(spec, 4);
  hash.Logits().HashTable(7);
  EXPECT_TRUE(Layer(spec).Judge(hash)) << "with ids from a table";
}

TEST(LiftedLimits, SharedExpertsUnderExpertParallelism) {
  for (const ExpertMap map :
       {ExpertMap{ExpertMap::Kind::kRange, 3, 4}, ExpertMap{ExpertMap::Kind::kTable, 0, 2}}) {
    MoeSpec spec = WithExperts(8, 2, RoutingRule::DeepSeekV3(4, 2, 2.5F));
    spec.local = map;
    spec.shared.count = 2;
    spec.shared.per_token_weight = true;
    WeightSource source = SourceOf(spec);
    source.experts =
        map.kind == ExpertMap::Kind::kTable ? std::vector<int>{6, 1} : std::vector<int>{3, 4, 5, 6};
    const LayerWeights storage(source);
    LayerInputs inputs(spec, 9);
    inputs.Logits().SharedWeights();
    if (map.kind == ExpertMap::Kind::kTable) {
      inputs.ExpertTable({-1, 1, -1, -1, -1, -1, 0, -1});
    }
    const RunResult result = RunLayer(spec, storage.Make(), inputs.get(), OneThread());
    EXPECT_TRUE(MatchesOracle(spec, storage.Make(), inputs.get(), result)) << ToString(spec);
  }
}

// Few tokens on a rank whose experts do not start at 0: local and global ids must not be mixed up.
TEST(LiftedLimits, TopOneRoutingUnderExpertParallelism) {
  for (const int64_t tokens : {1, 3, 40}) {
    MoeSpec spec = WithExperts(8, 1, RoutingRule::Llama4());
    spec.local = {ExpertMap::Kind::kRange, 4, 4};
    WeightSource source = SourceOf(spec);
    source.experts = {4, 5, 6, 7};
    const LayerWeights storage(source);
    LayerInputs inputs(spec, tokens);
    inputs.Logits();
    constexpr int kChosen[] = {6, 2, 5, 0};
    for (int64_t t = 0; t < tokens; ++t) {
      inputs.get().logits.as<float>()[t * 8 + kChosen[t % 4]] = 9.0F;
    }
    const RunResult result = RunLayer(spec, storage.Make(), inputs.get(), OneThread());
    EXPECT_TRUE(MatchesOracle(spec, storage.Make(), inputs.get(), result)) << tokens << " tokens";
    for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
      EXPECT_EQ(result.slot_to_row[t] >= 0, result.ids[t] >= 4);
    }
  }
}

// Partial scale blocks everywhere, rows that end anywhere: no multiple of 128, 16 or 8.
TEST(LiftedLimits, HiddenAndIntermediateSizesOfAnyValue) {
  for (const FormatPair& pair : SupportedPairs()) {
    MoeSpec spec = TinySpec(pair.weights, pair.activations);
    const bool packed = CodesPerByte(pair.weights) == 2;
    const std::vector<std::pair<int64_t, int64_t>> sizes =
        packed ? std::vector<std::pair<int64_t, int64_t>>{{34, 18}, {130, 66}}
               : std::vector<std::pair<int64_t, int64_t>>{{33, 17}, {131, 5}};
    for (const auto& [hidden, intermediate] : sizes) {
      spec.hidden_size = hidden;
      spec.intermediate_size = intermediate;
      EXPECT_TRUE(RunsFromLogits(spec));
    }
  }
}

TEST(LiftedLimits, EveryActivationWithEveryPairOfFormats) {
  for (const FormatPair& pair : SupportedPairs()) {
    for (int kind = 0; kind <= static_cast<int>(ActivationKind::kIdentity); ++kind) {
      MoeSpec spec = TinySpec(pair.weights, pair.activations);
      spec.activation.kind = static_cast<ActivationKind>(kind);
      const bool situ = spec.activation.kind == ActivationKind::kSiTu;
      if (situ || spec.activation.kind == ActivationKind::kSwiGlu) {
        spec.activation.alpha.each = {1.702F, 1.0F, 0.5F, 2.0F};
        spec.activation.beta.all = 1.0F;
        spec.activation.limit.each = {1.0F, 0.5F, 7.0F, 2.0F};
      }
      EXPECT_TRUE(RunsFromLogits(spec));
    }
  }
}

// A LoRA delta beside a GEMM1 bias, routed by logits or by ids, in every pair of formats.
TEST(LiftedLimits, Gemm1DeltaWithBiasAndEveryPairOfFormats) {
  for (const FormatPair& pair : SupportedPairs()) {
    const Layer layer(TinySpec(pair.weights, pair.activations), true);
    const MoeSpec& spec = layer.source.spec;
    LayerInputs scored(spec, 3);
    scored.Logits().Delta();
    EXPECT_TRUE(layer.Judge(scored)) << ToString(pair);
    LayerInputs given(spec, 3);
    given.Unpacked(MakeIds(IdPattern::kRandom, spec, 3), MakeWeights(spec, 3)).Delta();
    EXPECT_TRUE(layer.Judge(given)) << ToString(pair);
  }
}

TEST(LiftedLimits, RouterWeightOnInputWithEveryPairAndGivenWeights) {
  for (const FormatPair& pair : SupportedPairs()) {
    MoeSpec spec = TinySpec(pair.weights, pair.activations);
    spec.router_weight_on_input = true;
    const Layer layer(spec);
    LayerInputs given(spec, 3);
    given.Unpacked(MakeIds(IdPattern::kRandom, spec, 3), MakeWeights(spec, 3));
    EXPECT_TRUE(layer.Judge(given)) << ToString(pair);
  }
}

// Zero tokens need no memory, and nothing is counted.
TEST(LiftedLimits, NoTokensAndNoMemory) {
  const MoeSpec spec = TinySpec();
  const Layer layer(spec);
  const Plan plan = MakePlan(spec, Device{}, OptionsFor(4));
  const GuardedBuffer workspace(plan.workspace_bytes());
  const auto none = [](DType dtype, std::initializer_list<int64_t> shape) {
    return TensorView::Contiguous(static_cast<void*>(nullptr), dtype, shape);
  };
  std::vector<int32_t> load = {1, 2, 3, 4};
  MoeInputs inputs;
  inputs.hidden_states = none(DType::kBf16, {0, 64});
  inputs.logits = none(DType::kFloat32, {0, 4});
  MoeOutputs outputs;
  outputs.output = none(DType::kBf16, {0, 64});
  outputs.replay = none(DType::kInt16, {0, 2});
  outputs.expert_load = TensorView::Contiguous(load.data(), DType::kInt32, {4});
  Forward(plan, layer.weights, inputs, outputs,
          {workspace.data(), static_cast<size_t>(workspace.bytes())});
  EXPECT_EQ(load, (std::vector<int32_t>{1, 2, 3, 4}));
}

}  // namespace
}  // namespace hopyard::test
