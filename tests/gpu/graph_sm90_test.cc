// SPDX-License-Identifier: Apache-2.0
// Captured layers on a GPU, of one pair of formats for every kind of kernel: any number of tokens
// up to capacity, new routings and weights written in place after the capture; and that the same
// call always gives the same bits.
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/captured_call.h"
#include "tests/gpu/mixed_tactics.h"
#include "tests/refit.h"

namespace hopyard::test {
namespace {

constexpr int64_t kCapacity = 512;

class GpuGraph : public ::testing::TestWithParam<FormatPair> {
 protected:
  GpuGraph() {
    source_.spec = SmallSpec(GetParam().weights, GetParam().activations);
    source_.bias = true;
  }

  [[nodiscard]] PlanOptions Capacity(int64_t tokens) const {
    PlanOptions options;
    options.max_tokens = tokens;
    return options;
  }

  WeightSource source_;
};

// Everything of `fresh` into `live`.
void UpdateAll(const WeightSource& source, const LayerWeights& fresh, cudaStream_t stream,
               Weights* live) {
  Refit refit(5);
  refit.AddParts(fresh, source.spec.num_experts, source.layout.separate);
  refit.Apply(HasGlobalScale(source.spec.weights),
              [&](const WeightSlice& slice) { live->Update(slice, {stream}); });
}

// The capture is the first call of all: nothing has been loaded or prepared before it.
TEST_P(GpuGraph, TakesNewTokensRoutingsAndWeights) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs shape(source_.spec, kCapacity);
  const MoeInputs inputs = mirror.Copy(shape.Logits().NumTokens(0).get());
  const Plan plan = MakePlan(source_.spec, kGpu, Capacity(kCapacity));
  const CapturedBesideEager calls(plan, layer.gpu(), inputs);
  source_.seed = 99;
  source_.gain = 2.0F;
  const LayerWeights fresh(source_);
  std::vector<uint16_t> before;  // all tokens with the first weights
  for (const bool updated : {false, true}) {
    if (updated) {
      UpdateAll(source_, fresh, calls.stream(), &layer.gpu());
      HOPYARD_CUDA(cudaStreamSynchronize(calls.stream()));
    }
    uint64_t seed = 11;
    for (const int32_t count : {0, 1, 17, 511, 512}) {
      LayerInputs tokens(source_.spec, kCapacity, seed++);
      ASSERT_TRUE(calls.Agree(tokens.Logits(), count)) << "updated " << updated;
    }
    EXPECT_FALSE(updated && SameBits(calls.Output(), before)) << "the new weights had no effect";
    before = calls.Output();
  }
  EXPECT_TRUE(calls.Intact());
}

// Each GEMM has its own tiles, which every replay lists anew.
TEST_P(GpuGraph, TakesNewRoutingsInMixedTiles) {
  HOPYARD_NEEDS_GPU();
  const std::vector<std::string> tactics = MixedTactics(source_.spec);
  if (tactics.empty()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs shape(source_.spec, kCapacity);
  const MoeInputs inputs = mirror.Copy(shape.Logits().NumTokens(0).get());
  for (const std::string& tactic : {tactics.front(), tactics.back()}) {
    PlanOptions options = Capacity(kCapacity);
    options.tactic = tactic;
    const Plan plan = MakePlan(source_.spec, kGpu, options);
    const CapturedBesideEager calls(plan, layer.gpu(), inputs);
    uint64_t seed = 31;
    for (const int32_t count : {512, 0, 17, 511}) {
      LayerInputs tokens(source_.spec, kCapacity, seed++);
      ASSERT_TRUE(calls.Agree(tokens.Logits(), count)) << tactic;
    }
    EXPECT_TRUE(calls.Intact());
  }
}

// Experts leave, move to another slot and come back while a captured layer lives.
TEST_P(GpuGraph, TakesANewExpertTable) {
  HOPYARD_NEEDS_GPU();
  using Table = std::vector<int32_t>;
  source_.spec.local = {ExpertMap::Kind::kTable, 0, 4};
  source_.experts = {6, 1, 6, 0};
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs tokens(source_.spec, kCapacity);
  tokens.Logits().NumTokens(0);
  const Table nowhere(8, -1);
  const MoeInputs inputs = mirror.Copy(tokens.ExpertTable(nowhere).get());
  const CapturedBesideEager calls(MakePlan(source_.spec, kGpu, Capacity(kCapacity)), layer.gpu(),
                                  inputs);
  std::vector<uint16_t> before;
  for (const Table& table :
       {Table{3, 1, -1, -1, -1, -1, 2, -1}, Table{-1, 1, -1, -1, -1, -1, 0, -1}, nowhere,
        Table{3, -1, -1, -1, -1, -1, 0, -1}}) {
    HOPYARD_CUDA(cudaMemcpy(inputs.expert_table.data, table.data(), table.size() * sizeof(int32_t),
                            cudaMemcpyHostToDevice));
    ASSERT_TRUE(calls.Agree(tokens, kCapacity));
    EXPECT_TRUE(
        SameBits(calls.Output(), layer.Run(tokens.NumTokens(kCapacity).ExpertTable(table)).output));
    EXPECT_FALSE(SameBits(calls.Output(), before)) << "the new table had no effect";
    before = calls.Output();
  }
  EXPECT_TRUE(calls.Intact());
}

// The updated layer is the freshly loaded one.
TEST_P(GpuGraph, UpdatedWeightsAreThoseOfAFreshLayer) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kTokens = 33;
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs tokens(source_.spec, kTokens);
  const MoeInputs inputs = mirror.Copy(tokens.Logits().get());
  const RepeatedCall call(MakePlan(source_.spec, kGpu, Capacity(kTokens)), layer.gpu(), inputs);
  const CapturedCall graph(call);
  source_.seed = 99;
  TwinLayer fresh(source_);
  UpdateAll(source_, fresh.storage(), graph.stream(), &layer.gpu());
  graph.Launch();
  EXPECT_TRUE(SameBits(call.Output(), fresh.Run(tokens).output));
}

// Ten thousand times, whatever the workspace holds before.
TEST_P(GpuGraph, EveryLaunchGivesTheSameBits) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kTokens = 130;
  const int launches = SmallTests() ? 3 : 10000;
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs tokens(source_.spec, kTokens);
  const MoeInputs inputs = mirror.Copy(tokens.Logits().get());
  const RepeatedCall call(MakePlan(source_.spec, kGpu, Capacity(kTokens)), layer.gpu(), inputs);
  const CapturedCall graph(call);
  call.Run(graph.stream());
  const std::vector<uint16_t> wanted = call.Output();
  for (int i = 0; i < launches; ++i) {
    call.Poison(i % 256, graph.stream());
    if (i % 2 == 0) {
      call.Run(graph.stream());
    } else {
      graph.Launch();
    }
    ASSERT_TRUE(SameBits(call.Output(), wanted)) << "launch " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuGraph, ::testing::ValuesIn(FamilyPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
