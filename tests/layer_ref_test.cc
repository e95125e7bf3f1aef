// SPDX-License-Identifier: Apache-2.0
// The oracle against cases worked out by hand, and its weight reader against every layout.
#include "stages/layer_ref.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "formats/codes.h"
#include "tests/forward_runner.h"
#include "tests/inputs.h"
#include "tests/weights.h"

namespace hopyard::test {
namespace {

// A layer of two experts whose matrices are written in the test.
struct HandLayer {
  MoeSpec spec;
  Arena arena;
  WeightsDesc desc;
  MoeInputs inputs;

  TensorView Bf16(std::initializer_list<int64_t> shape, const std::vector<float>& values) {
    const TensorView view = arena.Array(DType::kBf16, shape);
    for (size_t i = 0; i < values.size(); ++i) {
      view.as<uint16_t>()[i] = formats::EncodeBf16(values[i]);
    }
    return view;
  }
  TensorView F32(std::initializer_list<int64_t> shape, const std::vector<float>& values) {
    const TensorView view = arena.Array(DType::kFloat32, shape);
    std::copy(values.begin(), values.end(), view.as<float>());
    return view;
  }
  TensorView I32(std::initializer_list<int64_t> shape, const std::vector<int32_t>& values) {
    const TensorView view = arena.Array(DType::kInt32, shape);
    std::copy(values.begin(), values.end(), view.as<int32_t>());
    return view;
  }
  std::vector<double> Run(int64_t width = 0) {
    return ref::LayerRef(spec, Weights(spec, desc), inputs, width, {}).output;
  }
};

// H = I = 2, not gated, identity: y = W2 (W1 x + b1) + b2.
void FillIdentityLayer(HandLayer* layer) {
  layer->spec.hidden_size = 2;
  layer->spec.intermediate_size = 2;
  layer->spec.num_experts = 2;
  layer->spec.top_k = 2;
  layer->spec.activation.kind = ActivationKind::kIdentity;
  layer->desc.routed.gemm1.values = layer->Bf16({2, 2, 2}, {1, 2, 3, 4, 0, 1, 1, 0});
  layer->desc.routed.gemm2.values = layer->Bf16({2, 2, 2}, {1, 0, 0, 2, 1, 1, 1, -1});
  layer->inputs.routing = RoutingInput::kUnpacked;
  layer->inputs.hidden_states = layer->Bf16({1, 2}, {1, -2});
  layer->inputs.expert_ids = layer->I32({1, 2}, {1, 0});
  layer->inputs.expert_weights = layer->F32({1, 2}, {0.5F, 2.0F});
}

TEST(LayerRef, TwoByTwoByHand) {
  HandLayer layer;
  FillIdentityLayer(&layer);
  // Expert 0: W1 x = (-3, -5), W2 h = (-3, -10). Expert 1: W1 x = (-2, 1), W2 h = (-1, -3).
  EXPECT_THAT(layer.Run(), ::testing::ElementsAre(-6.5, -21.5));
  EXPECT_THAT(layer.Run(1), ::testing::ElementsAre(-6.5));
}

TEST(LayerRef, BiasesAndSkippedSlots) {
  HandLayer layer;
  FillIdentityLayer(&layer);
  layer.desc.routed.gemm1.bias = layer.F32({2, 2}, {1, 1, 10, 20});
  layer.desc.routed.gemm2.bias = layer.Bf16({2, 2}, {100, 200, 1, 2});
  // Expert 1: h = (8, 21), y = (29 + 1, -13 + 2); the slot of expert 7 is skipped.
  layer.inputs.expert_ids = layer.I32({1, 2}, {1, 7});
  EXPECT_THAT(layer.Run(), ::testing::ElementsAre(15.0, -5.5));
}

TEST(LayerRef, RouterWeightOnInputScalesTheProductBeforeTheBias) {
  HandLayer layer;
  FillIdentityLayer(&layer);
  layer.spec.router_weight_on_input = true;
  layer.desc.routed.gemm1.bias = layer.F32({2, 2}, {1, 1, 10, 20});
  layer.inputs.expert_ids = layer.I32({1, 2}, {-1, 0});
  // Expert 0, weight 2: h = 2 (-3, -5) + (1, 1) = (-5, -9), y = (-5, -18), not weighted again.
  EXPECT_THAT(layer.Run(), ::testing::ElementsAre(-5.0, -18.0));
}

TEST(LayerRef, SharedExpertAndDelta) {
  HandLayer layer;
  FillIdentityLayer(&layer);
  layer.spec.shared.count = 1;
  layer.spec.shared.weight = 3.0F;
  layer.desc.shared.gemm1.values = layer.Bf16({1, 2, 2}, {1, 0, 0, 1});
  layer.desc.shared.gemm2.values = layer.Bf16({1, 2, 2}, {1, 0, 0, 1});
  layer.inputs.gemm1_delta = layer.Bf16({1, 2, 2}, {1, 0, 0, 0});
  // The delta makes expert 1's h (-1, 1), y (0, -2); shared: 3 (1, -2), without any delta.
  EXPECT_THAT(layer.Run(), ::testing::ElementsAre(0.0 - 6.0 + 3.0, -1.0 - 20.0 - 6.0));
}

TEST(LayerRef, ExpertRangeKeepsLocalSlotsOnly) {
  HandLayer layer;
  FillIdentityLayer(&layer);
  layer.spec.local = {ExpertMap::Kind::kRange, 1, 1};
  layer.desc.routed.gemm1.values = layer.Bf16({1, 2, 2}, {0, 1, 1, 0});
  layer.desc.routed.gemm2.values = layer.Bf16({1, 2, 2}, {1, 1, 1, -1});
  EXPECT_THAT(layer.Run(), ::testing::ElementsAre(-0.5, -1.5));
  layer.spec.local = {ExpertMap::Kind::kTable, 0, 1};
  layer.inputs.expert_table = layer.I32({2}, {0, -1});
  // Logical expert 0 now owns the slot that held expert 1: weight 2 instead of 0.5.
  EXPECT_THAT(layer.Run(), ::testing::ElementsAre(-2.0, -6.0));
}

struct ActivationCase {
  ActivationKind kind;
  double alpha;
  double beta;
  double limit;
  double want;  // for up = 3, gate = -1, or x = 3 where not gated
};

class LayerRefActivation : public ::testing::TestWithParam<ActivationCase> {};

// Expected values to 12 digits, computed apart with Python's math module.
TEST_P(LayerRefActivation, Formula) {
  const ActivationCase& c = GetParam();
  HandLayer layer;
  const bool gated = IsGated(c.kind);
  layer.spec.hidden_size = 2;
  layer.spec.intermediate_size = 1;
  layer.spec.num_experts = 1;
  layer.spec.top_k = 1;
  layer.spec.activation.kind = c.kind;
  layer.spec.activation.alpha.all = static_cast<float>(c.alpha);
  layer.spec.activation.beta.all = static_cast<float>(c.beta);
  layer.spec.activation.limit.all = static_cast<float>(c.limit);
  layer.desc.routed.row_order = RowOrder::kUpGate;
  layer.desc.routed.gemm1.values =
      gated ? layer.Bf16({1, 2, 2}, {3, 0, -1, 0}) : layer.Bf16({1, 1, 2}, {3, 0});
  layer.desc.routed.gemm2.values = layer.Bf16({1, 2, 1}, {1, 0});
  layer.inputs.routing = RoutingInput::kUnpacked;
  layer.inputs.hidden_states = layer.Bf16({1, 2}, {1, 0});
  layer.inputs.expert_ids = layer.I32({1, 1}, {0});
  layer.inputs.expert_weights = layer.F32({1, 1}, {1.0F});
  EXPECT_NEAR(layer.Run()[0], c.want, 1e-11);
}

constexpr double kNoLimit = INFINITY;

INSTANTIATE_TEST_SUITE_P(
    Kinds, LayerRefActivation,
    ::testing::Values(ActivationCase{ActivationKind::kSwiGlu, 1, 0, kNoLimit, -0.8068242641100},
                      ActivationCase{ActivationKind::kSwiGlu, 1.75, 1, 2, -0.4441415940951},
                      ActivationCase{ActivationKind::kGeGlu, 1, 0, kNoLimit, -0.4759657617944},
                      ActivationCase{ActivationKind::kGeGluTanh, 1, 0, kNoLimit, -0.4764240281752},
                      ActivationCase{ActivationKind::kSiTu, 2, 4, kNoLimit, -0.6315029185091},
                      ActivationCase{ActivationKind::kSiTu, 2, 4, 2.5, -0.5514160764204},
                      ActivationCase{ActivationKind::kRelu2, 1, 0, kNoLimit, 9.0},
                      ActivationCase{ActivationKind::kSilu, 1, 0, kNoLimit, 2.8577223804673},
                      ActivationCase{ActivationKind::kGelu, 1, 0, kNoLimit, 2.9959503059051},
                      ActivationCase{ActivationKind::kIdentity, 1, 0, kNoLimit, 3.0}));

TEST(LayerRef, PerExpertParametersHoldForRoutedExpertsOnly) {
  HandLayer layer;
  layer.spec.hidden_size = 2;
  layer.spec.intermediate_size = 1;
  layer.spec.num_experts = 2;
  layer.spec.top_k = 1;
  layer.spec.shared.count = 1;
  layer.spec.activation.limit.each = {1.0F, 2.0F};
  layer.desc.routed.row_order = RowOrder::kUpGate;
  layer.desc.routed.gemm1.values = layer.Bf16({2, 2, 2}, {8, 0, 8, 0, 8, 0, 8, 0});
  layer.desc.routed.gemm2.values = layer.Bf16({2, 2, 1}, {1, 0, 1, 0});
  layer.desc.shared.row_order = RowOrder::kUpGate;
  layer.desc.shared.gemm1.values = layer.Bf16({1, 2, 2}, {8, 0, 8, 0});
  layer.desc.shared.gemm2.values = layer.Bf16({1, 2, 1}, {0, 1});
  layer.inputs.routing = RoutingInput::kUnpacked;
  layer.inputs.hidden_states = layer.Bf16({1, 2}, {1, 0});
  layer.inputs.expert_ids = layer.I32({1, 1}, {1});
  layer.inputs.expert_weights = layer.F32({1, 1}, {1.0F});
  const std::vector<double> got = layer.Run();
  EXPECT_NEAR(got[0], 4.0 / (1.0 + std::exp(-2.0)), 1e-12);
  EXPECT_NEAR(got[1], 64.0 / (1.0 + std::exp(-8.0)), 1e-12);
}

TEST(LayerRef, PlainRoundsRowsAndOutputToBf16) {
  HandLayer layer;
  FillIdentityLayer(&layer);
  layer.inputs.hidden_states = layer.Bf16({1, 2}, {1.0078125F, 1.0078125F});
  layer.desc.routed.gemm1.values = layer.Bf16({2, 2, 2}, {1, 0.00390625F, 0, 0, 0, 0, 0, 0});
  layer.inputs.expert_ids = layer.I32({1, 2}, {0, -1});
  layer.inputs.expert_weights = layer.F32({1, 2}, {1.0F, 0.0F});
  ref::LayerRefOptions options;
  const Weights weights(layer.spec, layer.desc);
  EXPECT_EQ(ref::LayerRef(layer.spec, weights, layer.inputs, 0, options).output[0],
            1.0078125 * 1.00390625);
  options.plain = true;
  EXPECT_EQ(ref::LayerRef(layer.spec, weights, layer.inputs, 0, options).output[0], 1.015625);
}

// Every layout of the same experts holds the same values.
class LayerRefLayout : public ::testing::TestWithParam<WeightFormat> {};

std::vector<WeightLayout> LayoutsOf(WeightFormat format) {
  std::vector<WeightLayout> layouts;
  for (const RowOrder order : {RowOrder::kUpGate, RowOrder::kGateUp, RowOrder::kInterleavedGateUp,
                               RowOrder::kInterleavedUpGate}) {
    for (const RowMap map : {RowMap::kNatural, RowMap::kShuffled128, RowMap::kShuffled64}) {
      const bool blocked = layouts.size() % 2 == 0;
      layouts.push_back({order, map, blocked ? MajorOrder::kBlockKMajor : MajorOrder::kKMajor,
                         blocked ? ScaleLayout::kLinear : ScaleLayout::kSwizzled128x4});
    }
  }
  layouts.push_back({});
  layouts.back().separate = true;
  layouts.push_back({});
  layouts.back().per_expert = true;
  layouts.push_back({});
  layouts.back().padding = 24;
  if (format == WeightFormat::kBf16) {
    layouts.push_back({});
    layouts.back().major = MajorOrder::kMnMajor;
  }
  return layouts;
}

TEST_P(LayerRefLayout, ValuesAndBiasesDoNotDependOnTheLayout) {
  WeightSource source;
  source.spec = SmallSpec(GetParam(), ActivationFormat::kBf16);
  source.spec.num_experts = 2;
  source.spec.hidden_size = 256;
  source.spec.intermediate_size = 256;
  source.bias = true;
  const MoeSpec& spec = source.spec;
  for (const WeightLayout& layout : LayoutsOf(GetParam())) {
    const bool interleaved = layout.order == RowOrder::kInterleavedGateUp ||
                             layout.order == RowOrder::kInterleavedUpGate;
    if (GetParam() == WeightFormat::kFp8Block128 && interleaved) {
      continue;  // its 128-row blocks mix gate and up: other scales, other values
    }
    source.layout = layout;
    const LayerWeights weights(source);
    const WeightsDesc& desc = weights.desc();
    const CanonicalExpert& expert = weights.expert(1);
    for (int64_t i = 0; i < 64; ++i) {
      const auto row = static_cast<int64_t>(Hash(11, static_cast<uint64_t>(i)) % 256);
      const auto col = static_cast<int64_t>(Hash(12, static_cast<uint64_t>(i)) % 256);
      const std::vector<double> got = {
          ref::WeightValue(spec, desc, 1, WeightPart::kGate, row, col),
          ref::WeightValue(spec, desc, 1, WeightPart::kUp, row, col),
          ref::WeightValue(spec, desc, 1, WeightPart::kGemm2, row, col),
          ref::BiasValue(spec, desc, 1, WeightPart::kGate, row),
          ref::BiasValue(spec, desc, 1, WeightPart::kUp, row),
          ref::BiasValue(spec, desc, 1, WeightPart::kGemm2, row)};
      const auto r = static_cast<size_t>(row);
      const std::vector<double> want = {CanonicalValue(expert.gate, row, col),
                                        CanonicalValue(expert.up, row, col),
                                        CanonicalValue(expert.gemm2, row, col),
                                        expert.gate_bias[r],
                                        expert.up_bias[r],
                                        expert.gemm2_bias[r]};
      ASSERT_EQ(got, want) << ToString(layout) << " row " << row << " column " << col;
    }
  }
}

TEST_P(LayerRefLayout, ValuesAreThoseThatWereQuantised) {
  const std::vector<float> source = [] {
    std::vector<float> values;
    for (uint64_t i = 0; i < 128 * 256; ++i) {
      values.push_back(Normal(Hash(5, i)));
    }
    return values;
  }();
  const CanonicalMatrix matrix = QuantizeMatrix(GetParam(), source, 128, 256);
  double error = 0.0;
  for (int64_t i = 0; i < 128 * 256; ++i) {
    const double difference = CanonicalValue(matrix, i / 256, i % 256) -
                              static_cast<double>(source[static_cast<size_t>(i)]);
    error += difference * difference;
  }
  EXPECT_LT(std::sqrt(error / (128 * 256)), 0.15);
}

TEST_P(LayerRefLayout, ShardsOfAMatrixKeepTheScalesOfTheWhole) {
  WeightSource source;
  source.spec = SmallSpec(GetParam(), ActivationFormat::kBf16);
  source.spec.num_experts = 1;
  source.spec.top_k = 1;
  source.spec.intermediate_size = 384;
  source.layout.separate = true;
  const LayerWeights whole(source);
  const MoeSpec whole_spec = source.spec;
  source.shard_of = 384;
  source.shard_begin = 88;
  source.spec.intermediate_size = 80;
  const LayerWeights shard(source);
  for (const WeightPart part : {WeightPart::kGate, WeightPart::kUp, WeightPart::kGemm2}) {
    const bool down = part == WeightPart::kGemm2;
    for (int64_t i = 0; i < 80; ++i) {
      const int64_t row = down ? 3 * i : i;
      const int64_t col = down ? i : 3 * i;
      ASSERT_EQ(ref::WeightValue(source.spec, shard.desc(), 0, part, row, col),
                ref::WeightValue(whole_spec, whole.desc(), 0, part, row + (down ? 0 : 88),
                                 col + (down ? 88 : 0)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, LayerRefLayout,
                         ::testing::Values(WeightFormat::kBf16, WeightFormat::kFp8Block128,
                                           WeightFormat::kFp8PerTensor,
                                           WeightFormat::kFp8PerChannel, WeightFormat::kMxFp8,
                                           WeightFormat::kNvFp4, WeightFormat::kMxFp4,
                                           WeightFormat::kMxInt4),
                         [](const auto& test) { return std::string(ToString(test.param)); });

}  // namespace
}  // namespace hopyard::test
