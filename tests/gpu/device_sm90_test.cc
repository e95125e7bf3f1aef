// SPDX-License-Identifier: Apache-2.0
// Memory of a GPU, weights copied into it, and routing alone there.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/device.h"
#include "hopyard/routing.h"

#include "tests/gpu/runner_sm90.h"

namespace hopyard::test {
namespace {

TEST(GpuDevices, MemoryIsZeroAndCopiedBothWays) {
  HOPYARD_NEEDS_GPU();
  ASSERT_GT(CountGpus(), 0);
  EXPECT_EQ(GpuInfoOf(0).compute_major, 9);
  EXPECT_GT(GpuInfoOf(0).free_bytes, 0);
  const DeviceMemory memory(kGpu, 1000);
  std::vector<uint8_t> bytes(1000, 1);
  CopyBytes(bytes.data(), memory.data(), 1000, kGpu);
  EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == 0; }));
  std::fill(bytes.begin(), bytes.end(), uint8_t{9});
  CopyBytes(memory.data(), bytes.data(), 1000, kGpu);
  std::vector<uint8_t> back(1000);
  CopyBytes(back.data(), memory.data(), 1000, kGpu);
  EXPECT_EQ(back, bytes);
  Synchronize(kGpu);
}

class GpuCopies : public ::testing::TestWithParam<WeightFormat> {};

// Rows off 16 bytes and MN-major matrices run as well: the copy is contiguous and K-major.
TEST_P(GpuCopies, OfEveryLayoutGiveTheSameBits) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(GetParam(), ActivationFormat::kBf16);
  source.spec.intermediate_size = CodesPerByte(GetParam()) == 2 ? 256 : 128;
  source.bias = true;
  LayerInputs inputs(source.spec, 21);
  inputs.Logits();
  std::vector<WeightLayout> layouts = KMajorLayouts(40);
  if (GetParam() == WeightFormat::kBf16) {
    layouts.emplace_back().major = MajorOrder::kMnMajor;
  }
  for (const WeightLayout& layout : layouts) {
    SCOPED_TRACE(ToString(layout));
    source.layout = layout;
    const LayerWeights host(source);
    const Weights copy(source.spec, CopyWeights(host.desc(), kGpu));
    const RunResult result = RunOnGpu(copy, inputs.get());
    EXPECT_TRUE(MatchesOracle(source.spec, host.Make(), inputs.get(), result));
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, GpuCopies,
                         ::testing::Values(WeightFormat::kBf16, WeightFormat::kFp8Block128,
                                           WeightFormat::kNvFp4, WeightFormat::kMxFp4),
                         [](const auto& test) { return std::string(ToString(test.param)); });

TEST(GpuRoute, AloneHasTheBitsOfTheCpu) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kTokens = 70;
  constexpr int kExperts = 24;
  constexpr int kTopK = 4;
  std::vector<float> logits(kTokens * kExperts);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(i * 2654435761U % 1000) * 0.01F - 5.0F;
  }
  std::vector<int32_t> ids(kTokens * kTopK);
  std::vector<float> weights(kTokens * kTopK);
  RouteInputs inputs;
  inputs.logits = TensorView::Contiguous(logits.data(), DType::kFloat32, {kTokens, kExperts});
  RouteOutputs outputs;
  outputs.expert_ids = TensorView::Contiguous(ids.data(), DType::kInt32, {kTokens, kTopK});
  outputs.weights = TensorView::Contiguous(weights.data(), DType::kFloat32, {kTokens, kTopK});
  const RoutingRule rule = RoutingRule::DeepSeekV3(6, 3, 2.5F);
  Route(rule, kTopK, inputs, outputs);
  DeviceMirror mirror;
  RouteInputs gpu_inputs = inputs;
  gpu_inputs.logits = mirror.Copy(inputs.logits);
  const DeviceArray<int32_t> gpu_ids(kTokens * kTopK);
  const DeviceArray<float> gpu_weights(kTokens * kTopK);
  RouteOutputs gpu_outputs = outputs;
  gpu_outputs.expert_ids.data = gpu_ids.get();
  gpu_outputs.expert_ids.device = kGpu;
  gpu_outputs.weights.data = gpu_weights.get();
  const Caught mixed = CatchError([&] { Route(rule, kTopK, gpu_inputs, gpu_outputs); });
  EXPECT_EQ(mixed.message,
            "weights is in host memory; wanted memory of cuda:0, the logits' device: copy it "
            "there");
  gpu_outputs.weights.device = kGpu;
  Route(rule, kTopK, gpu_inputs, gpu_outputs);
  EXPECT_EQ(gpu_ids.Download(), ids);
  EXPECT_EQ(gpu_weights.Download(), weights);
}

}  // namespace
}  // namespace hopyard::test
