// SPDX-License-Identifier: Apache-2.0
// Memory of a device, and weights copied into it, as far as the CPU goes.
#include "hopyard/device.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/forward_runner.h"

namespace hopyard::test {
namespace {

constexpr Device kGpu{DeviceKind::kCuda, 0};

bool HasBackend() {
  PlanOptions options;
  options.max_tokens = 1;
  return Explain(SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16), kGpu, options).supported;
}

TEST(Devices, HostMemoryIsAlignedZeroAndShared) {
  DeviceMemory copy;
  EXPECT_EQ(copy.data(), nullptr);
  for (const int64_t bytes : {1, 255, 256, 100000}) {
    const DeviceMemory memory(Device{}, bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % 256, 0U);
    EXPECT_EQ(memory.bytes(), bytes);
    const auto* const first = static_cast<const uint8_t*>(memory.data());
    EXPECT_TRUE(std::all_of(first, first + bytes, [](uint8_t byte) { return byte == 0; }));
    copy = memory;
  }
  const std::vector<uint8_t> source(1000, 7);
  CopyBytes(copy.data(), source.data(), 1000, Device{});
  EXPECT_EQ(static_cast<const uint8_t*>(copy.data())[999], 7);
  EXPECT_EQ(DeviceMemory(Device{}, 0).data(), nullptr);
  CopyBytes(nullptr, nullptr, 0, Device{});
  Synchronize(Device{});
  const Caught negative = CatchError([] { const DeviceMemory memory(Device{}, -1); });
  EXPECT_EQ(negative.message, "bytes=-1; wanted 0 or more");
}

TEST(Devices, GpusAreCountedAndNamed) {
  const int count = CountGpus();
  EXPECT_GE(count, 0);
  for (const int index : {-1, count}) {
    const Caught caught = CatchError([&] { (void)GpuInfoOf(index); });
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
    EXPECT_EQ(caught.message.rfind("index=" + std::to_string(index) + "; ", 0), 0U);
  }
  for (int i = 0; i < count; ++i) {
    EXPECT_FALSE(GpuInfoOf(i).name.empty());
    EXPECT_GT(GpuInfoOf(i).memory_bytes, 0);
  }
}

TEST(Devices, OtherComputeCapabilitiesAreRefusedByName) {
  GpuInfo gpu;
  gpu.name = "NVIDIA A100-SXM4-80GB";
  gpu.compute_major = 8;
  EXPECT_EQ(WhyUnsupported(gpu),
            "the GPU, NVIDIA A100-SXM4-80GB, has compute capability 8.0; wanted 9.0 (H100, H200), "
            "for which the kernels are compiled, or the CPU");
  // Its matrix instructions are the architecture's own: no later one runs them.
  for (const auto& [major, minor] : {std::pair{9, 1}, {10, 0}, {12, 0}, {0, 0}}) {
    gpu.compute_major = major;
    gpu.compute_minor = minor;
    EXPECT_NE(WhyUnsupported(gpu), "") << major << '.' << minor;
  }
  gpu.compute_major = 9;
  gpu.compute_minor = 0;
  EXPECT_EQ(WhyUnsupported(gpu), "");
}

TEST(Devices, ABuildWithoutTheBackendSaysSo) {
  if (HasBackend()) {
    GTEST_SKIP() << "this build has the backend";
  }
  EXPECT_EQ(CountGpus(), 0);
  const auto memory = [] { const DeviceMemory bytes(kGpu, 8); };
  const auto copy = [] { CopyBytes(nullptr, nullptr, 8, kGpu); };
  const auto wait = [] { Synchronize(kGpu); };
  for (const std::function<void()>& action :
       std::vector<std::function<void()>>{memory, copy, wait}) {
    const Caught caught = CatchError(action);
    EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
    EXPECT_EQ(caught.message,
              "this build has no CUDA backend; plan for the CPU, or configure the build with "
              "HOPYARD_CUDA=ON");
  }
}

class CopiedWeights : public ::testing::TestWithParam<WeightFormat> {};

// The original is gone by the time the copy runs.
TEST_P(CopiedWeights, GiveTheSameBitsInEveryLayout) {
  WeightSource source;
  source.spec = SmallSpec(GetParam(), ActivationFormat::kBf16);
  source.spec.num_experts = 3;
  source.spec.intermediate_size = CodesPerByte(GetParam()) == 2 ? 256 : 128;
  source.spec.shared = {1, false, 0.5F, GetParam()};
  source.bias = true;
  LayerInputs inputs(source.spec, 5);
  inputs.Logits();
  std::vector<WeightLayout> layouts = KMajorLayouts(40);
  if (GetParam() == WeightFormat::kBf16) {
    layouts.emplace_back().major = MajorOrder::kMnMajor;
    layouts.emplace_back().major = MajorOrder::kMnMajor;
    layouts.back().per_expert = true;
  }
  for (const WeightLayout& layout : layouts) {
    SCOPED_TRACE(ToString(layout));
    source.layout = layout;
    auto original = std::make_unique<LayerWeights>(source);
    const RunResult wanted = RunLayer(source.spec, original->Make(), inputs.get());
    WeightsDesc desc = original->desc();
    desc.read_only = true;
    const Weights copy(source.spec, CopyWeights(desc, Device{}));
    original.reset();
    EXPECT_TRUE(SameBits(RunLayer(source.spec, copy, inputs.get()).output, wanted.output));
    EXPECT_NE(copy.desc().routed.gemm2.major, MajorOrder::kMnMajor);
    EXPECT_FALSE(copy.desc().read_only);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, CopiedWeights,
                         ::testing::Values(WeightFormat::kBf16, WeightFormat::kFp8Block128,
                                           WeightFormat::kFp8PerChannel, WeightFormat::kNvFp4,
                                           WeightFormat::kMxInt4),
                         [](const auto& test) { return std::string(ToString(test.param)); });

TEST(CopiedWeights, AreTakenFromTheHost) {
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  const LayerWeights layer(source);
  WeightsDesc desc = layer.desc();
  desc.routed.gemm2.values.device = {DeviceKind::kCuda, 1};
  const Caught caught = CatchError([&] { (void)CopyWeights(desc, Device{}); });
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(caught.message,
            "weights are on cuda:1; wanted host memory: copy them from where they were loaded");
}

}  // namespace
}  // namespace hopyard::test
