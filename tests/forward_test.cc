// SPDX-License-Identifier: Apache-2.0
// The whole layer against the oracle: every pair of formats, kernel and odd size.
#include "hopyard/forward.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "stages/layer_ref.h"
#include "tests/forward_runner.h"

namespace hopyard::test {
namespace {

std::string PairName(const ::testing::TestParamInfo<FormatPair>& test) {
  return ToString(test.param);
}

// Runs random tokens through the layer and judges them.
::testing::AssertionResult RunAndJudge(const WeightSource& source, int64_t tokens,
                                       const RunOptions& options = {}) {
  const LayerWeights storage(source);
  const Weights weights = storage.Make();
  LayerInputs inputs(source.spec, tokens);
  inputs.Logits();
  const RunResult result = RunLayer(source.spec, weights, inputs.get(), options);
  return MatchesOracle(source.spec, weights, inputs.get(), result);
}

class ForwardPair : public ::testing::TestWithParam<FormatPair> {
 protected:
  ForwardPair() { source_.spec = SmallSpec(GetParam().weights, GetParam().activations); }
  WeightSource source_;
};

TEST_P(ForwardPair, MatchesOracleAtEdgeTokenCounts) {
  for (const int64_t tokens : EdgeTokenCounts(SmallTests() ? 4 : 16)) {
    EXPECT_TRUE(RunAndJudge(source_, tokens)) << tokens << " tokens";
  }
}

TEST_P(ForwardPair, EveryKernelMatchesOracle) {
  source_.bias = true;
  const std::vector<std::string> kernels = RunnableKernels(source_.spec);
  ASSERT_FALSE(kernels.empty());
  const LayerWeights storage(source_);
  const Weights weights = storage.Make();
  LayerInputs inputs(source_.spec, 7);
  inputs.Logits();
  for (const std::string& kernel : kernels) {
    RunOptions options;
    options.plan.tactic = kernel;
    const RunResult result = RunLayer(source_.spec, weights, inputs.get(), options);
    EXPECT_EQ(result.kernel, kernel);
    EXPECT_TRUE(MatchesOracle(source_.spec, weights, inputs.get(), result)) << kernel;
  }
}

// Partial scale blocks at the end of K, in both GEMMs.
// In GEMM2's row 3 of expert 2, a code where the format has one, else the scale of 16 or 32 of
// them.
TEST_P(ForwardPair, ANanWeightSpoilsItsFeatureOnly) {
  LayerWeights storage(source_);
  LayerInputs inputs(source_.spec, 9);
  inputs.Logits();
  const RunResult before = RunLayer(source_.spec, storage.Make(), inputs.get());
  const MatrixSet& set = storage.mutable_desc()->routed.gemm2;
  const TensorView& view = CodesPerByte(GetParam().weights) == 1 ? set.values : set.scales;
  const int64_t element = 2 * view.strides[0] + 3 * view.strides[1] + 1;
  std::fill_n(view.as<uint8_t>() + element * SizeOf(view.dtype), SizeOf(view.dtype), uint8_t{0xFF});
  const RunResult after = RunLayer(source_.spec, storage.Make(), inputs.get());
  int64_t spoilt = 0;
  for (size_t slot = 0; slot < before.ids.size(); ++slot) {
    for (int64_t c = 0; c < source_.spec.hidden_size; ++c) {
      const auto at = static_cast<size_t>(before.slot_to_row[slot] * source_.spec.hidden_size + c);
      if (before.ids[slot] == 2 && c == 3) {
        EXPECT_TRUE(std::isnan(FromBf16({after.rows[at]})[0])) << "slot " << slot;
        ++spoilt;
      } else {
        ASSERT_EQ(after.rows[at], before.rows[at]) << "slot " << slot << ", column " << c;
      }
    }
  }
  EXPECT_GT(spoilt, 0);
}

TEST_P(ForwardPair, OddSizesMatchOracle) {
  struct Size {
    int64_t hidden;
    int64_t intermediate;
  };
  std::vector<Size> sizes = {{112, 40}, {96, 80}, {144, 96}, {200, 192}};
  source_.spec.num_experts = 3;
  for (const Size& size : sizes) {
    source_.spec.hidden_size = size.hidden;
    source_.spec.intermediate_size = size.intermediate;
    EXPECT_TRUE(RunAndJudge(source_, 5)) << size.hidden << " x " << size.intermediate;
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, ForwardPair, ::testing::ValuesIn(SupportedPairs()), PairName);

// Pairs whose hidden states may come as codes.
std::vector<FormatPair> QuantisedPairs() {
  std::vector<FormatPair> pairs = SupportedPairs();
  std::erase_if(pairs,
                [](const FormatPair& p) { return p.activations == ActivationFormat::kBf16; });
  return pairs;
}

class ForwardCodes : public ForwardPair {};

TEST_P(ForwardCodes, QuantisedHiddenStatesMatchOracle) {
  const LayerWeights storage(source_);
  const Weights weights = storage.Make();
  LayerInputs rounded(source_.spec, 6);
  rounded.Logits();
  const RunResult from_bf16 = RunLayer(source_.spec, weights, rounded.get());
  rounded.QuantizeHidden();
  const RunResult from_codes = RunLayer(source_.spec, weights, rounded.get());
  EXPECT_TRUE(MatchesOracle(source_.spec, weights, rounded.get(), from_codes));
  EXPECT_TRUE(SameBits(from_codes.output, from_bf16.output))
      << "the layer rounds bf16 hidden states as Quantize does";
}

INSTANTIATE_TEST_SUITE_P(Pairs, ForwardCodes, ::testing::ValuesIn(QuantisedPairs()), PairName);

// Widths of published models that divide by no power of two above 64.
class ForwardModelSize : public ::testing::TestWithParam<FormatPair> {};

TEST_P(ForwardModelSize, MatchesOracle) {
  WeightSource source;
  source.spec = SmallSpec(GetParam().weights, GetParam().activations);
  source.spec.num_experts = 1;
  source.spec.top_k = 1;
  struct Size {
    int64_t hidden;
    int64_t intermediate;
  };
  const bool small = SmallTests();
  for (const Size& size : {Size{small ? 288 : 2688, 192}, Size{small ? 480 : 2880, 80},
                           Size{64, 1856}, Size{72, 704}, Size{48, 2688}, Size{40, 2880}}) {
    source.spec.hidden_size = size.hidden;
    source.spec.intermediate_size = size.intermediate;
    EXPECT_TRUE(RunAndJudge(source, 2)) << size.hidden << " x " << size.intermediate;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Pairs, ForwardModelSize,
    ::testing::Values(FormatPair{WeightFormat::kBf16, ActivationFormat::kBf16},
                      FormatPair{WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
                      FormatPair{WeightFormat::kMxFp8, ActivationFormat::kMxFp8},
                      FormatPair{WeightFormat::kMxFp4, ActivationFormat::kBf16},
                      FormatPair{WeightFormat::kMxFp4, ActivationFormat::kMxFp8},
                      FormatPair{WeightFormat::kNvFp4, ActivationFormat::kNvFp4},
                      FormatPair{WeightFormat::kMxInt4, ActivationFormat::kBf16}),
    PairName);

// Integer matrices whose sums are exact in FP32: tolerance 0. Finds indexing and masking faults.
TEST(Forward, IntegerLayerIsExact) {
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  source.spec.activation.kind = ActivationKind::kIdentity;
  source.spec.hidden_size = 24;  // |h| <= 24 * 4 = 96 and bf16 holds integers up to 256
  source.spec.intermediate_size = 5;
  source.integers = true;
  const LayerWeights storage(source);
  const Weights weights = storage.Make();
  LayerInputs inputs(source.spec, 33);
  inputs.IntegerHidden().Unpacked(MakeIds(IdPattern::kRandom, source.spec, 33),
                                  std::vector<float>(66, 1.0F));
  const RunResult result = RunLayer(source.spec, weights, inputs.get());
  ref::LayerRefOptions options;
  options.plain = true;
  const auto wanted = ref::LayerRef(source.spec, weights, inputs.get(), 0, options);
  EXPECT_EQ(FromBf16(result.output), wanted.output);
}

// Tiny and large weights: scales near 2^-40 and 2^20 must neither vanish nor overflow.
TEST(Forward, ExtremeScalesScaleTheOutput) {
  for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kFp8Block128,
                                    WeightFormat::kFp8PerChannel, WeightFormat::kMxFp4}) {
    for (const float gain : {0x1p-20F, 0x1p10F}) {
      WeightSource source;
      source.spec = SmallSpec(format, ActivationFormat::kBf16);
      source.spec.activation.kind = ActivationKind::kIdentity;
      source.gain = 1.0F;
      LayerInputs inputs(source.spec, 4);
      inputs.Logits();
      const LayerWeights usual(source);
      const RunResult want = RunLayer(source.spec, usual.Make(), inputs.get());
      source.gain = gain;
      const LayerWeights extreme(source);
      const RunResult got = RunLayer(source.spec, extreme.Make(), inputs.get());
      std::vector<double> scaled = FromBf16(got.output);
      for (double& value : scaled) {
        value /= static_cast<double>(gain) * gain;
      }
      EXPECT_EQ(scaled, FromBf16(want.output)) << ToString(format) << " gain " << gain;
    }
  }
}

}  // namespace
}  // namespace hopyard::test
