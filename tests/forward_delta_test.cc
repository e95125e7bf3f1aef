// SPDX-License-Identifier: Apache-2.0
// The delta on GEMM1 (LoRA) in the pairs of formats that other libraries offer it for, beside a
// bias, gated activations with parameters, expert parallelism and shared experts.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "formats/codes.h"
#include "tests/layer.h"

namespace hopyard::test {
namespace {

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

std::vector<FormatPair> DeltaPairs() {
  using W = WeightFormat;
  using A = ActivationFormat;
  return {{W::kBf16, A::kBf16},   {W::kMxInt4, A::kBf16},
          {W::kMxFp8, A::kMxFp8}, {W::kFp8Block128, A::kFp8Block128},
          {W::kNvFp4, A::kNvFp4}, {W::kMxFp4, A::kMxFp8},
          {W::kMxFp4, A::kBf16}};
}

class ForwardDelta : public ::testing::TestWithParam<FormatPair> {
 protected:
  static MoeSpec Spec() {
    MoeSpec spec = SmallSpec(GetParam().weights, GetParam().activations);
    spec.hidden_size = 96;
    spec.intermediate_size = 48;
    spec.top_k = 4;
    return spec;
  }
  // Replaces the delta of every slot for which `is_chosen(id)` holds.
  template <class Choice>
  static void FillDelta(LayerInputs* inputs, const RunResult& result, float value,
                        const Choice& is_chosen) {
    const TensorView& delta = inputs->get().gemm1_delta;
    const int64_t rows = delta.shape[2];
    for (int64_t slot = 0; slot < delta.shape[0] * delta.shape[1]; ++slot) {
      if (is_chosen(result.ids[Index(slot)])) {
        std::fill_n(delta.as<uint16_t>() + slot * rows, rows, formats::EncodeBf16(value));
      }
    }
  }
};

TEST_P(ForwardDelta, WithBiasMatchesOracle) {
  const TestLayer layer(Spec(), true);
  const int64_t many = SmallTests() ? 24 : 128;
  for (const int64_t tokens : {int64_t{1}, int64_t{8}, many}) {
    LayerInputs inputs(layer.spec(), tokens);
    inputs.Logits().Delta();
    const RunResult result = layer.Run(inputs);
    EXPECT_TRUE(layer.Judge(inputs, result, {0, tokens / 2, tokens - 1})) << tokens << " tokens";
    MoeInputs without = inputs.get();
    without.gemm1_delta = {};
    EXPECT_FALSE(MatchesOracle(layer.spec(), layer.weights(), without, result))
        << "the delta must matter";
  }
}

TEST_P(ForwardDelta, EveryGatedActivationAndEntryMatchesOracle) {
  for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kGeGlu,
                                    ActivationKind::kGeGluTanh, ActivationKind::kSiTu}) {
    MoeSpec spec = Spec();
    spec.activation.kind = kind;
    spec.activation.alpha.all = 1.702F;
    spec.activation.beta.all = 1.0F;
    spec.activation.limit.all = 1.5F;
    if (kind == ActivationKind::kGeGlu || kind == ActivationKind::kGeGluTanh) {
      spec.activation = {kind, {1.0F, {}}, {0.0F, {}}, Activation{}.limit};
    }
    const TestLayer layer(spec, true);
    LayerInputs scored(spec, 4);
    scored.Logits().Delta();
    EXPECT_TRUE(layer.RunAndJudge(scored)) << ToString(kind);
    LayerInputs given(spec, 4);
    given.Packed(MakeIds(IdPattern::kDuplicates, spec, 4), MakeWeights(spec, 4)).Delta();
    EXPECT_TRUE(layer.RunAndJudge(given)) << ToString(kind);
  }
}

TEST_P(ForwardDelta, ZerosChangeNoValue) {
  const TestLayer layer(Spec(), true);
  LayerInputs inputs(layer.spec(), 6);
  inputs.Logits();
  const RunResult without = layer.Run(inputs);
  inputs.Delta();
  FillDelta(&inputs, without, 0.0F, [](int32_t) { return true; });
  EXPECT_EQ(FromBf16(layer.Run(inputs).output), FromBf16(without.output));
}

// What stands in the delta of a slot that is skipped or lives elsewhere does not matter.
TEST_P(ForwardDelta, OfNonLocalAndSkippedSlotsIsIgnored) {
  constexpr int64_t kTokens = 9;
  MoeSpec spec = Spec();
  spec.local = {ExpertMap::Kind::kRange, 3, 4};
  spec.shared = {1, false, 1.0F, GetParam().weights};
  const TestLayer layer(spec, true);
  std::vector<int32_t> ids = MakeIds(IdPattern::kRandom, spec, kTokens);
  ids[3] = -1;
  ids[10] = spec.num_experts;
  LayerInputs inputs(spec, kTokens);
  inputs.Unpacked(ids, MakeWeights(spec, kTokens)).Delta();
  const RunResult wanted = layer.Run(inputs);
  EXPECT_TRUE(layer.Judge(inputs, wanted));
  RunResult by_slot;
  by_slot.ids = ids;
  const auto is_local = [](int32_t id) { return id >= 3 && id < 7; };
  FillDelta(&inputs, by_slot, std::numeric_limits<float>::quiet_NaN(),
            [&](int32_t id) { return !is_local(id); });
  const RunResult got = layer.Run(inputs);
  EXPECT_TRUE(SameBits(got.output, wanted.output));
  EXPECT_TRUE(SameBits(got.activation, wanted.activation));
  FillDelta(&inputs, by_slot, 1.0F, is_local);
  EXPECT_FALSE(SameBits(layer.Run(inputs).output, wanted.output));
}

INSTANTIATE_TEST_SUITE_P(Pairs, ForwardDelta, ::testing::ValuesIn(DeltaPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
