// SPDX-License-Identifier: Apache-2.0
// Layouts hold the same weights: equal bits out. Shards sum to the whole.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "stages/layer_ref.h"
#include "tests/forward_runner.h"

namespace hopyard::test {
namespace {

bool Interleaved(RowOrder order) {
  return order == RowOrder::kInterleavedGateUp || order == RowOrder::kInterleavedUpGate;
}

bool FourBit(WeightFormat format) {
  return CodesPerByte(format) == 2;
}

std::vector<WeightLayout> Layouts(WeightFormat format) {
  // The padding is poison between rows and experts.
  std::vector<WeightLayout> layouts = KMajorLayouts(40);
  if (format == WeightFormat::kBf16) {
    WeightLayout layout;
    layout.major = MajorOrder::kMnMajor;
    layouts.push_back(layout);
    layout.map = RowMap::kShuffled64;
    layout.order = RowOrder::kInterleavedUpGate;
    layouts.push_back(layout);
  }
  return layouts;
}

class ForwardLayout : public ::testing::TestWithParam<WeightFormat> {
 protected:
  ForwardLayout() {
    source_.spec = SmallSpec(GetParam(), ActivationFormat::kBf16);
    source_.spec.num_experts = 3;
    source_.spec.intermediate_size = FourBit(GetParam()) ? 256 : 128;
    source_.bias = true;
  }
  WeightSource source_;
};

TEST_P(ForwardLayout, EveryLayoutGivesTheSameBits) {
  LayerInputs inputs(source_.spec, 3);
  inputs.Logits();
  const LayerWeights natural(source_);
  const RunResult wanted = RunLayer(source_.spec, natural.Make(), inputs.get());
  EXPECT_TRUE(MatchesOracle(source_.spec, natural.Make(), inputs.get(), wanted));
  for (const WeightLayout& layout : Layouts(GetParam())) {
    source_.layout = layout;
    const LayerWeights storage(source_);
    const RunResult got = RunLayer(source_.spec, storage.Make(), inputs.get());
    EXPECT_TRUE(storage.Intact());
    if (GetParam() == WeightFormat::kFp8Block128 && Interleaved(layout.order)) {
      // Blocks of 128 fused rows mix gate and up here: other scales, so other values.
      EXPECT_TRUE(MatchesOracle(source_.spec, storage.Make(), inputs.get(), got))
          << ToString(layout);
    } else {
      EXPECT_TRUE(SameBits(got.output, wanted.output)) << ToString(layout);
    }
  }
}

TEST_P(ForwardLayout, AWrongRowOrderIsALargeError) {
  LayerInputs inputs(source_.spec, 8);
  inputs.Logits();
  const LayerWeights storage(source_);
  const RunResult result = RunLayer(source_.spec, storage.Make(), inputs.get());
  WeightsDesc wrong = storage.desc();
  wrong.routed.row_order = RowOrder::kUpGate;
  EXPECT_FALSE(MatchesOracle(source_.spec, Weights(source_.spec, wrong), inputs.get(), result));
}

// Tensor parallelism: shards that start anywhere in a scale block, down to 40 features.
TEST_P(ForwardLayout, ShardsOfTheIntermediateSumToTheWhole) {
  source_.spec.intermediate_size = 320;
  source_.layout.separate = true;
  LayerInputs inputs(source_.spec, 6);
  inputs.Logits();
  const LayerWeights whole(source_);
  const MoeSpec whole_spec = source_.spec;
  ref::LayerRefOptions options;
  const ref::LayerRefPair wanted =
      ref::LayerRefBoth(whole_spec, whole.Make(), inputs.get(), 0, options);
  struct Shard {
    int64_t begin;
    int64_t size;
  };
  const std::vector<Shard> shards = {{0, 40}, {40, 40}, {80, 80}, {160, 96}, {256, 64}};
  Judged judged{{}, wanted.exact.output, wanted.plain.output, whole_spec.hidden_size};
  judged.out.assign(judged.oracle.size(), 0.0);
  source_.shard_of = 320;
  for (const Shard& shard : shards) {
    source_.shard_begin = shard.begin;
    source_.spec.intermediate_size = shard.size;
    source_.gemm2_bias = shard.begin == 0;
    const LayerWeights part(source_);
    const RunResult result = RunLayer(source_.spec, part.Make(), inputs.get());
    EXPECT_TRUE(MatchesOracle(source_.spec, part.Make(), inputs.get(), result))
        << "shard at " << shard.begin;
    const std::vector<double> values = FromBf16(result.output);
    for (size_t i = 0; i < values.size(); ++i) {
      judged.out[i] += values[i];
    }
  }
  // Five roundings of partial sums instead of one.
  for (size_t i = 0; i < judged.plain.size(); ++i) {
    judged.plain[i] = judged.oracle[i] + 3.0 * (judged.plain[i] - judged.oracle[i]);
  }
  EXPECT_TRUE(Accurate(judged, ToleranceOf(ActivationFormat::kBf16)));
}

TEST_P(ForwardLayout, PointersAtMinimumAlignment) {
  LayerInputs inputs(source_.spec, 3);
  inputs.Logits();
  const LayerWeights storage(source_);
  const RunResult wanted = RunLayer(source_.spec, storage.Make(), inputs.get());
  // The hidden states two bytes off every larger alignment, the logits four.
  Arena arena;
  MoeInputs shifted = inputs.get();
  for (TensorView* view : {&shifted.hidden_states, &shifted.logits}) {
    const TensorView source = *view;
    const int64_t size = SizeOf(source.dtype);
    *view = arena.Array(source.dtype, {source.shape[0], source.shape[1]}, size);
    std::copy_n(source.as<const uint8_t>(), source.numel() * size, view->as<uint8_t>());
  }
  WeightsDesc desc = storage.desc();
  TensorView& values = desc.routed.gemm2.values;
  const int64_t bytes = values.numel() * SizeOf(values.dtype);
  GuardedBuffer& moved = arena.Bytes(bytes, SizeOf(values.dtype));
  std::copy_n(values.as<const uint8_t>(), bytes, moved.data());
  values.data = moved.data();
  const RunResult got = RunLayer(source_.spec, Weights(source_.spec, desc), shifted);
  EXPECT_TRUE(SameBits(got.output, wanted.output));
}

INSTANTIATE_TEST_SUITE_P(Formats, ForwardLayout,
                         ::testing::Values(WeightFormat::kBf16, WeightFormat::kFp8Block128,
                                           WeightFormat::kFp8PerTensor,
                                           WeightFormat::kFp8PerChannel, WeightFormat::kMxFp8,
                                           WeightFormat::kNvFp4, WeightFormat::kMxFp4,
                                           WeightFormat::kMxInt4),
                         [](const auto& test) { return std::string(ToString(test.param)); });

TEST(ForwardUngatedLayout, ReadShuffledAndBlockedRows) {
  for (const RowMap map : {RowMap::kNatural, RowMap::kShuffled128, RowMap::kShuffled64}) {
    for (const MajorOrder major : {MajorOrder::kKMajor, MajorOrder::kMnMajor}) {
      WeightSource source;
      source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
      source.spec.activation.kind = ActivationKind::kRelu2;
      source.bias = true;
      LayerInputs inputs(source.spec, 4);
      inputs.Logits();
      const LayerWeights natural(source);
      const RunResult wanted = RunLayer(source.spec, natural.Make(), inputs.get());
      source.layout.map = map;
      source.layout.major = major;
      const LayerWeights storage(source);
      const RunResult got = RunLayer(source.spec, storage.Make(), inputs.get());
      EXPECT_TRUE(SameBits(got.output, wanted.output)) << ToString(source.layout);
    }
  }
}

}  // namespace
}  // namespace hopyard::test
