// SPDX-License-Identifier: Apache-2.0
// Weights on a GPU: every layout gives the same bits or is refused by name, and an update is a
// fresh load.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/runner_sm90.h"
#include "tests/refit.h"

namespace hopyard::test {
namespace {

bool IsInterleaved(RowOrder order) {
  return order == RowOrder::kInterleavedGateUp || order == RowOrder::kInterleavedUpGate;
}

class GpuLayout : public ::testing::TestWithParam<WeightFormat> {
 protected:
  GpuLayout() {
    source_.spec = SmallSpec(GetParam(), ActivationFormat::kBf16);
    source_.spec.num_experts = 3;
    source_.spec.intermediate_size = CodesPerByte(GetParam()) == 2 ? 256 : 128;
    source_.bias = true;
  }
  WeightSource source_;
};

TEST_P(GpuLayout, EveryLayoutGivesTheSameBits) {
  HOPYARD_NEEDS_GPU();
  LayerInputs inputs(source_.spec, 21);
  inputs.Logits();
  const RunResult wanted = TwinLayer(source_).Run(inputs);
  // Whole pieces of 16 bytes between rows, as the copy engine wants.
  for (const WeightLayout& layout : KMajorLayouts(48)) {
    SCOPED_TRACE(ToString(layout));
    source_.layout = layout;
    TwinLayer layer(source_);
    const RunResult got = layer.Run(inputs);
    if (GetParam() == WeightFormat::kFp8Block128 && IsInterleaved(layout.order)) {
      // Blocks of 128 fused rows mix gate and up here: other scales, so other values.
      layer.Judge(inputs, got);
    } else {
      EXPECT_TRUE(SameBits(got.output, wanted.output));
    }
  }
}

// The copy engine reads pieces of 16 bytes: other strides are refused, with the field's name.
TEST_P(GpuLayout, RowsOffSixteenBytesAreRefusedByName) {
  HOPYARD_NEEDS_GPU();
  source_.layout.padding = 40;
  const Caught caught = CatchError([&] { TwinLayer layer(source_); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_EQ(caught.message.rfind("weights.routed.", 0), 0U) << caught.message;
}

// With every size of tile.
TEST(GpuWeights, MnMajorGivesTheSameBits) {
  HOPYARD_NEEDS_GPU();
  for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kRelu2}) {
    WeightSource source;
    source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
    source.spec.intermediate_size = 104;
    source.spec.activation.kind = kind;
    source.bias = true;
    TwinLayer k_major(source);
    source.layout.major = MajorOrder::kMnMajor;
    TwinLayer mn_major(source);
    source.layout.separate = true;
    source.layout.per_expert = true;
    TwinLayer apart(source);
    source.layout.separate = false;
    source.layout.order = RowOrder::kInterleavedGateUp;
    TwinLayer gate_up(source);
    source.layout.order = RowOrder::kInterleavedUpGate;
    TwinLayer up_gate(source);
    const std::vector<int64_t> counts =
        SmallTests() ? std::vector<int64_t>{9} : std::vector<int64_t>{1, 60, 200, 700};
    for (const int64_t tokens : counts) {
      LayerInputs inputs(source.spec, tokens);
      inputs.Logits();
      const RunResult wanted = k_major.Run(inputs);
      EXPECT_TRUE(SameBits(mn_major.Run(inputs).output, wanted.output)) << tokens << " tokens";
      EXPECT_TRUE(SameBits(apart.Run(inputs).output, wanted.output)) << tokens << " tokens, apart";
      EXPECT_TRUE(SameBits(gate_up.Run(inputs).output, wanted.output))
          << tokens << " tokens, gate and up alternate";
      EXPECT_TRUE(SameBits(up_gate.Run(inputs).output, wanted.output))
          << tokens << " tokens, up and gate alternate";
    }
  }
}

// Up begins where no address of the copy engine is; K-major, GEMM2's rows would not either.
TEST(GpuWeights, MnMajorOfOddSizesMatchesOracle) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  source.spec.hidden_size = 248;
  source.layout.major = MajorOrder::kMnMajor;
  source.bias = true;
  for (const RowOrder order : {RowOrder::kGateUp, RowOrder::kInterleavedUpGate}) {
    // Up follows gate in a row and begins on 16 bytes, or is every other column.
    source.spec.intermediate_size = order == RowOrder::kGateUp ? 104 : 100;
    source.layout.order = order;
    TwinLayer layer(source);
    for (const int64_t tokens : {3, 65}) {
      LayerInputs inputs(source.spec, tokens);
      layer.RunAndJudge(inputs.Logits().Delta());
    }
  }
}

TEST(GpuWeights, MnMajorUpOffSixteenBytesIsRefusedByName) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  source.spec.intermediate_size = 100;
  source.layout.major = MajorOrder::kMnMajor;
  source.layout.order = RowOrder::kGateUp;
  const Caught caught = CatchError([&] { TwinLayer layer(source); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_EQ(
      caught.message,
      "weights.routed.gemm1.values: is MN-major and begins at column 100; wanted a multiple of "
      "8 (the copy engine's 16 bytes): pad gate, or store gate and up apart");
}

TEST(GpuWeights, GateAndUpOfDifferentOrdersAreRefusedByName) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  source.layout.major = MajorOrder::kMnMajor;
  source.layout.separate = true;
  const LayerWeights mn(source);
  source.layout.major = MajorOrder::kKMajor;
  const LayerWeights k(source);
  DeviceMirror mirror;
  WeightsDesc desc = mirror.Copy(mn.desc());
  desc.routed.up = mirror.Copy(k.desc()).routed.up;
  const Caught caught = CatchError([&] { const Weights weights(source.spec, desc); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_EQ(caught.message,
            "weights.routed.up is K-major and gate is not; the GPU reads both in one pass: store "
            "them in the same order");
}

class GpuNan : public ::testing::TestWithParam<FormatPair> {
 protected:
  // Runs on both devices what `storage` holds now: the same elements are NaN, some but not all.
  static void Compare(const MoeSpec& spec, const LayerWeights& storage) {
    LayerInputs inputs(spec, 21);
    inputs.Logits();
    DeviceMirror mirror;
    const Weights on_gpu(spec, mirror.Copy(storage.desc()));
    const RunResult got = RunOnGpu(on_gpu, inputs.get());
    const RunResult wanted = RunLayer(spec, storage.Make(), inputs.get());
    const std::vector<uint8_t> activation = Nans(wanted.activation);
    const std::vector<uint8_t> rows = Nans(wanted.rows);
    EXPECT_TRUE(SameBits(Nans(got.activation), activation)) << "gemm1_activation";
    EXPECT_TRUE(SameBits(Nans(got.rows), rows)) << "rows";
    EXPECT_TRUE(SameBits(Nans(got.output), Nans(wanted.output))) << "output";
    EXPECT_NE(std::count(rows.begin(), rows.end(), 1), 0);
    EXPECT_NE(std::count(rows.begin(), rows.end(), 0), 0);
  }
  // The element or scale at byte `at` of an expert's tensor becomes NaN.
  static void Spoil(const TensorView& view, int64_t expert, int64_t at) {
    auto* const bytes = view.as<uint8_t>() + expert * view.strides[0] * SizeOf(view.dtype);
    const int64_t size = SizeOf(view.dtype);
    std::fill_n(bytes + at / size * size, size, uint8_t{0xFF});
  }

 private:
  static std::vector<uint8_t> Nans(const std::vector<uint16_t>& values) {
    std::vector<uint8_t> nans;
    for (const double value : FromBf16(values)) {
      nans.push_back(std::isnan(value) ? 1 : 0);
    }
    return nans;
  }
};

// In each GEMM, a code where the format has one, else a block's scale.
TEST_P(GpuNan, SpoilsWhatItSpoilsOnTheCpu) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(GetParam().weights, GetParam().activations);
  for (const bool second : {false, true}) {
    LayerWeights codes(source);
    ExpertMatrices& matrices = codes.mutable_desc()->routed;
    const MatrixSet& set = second ? matrices.gemm2 : matrices.gemm1;
    if (CodesPerByte(source.spec.weights) == 1) {
      Spoil(set.values, 2, 3 * set.values.strides[1] * SizeOf(set.values.dtype) + 77);
      Compare(source.spec, codes);
    }
    if (set.scales.defined()) {
      LayerWeights scales(source);
      ExpertMatrices& others = scales.mutable_desc()->routed;
      Spoil((second ? others.gemm2 : others.gemm1).scales, 5, 9);
      Compare(source.spec, scales);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuNan, ::testing::ValuesIn(SupportedPairs()),
                         [](const auto& test) { return ToString(test.param); });

// A shard begins on a scale block of columns.
TEST(GpuWeights, ShardsWithinScaleBlocks) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kFp8Block128, ActivationFormat::kBf16);
  source.layout.separate = true;
  source.shard_of = 512;
  source.shard_begin = 256;
  LayerInputs inputs(source.spec, 9);
  inputs.Logits();
  TwinLayer(source).RunAndJudge(inputs);
  source.shard_begin = 64;
  const Caught caught = CatchError([&] { TwinLayer layer(source); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_EQ(
      caught.message,
      "weights.routed.gemm2.col_origin=64; the GPU reads rows from the start of a scale block: "
      "wanted 0, cut shards on multiples of 128 columns");
}

TEST(GpuWeights, ExpertsOfOtherStridesAreRefusedByName) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kMxFp8, ActivationFormat::kBf16);
  source.spec.num_experts = 2;
  source.layout.per_expert = true;
  const LayerWeights storage(source);
  DeviceMirror mirror;
  WeightsDesc desc = mirror.Copy(storage.desc());
  const DeviceArray<uint8_t> wide(int64_t{128} * 256);
  TensorView& scales = desc.routed.gemm2.scales_per_expert.at(1);
  scales.data = wide.get();
  scales.strides[0] = 5;
  const Caught caught = CatchError([&] { const Weights weights(source.spec, desc); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_EQ(
      caught.message,
      "weights.routed.gemm2.scales[1] has 5 elements from row to row; the GPU wants 4, as for "
      "expert 0: copy them to one layout");
}

TEST(GpuWeights, SwizzledScalesInsideAWordAreRefusedByName) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  source.layout.scales = ScaleLayout::kSwizzled128x4;
  source.layout.per_expert = true;
  const LayerWeights storage(source);
  DeviceMirror mirror;
  WeightsDesc desc = mirror.Copy(storage.desc());
  TensorView& scales = desc.routed.gemm2.scales_per_expert.at(0);
  const DeviceArray<uint8_t> moved(scales.numel() + 3);
  scales.data = moved.get() + 3;
  const Caught caught = CatchError([&] { const Weights weights(source.spec, desc); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_EQ(caught.message.rfind("weights.routed.gemm2.scales[0] begins at ", 0), 0U);
  EXPECT_NE(caught.message.find("; the GPU wants a multiple of 4 in the 128x4 layout"),
            std::string::npos)
      << caught.message;
}

INSTANTIATE_TEST_SUITE_P(Formats, GpuLayout,
                         ::testing::Values(WeightFormat::kBf16, WeightFormat::kFp8Block128,
                                           WeightFormat::kFp8PerTensor,
                                           WeightFormat::kFp8PerChannel, WeightFormat::kMxFp8,
                                           WeightFormat::kNvFp4, WeightFormat::kMxFp4,
                                           WeightFormat::kMxInt4),
                         [](const auto& test) { return std::string(ToString(test.param)); });

class GpuUpdate : public ::testing::TestWithParam<UpdateCase> {};

TEST_P(GpuUpdate, SlicesFromHostAndDeviceEqualAFreshLoad) {
  HOPYARD_NEEDS_GPU();
  const WeightSource source = SourceOf(GetParam(), false);
  LayerInputs inputs(source.spec, 11);
  inputs.Logits();
  TwinLayer live(source);
  const RunResult before = live.Run(inputs);
  TwinLayer fresh(SourceOf(GetParam(), true));
  const RunResult wanted = fresh.Run(inputs);
  EXPECT_FALSE(SameBits(before.output, wanted.output));
  cudaStream_t stream = nullptr;
  HOPYARD_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  int count = 0;
  const auto update = [&](const WeightSlice& slice) {
    if (++count % 2 == 0) {
      live.gpu().Update(slice, {stream});
      return;
    }
    DeviceMirror mirror;
    live.gpu().Update(mirror.Copy(slice), {stream});
    HOPYARD_CUDA(cudaStreamSynchronize(stream));
  };
  Refit refit(4);
  refit.AddParts(fresh.storage(), 3, source.layout.separate);
  refit.Apply(HasGlobalScale(GetParam().format), update);
  HOPYARD_CUDA(cudaStreamSynchronize(stream));
  EXPECT_TRUE(SameBits(live.Run(inputs).output, wanted.output));
  HOPYARD_CUDA(cudaStreamDestroy(stream));
}

INSTANTIATE_TEST_SUITE_P(Layouts, GpuUpdate, ::testing::ValuesIn(UpdateCases()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
