// SPDX-License-Identifier: Apache-2.0
// Values of scales: static ones are checked when Weights is made, those of a call are arithmetic
// (docs/numerics.md).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "formats/codes.h"
#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

using W = WeightFormat;
using A = ActivationFormat;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

MoeSpec StaticSpec(A activations) {
  MoeSpec spec = TinySpec(activations == A::kNvFp4 ? W::kNvFp4 : W::kFp8PerTensor, activations);
  spec.shared.count = 2;
  spec.shared.weights = spec.weights;
  return spec;
}

class StaticScale : public ::testing::TestWithParam<A> {
 protected:
  StaticScale() : stored_(SourceOf(StaticSpec(GetParam()))) {}
  LayerWeights stored_;
};

TEST_P(StaticScale, IsFiniteAndPositive) {
  WeightsDesc& desc = *stored_.mutable_desc();
  const struct {
    const TensorView& view;
    const char* name;
  } fields[] = {{desc.routed.gemm1_input_scale, "weights.routed.gemm1_input_scale"},
                {desc.routed.gemm2_input_scale, "weights.routed.gemm2_input_scale"},
                {desc.shared.gemm1_input_scale, "weights.shared.gemm1_input_scale"},
                {desc.shared.gemm2_input_scale, "weights.shared.gemm2_input_scale"}};
  for (const auto& field : fields) {
    for (int64_t i = 0; i < field.view.numel(); ++i) {
      float& value = field.view.as<float>()[i];
      const float right = value;
      for (const float wrong : {0.0F, -0.0F, -1.0F, kNan, HUGE_VALF, -HUGE_VALF}) {
        value = wrong;
        ExpectInvalid([&] { std::ignore = stored_.Make(); },
                      {std::string(field.name) + '[' + std::to_string(i) + "] holds",
                       "wanted a finite number above 0"});
      }
      value = right;
    }
  }
  EXPECT_NO_THROW(stored_.Make());
}

INSTANTIATE_TEST_SUITE_P(Formats, StaticScale, ::testing::Values(A::kFp8PerTensor, A::kNvFp4),
                         [](const ::testing::TestParamInfo<A>& format) {
                           return std::string(ToString(format.param));
                         });

TEST(InputScales, AreRefusedWhereTheFormatHasNone) {
  float one = 1.0F;
  const TensorView scale = TensorView::Contiguous(&one, DType::kFloat32, {1});
  const FormatPair pairs[] = {{W::kBf16, A::kBf16},
                              {W::kMxFp8, A::kMxFp8},
                              {W::kFp8Block128, A::kFp8Block128},
                              {W::kFp8PerChannel, A::kFp8PerToken},
                              {W::kNvFp4, A::kNvFp4PerToken}};
  for (const FormatPair& pair : pairs) {
    MoeSpec spec = TinySpec(pair.weights, pair.activations);
    spec.shared.count = 1;
    spec.shared.weights = pair.weights;
    const LayerWeights stored(SourceOf(spec));
    const auto refused = [&](TensorView ExpertMatrices::*field, const std::string& name) {
      for (ExpertMatrices WeightsDesc::*group : {&WeightsDesc::routed, &WeightsDesc::shared}) {
        WeightsDesc desc = stored.desc();
        desc.*group.*field = scale;
        const std::string where = group == &WeightsDesc::routed ? "routed." : "shared.";
        ExpectInvalid([&] { Weights(spec, desc); },
                      {"weights." + where + name + " is given",
                       std::string(ToString(pair.activations)), "leave it absent"});
      }
    };
    refused(&ExpertMatrices::gemm1_input_scale, "gemm1_input_scale");
    refused(&ExpertMatrices::gemm2_input_scale, "gemm2_input_scale");
    EXPECT_NO_THROW(stored.Make());
  }
}

TEST(InputScales, OfSharedExpertsThatTheSpecDoesNotHave) {
  MoeSpec spec = StaticSpec(A::kNvFp4);
  spec.shared.count = 0;
  const LayerWeights stored(SourceOf(spec));
  const TensorView scale = stored.desc().routed.gemm1_input_scale;
  WeightsDesc desc = stored.desc();
  desc.shared.gemm1_input_scale = scale;
  ExpectInvalid([&] { Weights(spec, desc); },
                {"weights.shared.gemm1_input_scale is given", "spec.shared.count=0"});
  desc = stored.desc();
  desc.shared.gemm2_input_scale = scale;
  ExpectInvalid([&] { Weights(spec, desc); },
                {"weights.shared.gemm2_input_scale is given", "spec.shared.count=0"});
  desc = stored.desc();
  desc.shared.gemm2.bias = scale;
  ExpectInvalid([&] { Weights(spec, desc); }, {"weights.shared is given", "spec.shared.count=0"});
}

