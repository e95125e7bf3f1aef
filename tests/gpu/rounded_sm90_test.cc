// SPDX-License-Identifier: Apache-2.0
// Kernels that a plan takes by name only, because they round more than the formats ask: what
// Explain says of them, and that they compute what docs/numerics.md says, no more and no less.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "formats/codes.h"
#include "tests/gpu/runner_sm90.h"
#include "tests/refit.h"

namespace hopyard::test {
namespace {

constexpr FormatPair kMxFp4MxFp8 = {WeightFormat::kMxFp4, ActivationFormat::kMxFp8};
constexpr FormatPair kNvFp4PerToken = {WeightFormat::kNvFp4, ActivationFormat::kFp8PerToken};

MoeSpec SpecOf(const FormatPair& pair, int64_t hidden = 256, int64_t intermediate = 128) {
  MoeSpec spec = SmallSpec(pair.weights, pair.activations);
  spec.hidden_size = hidden;
  spec.intermediate_size = intermediate;
  return spec;
}

Explanation ExplainTactic(const MoeSpec& spec, const std::string& tactic) {
  PlanOptions options;
  options.max_tokens = 1000;
  options.tactic = tactic;
  return Explain(spec, kGpu, options);
}

// Kernels of GEMM1 that are listed, but not for the taking.
std::vector<std::string> NamesOf(const MoeSpec& spec) {
  std::vector<std::string> names;
  for (const Candidate& candidate : ExplainTactic(spec, {}).candidates) {
    if (candidate.reason.rfind("GEMM1, by name only: ", 0) == 0) {
      names.push_back(candidate.kernel);
    }
  }
  return names;
}

// Of the kernels, the first alone where few and small cases are asked for.
std::vector<std::string> SomeNamesOf(const MoeSpec& spec) {
  std::vector<std::string> names = NamesOf(spec);
  names.resize(SmallTests() ? 1 : names.size());
  return names;
}
std::vector<int64_t> TokenCounts() {
  return SmallTests() ? std::vector<int64_t>{5} : std::vector<int64_t>{1, 33, 300};
}

RunOptions ByName(const std::string& name) {
  RunOptions options;
  options.plan.tactic = name;
  return options;
}

// ||got - wanted|| / ||wanted||.
double Distance(const std::vector<uint16_t>& got, const std::vector<uint16_t>& wanted) {
  std::vector<double> difference = FromBf16(got);
  const std::vector<double> values = FromBf16(wanted);
  for (size_t i = 0; i < difference.size(); ++i) {
    difference[i] -= values[i];
  }
  return Rms(difference) / Rms(values);
}

// Two roundings to four significant bits, here and in the exact layer, of the operands of both
// GEMMs: the CPU's layers in either format differ by 0.057 to 0.069.
constexpr double kNear = 0.08;

class GpuRounded : public ::testing::TestWithParam<FormatPair> {};

TEST_P(GpuRounded, IsListedAndNeverChosen) {
  for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kRelu2}) {
    MoeSpec spec = SpecOf(GetParam());
    spec.activation.kind = kind;
    const std::vector<std::string> names = NamesOf(spec);
    ASSERT_FALSE(names.empty());
    for (const Candidate& candidate : ExplainTactic(spec, {}).candidates) {
      const bool by_name = candidate.reason.find("by name only") != std::string::npos;
      EXPECT_FALSE(by_name && candidate.chosen) << candidate.kernel;
      EXPECT_EQ(by_name, candidate.kernel.find("_fp8_") != std::string::npos) << candidate.kernel;
    }
    for (const std::string& name : names) {
      const Explanation named = ExplainTactic(spec, name);
      ASSERT_TRUE(named.supported) << named.reason;
      for (const Candidate& candidate : named.candidates) {
        EXPECT_TRUE(!candidate.chosen || candidate.kernel.find("_fp8_") != std::string::npos)
            << name << ": " << candidate.kernel;
      }
    }
  }
}

TEST_P(GpuRounded, AnUnknownNameGetsBothLists) {
  const MoeSpec spec = SpecOf(GetParam());
  const std::string reason = ExplainTactic(spec, "no_such_kernel").reason;
  const std::string exact = ExplainTactic(spec, {}).candidates.front().kernel;
  EXPECT_LT(reason.find(exact), reason.find("; by name only:")) << reason;
  EXPECT_LT(reason.find("; by name only:"), reason.find(NamesOf(spec).front())) << reason;
}

