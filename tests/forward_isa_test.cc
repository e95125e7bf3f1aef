// SPDX-License-Identifier: Apache-2.0
// The same bits from every kernel of this machine and any number of threads, at batch sizes around
// the edges of register tiles and of token chunks.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "gemm/cpu/token_chunk.h"
#include "tests/layer.h"

namespace hopyard::test {
namespace {

using gemm::cpu::TokenChunk;

// All outputs of one layer run by every kernel, and by one and many threads.
class ForwardIsa : public ::testing::TestWithParam<FormatPair> {
 protected:
  static void ExpectSameRun(const RunResult& got, const RunResult& wanted) {
    EXPECT_TRUE(SameBits(got.ids, wanted.ids));
    EXPECT_TRUE(SameBits(got.weights, wanted.weights));
    EXPECT_TRUE(SameBits(got.slot_to_row, wanted.slot_to_row));
    EXPECT_TRUE(SameBits(got.activation, wanted.activation));
    EXPECT_TRUE(SameBits(got.rows, wanted.rows));
    EXPECT_TRUE(SameBits(got.output, wanted.output));
  }

  // `many`: threads of the second run of each kernel; more than the machine has is allowed.
  static void ExpectOneResult(const TestLayer& layer, const LayerInputs& inputs, int many = 3) {
    const RunResult wanted = layer.Run(inputs);
    for (const std::string& kernel : RunnableKernels(layer.spec())) {
      for (const int threads : {1, many}) {
        RunOptions options;
        options.plan.tactic = kernel;
        options.plan.num_threads = threads;
        const RunResult got = layer.Run(inputs, options);
        EXPECT_EQ(got.kernel, kernel);
        ExpectSameRun(got, wanted);
        ASSERT_FALSE(::testing::Test::HasFailure())
            << kernel << ", " << threads << " threads, " << inputs.tokens() << " tokens";
      }
    }
  }

  // One expert takes all tokens: its rows fill tiles and chunks to the last one and beyond.
  static void ExpectOneResultOnOneExpert(const TestLayer& layer, int64_t tokens) {
    LayerInputs inputs(layer.spec(), tokens);
    inputs.Unpacked(MakeIds(IdPattern::kAllOnOneExpert, layer.spec(), tokens),
                    MakeWeights(layer.spec(), tokens));
    ExpectOneResult(layer, inputs);
  }

  static MoeSpec OneOfTwo(int64_t hidden, int64_t intermediate) {
    MoeSpec spec = MiniSpec(GetParam());
    spec.hidden_size = hidden;
    spec.intermediate_size = intermediate;
    spec.num_experts = 2;
    spec.top_k = 1;
    return spec;
  }
};

// Register tiles take 6 tokens; a thread's block of features is 16 or more.
TEST_P(ForwardIsa, SameBitsAroundRegisterTiles) {
  const TestLayer layer(OneOfTwo(80, 48), true);
  for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 23, 24, 25}) {
    ExpectOneResultOnOneExpert(layer, tokens);
  }
}

// Rows that end within a vector, a scale block and a feature block.
TEST_P(ForwardIsa, SameBitsWithPartialBlocks) {
  for (const auto& [hidden, intermediate] :
       std::vector<std::pair<int64_t, int64_t>>{{34, 18}, {130, 66}, {256, 2}, {2, 130}}) {
    MoeSpec spec = MiniSpec(GetParam());
    spec.hidden_size = hidden;
    spec.intermediate_size = intermediate;
    const TestLayer layer(spec, true);
    LayerInputs inputs(spec, 13);
    inputs.Logits();
    ExpectOneResult(layer, inputs);
  }
}

TEST_P(ForwardIsa, SameBitsAroundTokenChunks) {
  const int64_t chunk = TokenChunk::kMaxTokens;
  const TestLayer layer(OneOfTwo(48, 32));
  ASSERT_EQ(TokenChunk::Size(48), chunk);
  for (const int64_t tokens : {chunk - 1, chunk, chunk + 1, 2 * chunk + 7}) {
    ExpectOneResultOnOneExpert(layer, tokens);
  }
}

// Every other stage of the layer rides along: groups, shared experts, skipped slots, a delta.
TEST_P(ForwardIsa, SameBitsForAWholeLayer) {
  for (const ActivationKind kind :
       {ActivationKind::kSwiGlu, ActivationKind::kGeGlu, ActivationKind::kGeGluTanh,
        ActivationKind::kSiTu, ActivationKind::kRelu2, ActivationKind::kSilu, ActivationKind::kGelu,
        ActivationKind::kIdentity}) {
    MoeSpec spec = MiniSpec(GetParam());
    spec.routing = RoutingRule::DeepSeekV3(4, 2, 2.5F);
    spec.local = {ExpertMap::Kind::kRange, 1, 6};
    spec.shared = {1, false, 1.0F, GetParam().weights};
    spec.activation.kind = kind;
    spec.activation.beta.all = kind == ActivationKind::kSiTu ? 2.0F : 0.0F;
    const TestLayer layer(spec, true);
    LayerInputs inputs(spec, 29);
    inputs.Logits().RoutingBias();
    if (IsGated(kind)) {
      inputs.Delta();
    }
    ExpectOneResult(layer, inputs, 7);
  }
}

// Wide rows make smaller chunks, in GEMM1 or in GEMM2.
class ForwardIsaWide : public ForwardIsa {};

TEST_P(ForwardIsaWide, SameBitsAroundChunksOfWideRows) {
  constexpr int64_t kWide = 4096;
  const int64_t chunk = TokenChunk::Size(kWide);
  ASSERT_LT(chunk, TokenChunk::kMaxTokens);
  for (const MoeSpec& spec : {OneOfTwo(kWide, 4), OneOfTwo(4, kWide)}) {
    const TestLayer layer(spec);
    ExpectOneResultOnOneExpert(layer, chunk + 1);
    if (!SmallTests()) {
      ExpectOneResultOnOneExpert(layer, chunk - 1);
      ExpectOneResultOnOneExpert(layer, chunk);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, ForwardIsaWide,
                         ::testing::Values(FormatPair{WeightFormat::kBf16, ActivationFormat::kBf16},
                                           FormatPair{WeightFormat::kMxFp4,
                                                      ActivationFormat::kMxFp8}),
                         [](const auto& test) { return ToString(test.param); });

INSTANTIATE_TEST_SUITE_P(Pairs, ForwardIsa, ::testing::ValuesIn(SupportedPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