TEST(MatrixFields, OfMatricesThatAreNotRead) {
  const MoeSpec spec = TinySpec();
  WeightSource source = SourceOf(spec);
  source.bias = true;
  const LayerWeights fused(source);
  WeightsDesc desc = fused.desc();
  desc.routed.gate.bias = desc.routed.gemm2.bias;
  ExpectInvalid([&] { Weights(spec, desc); },
                {"weights.routed.gate has scales or a bias, but no values", "leave it absent"});
  source.layout.separate = true;
  const LayerWeights apart(source);
  desc = apart.desc();
  desc.routed.gemm1.bias = desc.routed.gemm2.bias;
  ExpectInvalid([&] { Weights(spec, desc); },
                {"weights.routed.gemm1 has scales or a bias, but no values", "leave it absent"});
}

class GlobalScale : public ::testing::TestWithParam<W> {
 protected:
  GlobalScale() : spec_(TinySpec(GetParam())), stored_(SourceOf(spec_)), inputs_(spec_, 6) {
    inputs_.Logits();
  }
  [[nodiscard]] float* Globals(bool second) {
    ExpertMatrices& routed = stored_.mutable_desc()->routed;
    return (second ? routed.gemm2 : routed.gemm1).global_scales.as<float>();
  }
  MoeSpec spec_;
  LayerWeights stored_;
  LayerInputs inputs_;
};

TEST_P(GlobalScale, IsFinite) {
  for (const bool second : {false, true}) {
    float& value = Globals(second)[2];
    const float right = value;
    for (const float wrong : {kNan, HUGE_VALF, -HUGE_VALF}) {
      value = wrong;
      ExpectInvalid(
          [&] { std::ignore = stored_.Make(); },
          {std::string("weights.routed.gemm") + (second ? "2" : "1") + ".global_scales[2] holds",
           "wanted a finite number"});
    }
    value = right;
  }
}

// 0 is a multiplier like any other: an expert that was quantised from zeros.
TEST_P(GlobalScale, MayBeZeroOrNegative) {
  Globals(false)[0] = 0.0F;
  Globals(true)[1] = 0.0F;
  Globals(true)[2] *= -1.0F;
  const Weights weights = stored_.Make();
  const RunResult result = RunLayer(spec_, weights, inputs_.get());
  EXPECT_TRUE(MatchesOracle(spec_, weights, inputs_.get(), result));
  int64_t zero_rows = 0;
  for (size_t slot = 0; slot < result.ids.size(); ++slot) {
    if (result.ids[slot] <= 1) {
      ++zero_rows;
      const auto row = result.rows.begin() + result.slot_to_row[slot] * spec_.hidden_size;
      EXPECT_TRUE(std::all_of(row, row + spec_.hidden_size,
                              [](uint16_t bits) { return formats::DecodeBf16(bits) == 0.0F; }));
    }
  }
  EXPECT_GT(zero_rows, 0);
}

INSTANTIATE_TEST_SUITE_P(Formats, GlobalScale, ::testing::Values(W::kFp8PerTensor, W::kNvFp4),
                         [](const ::testing::TestParamInfo<W>& format) {
                           return std::string(ToString(format.param));
                         });

enum class RowContent { kAllZero, kAllNan, kAsWithout };

// Scale 0 makes a token's hidden state 0, NaN makes it NaN; its neighbours keep their bits.
TEST(TokenScales, AreArithmetic) {
  MoeSpec spec = TinySpec(W::kNvFp4, A::kNvFp4PerToken);
  const LayerWeights stored(SourceOf(spec));
  const Weights weights = stored.Make();
  LayerInputs inputs(spec, 5);
  inputs.Logits();
  inputs.QuantizeHidden();
  const RunResult plain = RunLayer(spec, weights, inputs.get());
  auto* scales = inputs.get().token_scales.as<float>();
  scales[1] = 0.0F;
  scales[3] = kNan;
  const RunResult result = RunLayer(spec, weights, inputs.get());
  const RowContent wanted[] = {RowContent::kAsWithout, RowContent::kAllZero, RowContent::kAsWithout,
                               RowContent::kAllNan, RowContent::kAsWithout};
  for (int64_t t = 0; t < 5; ++t) {
    SCOPED_TRACE(t);
    for (int64_t c = 0; c < spec.hidden_size; ++c) {
      const auto at = static_cast<size_t>(t * spec.hidden_size + c);
      const float value = formats::DecodeBf16(result.output[at]);
      switch (wanted[t]) {
        case RowContent::kAllZero:
          ASSERT_EQ(value, 0.0F);
          break;
        case RowContent::kAllNan:
          ASSERT_TRUE(std::isnan(value)) << value;
          break;
        case RowContent::kAsWithout:
          ASSERT_EQ(result.output[at], plain.output[at]);
      }
    }
  }
}

}  // namespace
}  // namespace hopyard::test