TEST_P(GpuRounded, IsNearTheExactKernels) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(SpecOf(GetParam(), 416, 160)));
  LayerInputs inputs(layer.spec(), 33);
  inputs.Logits();
  const RunResult exact = layer.Run(inputs);
  for (const std::string& name : SomeNamesOf(layer.spec())) {
    const RunResult got = layer.Run(inputs, ByName(name));
    EXPECT_FALSE(SameBits(got.output, exact.output)) << name;
    EXPECT_LT(Distance(got.output, exact.output), kNear) << name;
  }
}

// An update renews what is kept of each row.
TEST_P(GpuRounded, UpdatedWeightsEqualAFreshLoad) {
  HOPYARD_NEEDS_GPU();
  WeightSource source = SourceOf(SpecOf(GetParam(), 256, 256));
  source.spec.num_experts = 2;
  LayerInputs inputs(source.spec, 11);
  inputs.Logits();
  TwinLayer live(source);
  source.seed = 99;
  source.gain = 8.0F;  // exponents differ a lot from those before
  TwinLayer fresh(source);
  Refit refit(4);
  refit.AddParts(fresh.storage(), 2, false);
  refit.Apply(HasGlobalScale(source.spec.weights),
              [&](const WeightSlice& slice) { live.gpu().Update(slice, {}); });
  for (const std::string& name : SomeNamesOf(source.spec)) {
    EXPECT_TRUE(
        SameBits(live.Run(inputs, ByName(name)).output, fresh.Run(inputs, ByName(name)).output))
        << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuRounded, ::testing::Values(kMxFp4MxFp8, kNvFp4PerToken),
                         [](const auto& test) { return ToString(test.param); });

TEST(GpuRoundedPlans, OtherPairsHaveNone) {
  for (const FormatPair& pair : SupportedPairs()) {
    bool listed = false;
    for (const FormatPair& rounded : {kMxFp4MxFp8, kNvFp4PerToken}) {
      listed = listed || ToString(pair) == ToString(rounded);
    }
    EXPECT_EQ(NamesOf(SpecOf(pair)).empty(), !listed) << ToString(pair);
  }
}

// MXFP4 x MXFP8 by name is MXFP4 x FP8 in blocks of 128, bit for bit.
class GpuRoundedMxFp8 : public ::testing::Test {
 protected:
  // Values of MXFP8 codes as BF16 hidden states, which hold them exactly.
  static void DecodeHidden(const MoeInputs& from, const LayerInputs& to) {
    const int64_t cols = from.hidden_states.shape[1];
    const auto* codes = from.hidden_states.as<const uint8_t>();
    const auto* scales = from.hidden_scales.as<const uint8_t>();
    auto* const values = to.get().hidden_states.as<uint16_t>();
    for (int64_t t = 0; t < to.tokens(); ++t) {
      for (int64_t k = 0; k < cols; ++k) {
        const float scale = formats::DecodeE8m0(scales[t * ((cols + 31) / 32) + k / 32]);
        values[t * cols + k] =
            formats::EncodeBf16(formats::DecodeE4m3(codes[t * cols + k]) * scale);
      }
    }
  }
};

TEST_F(GpuRoundedMxFp8, HasTheBitsOfFp8Block128) {
  HOPYARD_NEEDS_GPU();
  for (const bool shared : {false, true}) {
    MoeSpec spec = SpecOf(kMxFp4MxFp8, 416, 160);
    if (shared) {
      spec.shared = {1, false, 0.5F, spec.weights};
    }
    MoeSpec like_spec = spec;
    like_spec.activations = ActivationFormat::kFp8Block128;
    TwinLayer layer(SourceOf(spec));
    TwinLayer like(SourceOf(like_spec));
    for (const int64_t tokens : TokenCounts()) {
      LayerInputs inputs(spec, tokens);
      LayerInputs like_inputs(like_spec, tokens);
      inputs.Logits();
      like_inputs.Logits();
      LayerInputs coded(spec, tokens);
      LayerInputs decoded(like_spec, tokens);
      coded.Logits().QuantizeHidden();
      DecodeHidden(coded.get(), decoded.Logits());
      for (const std::string& name : SomeNamesOf(spec)) {
        SCOPED_TRACE(name + ", " + std::to_string(tokens) + " tokens");
        const RunResult got = layer.Run(inputs, ByName(name));
        EXPECT_TRUE(SameBits(got.output, like.Run(like_inputs, ByName(name)).output));
        like.Judge(like_inputs, got, {}, {0, tokens / 2, tokens - 1});
        EXPECT_TRUE(SameBits(layer.Run(coded, ByName(name)).output,
                             like.Run(decoded, ByName(name)).output));
      }
    }
  }
}

// Experts in another format beside them keep exact products.
TEST_F(GpuRoundedMxFp8, SharedExpertsOfAnotherFormatStayExact) {
  HOPYARD_NEEDS_GPU();
  MoeSpec spec = SpecOf(kMxFp4MxFp8);
  spec.shared = {1, false, 0.5F, WeightFormat::kMxFp8};
  TwinLayer layer(SourceOf(spec));
  LayerInputs inputs(spec, 40);
  inputs.Logits();
  const RunResult exact = layer.Run(inputs);
  const int64_t slots = spec.slots_per_token();
  for (const std::string& name : SomeNamesOf(spec)) {
    if (!ExplainTactic(spec, name).supported) {
      continue;  // the shared experts have no kernel with such tiles
    }
    const RunResult got = layer.Run(inputs, ByName(name));
    EXPECT_LT(Distance(got.output, exact.output), kNear) << name;
    for (int64_t t = 0; t < 40; ++t) {
      const auto slot = static_cast<size_t>((t + 1) * slots - 1);
      const auto begin = got.rows.begin() + got.slot_to_row[slot] * spec.hidden_size;
      const auto want = exact.rows.begin() + exact.slot_to_row[slot] * spec.hidden_size;
      ASSERT_LT(Distance({begin, begin + spec.hidden_size}, {want, want + spec.hidden_size}), 0.005)
          << name << ", token " << t;
    }
  }
}

// NVFP4 x FP8 per token by name is a layer of FP8 weights per channel: each row's values, divided
// by a power of two, rounded to e4m3.
class GpuRoundedNvFp4 : public ::testing::Test {
 protected:
  // Row `row` of an FP8 matrix [.., cols] with a scale per row.
  static void RoundRow(const CanonicalMatrix& from, int64_t row, uint8_t* codes, float* scale) {
    const int64_t blocks = (from.cols + 15) / 16;
    double largest = 0.0;
    for (int64_t k = 0; k < from.cols; ++k) {
      if (CanonicalValue(from, row, k) != 0.0) {
        const uint8_t code = from.scales[static_cast<size_t>(row * blocks + k / 16)];
        largest = std::max<double>(largest, formats::DecodeE4m3(code));
      }
    }
    const double power = largest == 0.0 ? 1.0 : std::ldexp(1.0, std::ilogb(largest) - 5);
    for (int64_t k = 0; k < from.cols; ++k) {
      const double value = CanonicalValue(from, row, k) / from.global / power;
      codes[k] = formats::EncodeE4m3(static_cast<float>(value));
    }
    *scale = static_cast<float>(power * from.global);
  }
  static void RoundMatrix(const LayerWeights& from, CanonicalMatrix CanonicalExpert::*part,
                          const MatrixSet& to) {
    for (int64_t e = 0; e < to.values.shape[0]; ++e) {
      const CanonicalMatrix& matrix = from.expert(e).*part;
      for (int64_t row = 0; row < matrix.rows; ++row) {
        RoundRow(matrix, row,
                 to.values.as<uint8_t>() + e * to.values.strides[0] + row * to.values.strides[1],
                 to.scales.as<float>() + e * to.scales.strides[0] + row);
      }
    }
  }
};

TEST_F(GpuRoundedNvFp4, MatchesTheOracleOfRoundedWeights) {
  HOPYARD_NEEDS_GPU();
  MoeSpec spec = SpecOf(kNvFp4PerToken, 416, 160);
  TwinLayer layer(SourceOf(spec));
  MoeSpec like_spec = spec;
  like_spec.weights = WeightFormat::kFp8PerChannel;
  LayerWeights like(SourceOf(like_spec));
  RoundMatrix(layer.storage(), &CanonicalExpert::gemm1, like.mutable_desc()->routed.gemm1);
  RoundMatrix(layer.storage(), &CanonicalExpert::gemm2, like.mutable_desc()->routed.gemm2);
  const Weights like_weights = like.Make();
  for (const int64_t tokens : TokenCounts()) {
    LayerInputs inputs(spec, tokens);
    inputs.Logits();
    for (const std::string& name : SomeNamesOf(spec)) {
      const RunResult got = layer.Run(inputs, ByName(name));
      EXPECT_TRUE(
          MatchesOracle(like_spec, like_weights, inputs.get(), got, {0, tokens / 2, tokens - 1}))
          << name << ", " << tokens << " tokens";
    }
  }
}

}  // namespace
}  // namespace hopyard::test
