// SPDX-License-Identifier: Apache-2.0
// The Hopper stages in a row against the layer on the CPU: the same expert ids, outputs within the
// BF16 rule, the same bits at every replay of a CUDA graph and with fewer tokens than its capacity.
#include "tests/gpu/layer_sm90.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "formats/codes.h"

namespace hopyard::test {
namespace {

struct LayerCase {
  std::string name;
  int64_t hidden;
  int64_t intermediate;
  int experts;
  int top_k;
  RoutingRule routing;
};

// Host copies of everything, and the CPU's answer.
class Fixture {
 public:
  Fixture(const LayerCase& layer, int64_t tokens) : tokens_(tokens), random_(11) {
    spec_.hidden_size = layer.hidden;
    spec_.intermediate_size = layer.intermediate;
    spec_.num_experts = layer.experts;
    spec_.top_k = layer.top_k;
    spec_.routing = layer.routing;
    const auto inverse_root = [](int64_t n) { return 1.0F / std::sqrt(static_cast<float>(n)); };
    gemm1 =
        Normal(layer.experts * 2 * layer.intermediate * layer.hidden, inverse_root(layer.hidden));
    gemm2 =
        Normal(layer.experts * layer.hidden * layer.intermediate, inverse_root(layer.intermediate));
    x = Normal(tokens * layer.hidden, 1.0F);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < tokens * layer.experts; ++i) {
      logits.push_back(normal(random_));
    }
    for (int e = 0; e < layer.experts; ++e) {
      bias.push_back(0.1F * normal(random_));
    }
  }

  // Output and ids of the first `count` tokens.
  void RunCpu(int64_t count) {
    WeightsDesc desc;
    const int64_t e = spec_.num_experts;
    desc.routed.gemm1.values = TensorView::Contiguous(
        gemm1.data(), DType::kBf16, {e, 2 * spec_.intermediate_size, spec_.hidden_size});
    desc.routed.gemm2.values = TensorView::Contiguous(
        gemm2.data(), DType::kBf16, {e, spec_.hidden_size, spec_.intermediate_size});
    PlanOptions options;
    options.max_tokens = count;
    const Plan plan = MakePlan(spec_, Device{}, options);
    output.assign(static_cast<size_t>(count * spec_.hidden_size), 0);
    ids.assign(static_cast<size_t>(count * spec_.top_k), 0);
    MoeInputs inputs;
    inputs.hidden_states =
        TensorView::Contiguous(x.data(), DType::kBf16, {count, spec_.hidden_size});
    inputs.logits = TensorView::Contiguous(logits.data(), DType::kFloat32, {count, e});
    if (spec_.routing.use_bias) {
      inputs.routing_bias = TensorView::Contiguous(bias.data(), DType::kFloat32, {e});
    }
    MoeOutputs outputs;
    outputs.output =
        TensorView::Contiguous(output.data(), DType::kBf16, {count, spec_.hidden_size});
    outputs.routing_ids = TensorView::Contiguous(ids.data(), DType::kInt32, {count, spec_.top_k});
    const auto bytes = static_cast<size_t>(plan.workspace_bytes());
    void* const memory = std::aligned_alloc(256, bytes);
    Forward(plan, Weights(spec_, desc), inputs, outputs, {memory, bytes});
    std::free(memory);
  }
  // Worst relative error of a token's row against the CPU's.
  [[nodiscard]] double WorstRow(const std::vector<uint16_t>& got, int64_t count) const {
    double worst = 0.0;
    for (int64_t t = 0; t < count; ++t) {
      double error = 0.0;
      double norm = 0.0;
      for (int64_t c = 0; c < spec_.hidden_size; ++c) {
        const auto at = static_cast<size_t>(t * spec_.hidden_size + c);
        const double want = formats::DecodeBf16(output[at]);
        error += std::pow(formats::DecodeBf16(got[at]) - want, 2);
        norm += want * want;
      }
      const double relative = std::sqrt(error / norm);
      worst = relative <= worst ? worst : relative;  // a NaN stays
    }
    return worst;
  }
  [[nodiscard]] const MoeSpec& spec() const { return spec_; }
  [[nodiscard]] int64_t tokens() const { return tokens_; }

  std::vector<uint16_t> gemm1;
  std::vector<uint16_t> gemm2;
  std::vector<uint16_t> x;
  std::vector<float> logits;
  std::vector<float> bias;
  std::vector<uint16_t> output;
  std::vector<int32_t> ids;

 private:
  std::vector<uint16_t> Normal(int64_t count, float deviation) {
    std::normal_distribution<float> normal(0.0F, deviation);
    std::vector<uint16_t> values(static_cast<size_t>(count));
    for (uint16_t& value : values) {
      value = formats::EncodeBf16(normal(random_));
    }
    return values;
  }

  MoeSpec spec_;
  int64_t tokens_;
  std::mt19937 random_;
};

const std::vector<LayerCase>& Cases() {
  static const std::vector<LayerCase> cases = {
      {"Plain", 256, 128, 8, 2, RoutingRule::Renormalize()},
      {"OddSizes", 200, 104, 12, 3, RoutingRule::Default()},
      {"Grouped", 512, 192, 32, 4, RoutingRule::DeepSeekV3(8, 4, 2.5F)},
      {"TopOne", 384, 704, 5, 1, RoutingRule::Llama4()},
      {"Wide", 1024, 256, 64, 8, RoutingRule::SigmoidRenorm()}};
  return cases;
}

// BF16 products with one rounding of the intermediate and one of each row: hundredths of a percent
// of disagreement between two right answers, 1 % is the rule.
constexpr double kRowTolerance = 0.01;

TEST(LayerSm90, AgreesWithTheCpu) {
  HOPYARD_NEEDS_GPU();
  for (const LayerCase& layer : Cases()) {
    for (const int64_t tokens : {1, 3, 65, 700}) {
      Fixture fixture(layer, tokens);
      fixture.RunCpu(tokens);
      const DeviceArray<uint16_t> gemm1(fixture.gemm1);
      const DeviceArray<uint16_t> gemm2(fixture.gemm2);
      const DeviceArray<uint16_t> x(fixture.x);
      const DeviceArray<float> logits(fixture.logits);
      const DeviceArray<float> bias(fixture.bias);
      for (const int tile : {16, 32, 64, 128}) {
        const DeviceArray<uint16_t> output(tokens * layer.hidden);
        LayerSm90 gpu(fixture.spec(), tokens, tile, gemm1.get(), gemm2.get());
        gpu.Run(x.get(), logits.get(), bias.get(), nullptr, output.get(), nullptr);
        ASSERT_EQ(gpu.ids().Download(), fixture.ids) << layer.name;
        const double worst = fixture.WorstRow(output.Download(), tokens);
        ASSERT_LE(worst, kRowTolerance) << layer.name << " T=" << tokens << " tile " << tile;
        ASSERT_TRUE(output.GuardsIntact());
      }
    }
  }
}

TEST(LayerSm90, GraphOfTheCapacityReplaysWithFewerTokens) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kCapacity = 512;
  const LayerCase& layer = Cases()[2];
  Fixture fixture(layer, kCapacity);
  fixture.RunCpu(kCapacity);
  const DeviceArray<uint16_t> gemm1(fixture.gemm1);
  const DeviceArray<uint16_t> gemm2(fixture.gemm2);
  const DeviceArray<uint16_t> x(fixture.x);
  const DeviceArray<float> logits(fixture.logits);
  const DeviceArray<float> bias(fixture.bias);
  const DeviceArray<int32_t> count(1);
  const DeviceArray<uint16_t> output(kCapacity * layer.hidden);
  LayerSm90 gpu(fixture.spec(), kCapacity, 64, gemm1.get(), gemm2.get());
  const auto run = [&](cudaStream_t stream) {
    gpu.Run(x.get(), logits.get(), bias.get(), count.get(), output.get(), stream);
  };
  const auto set_count = [&](int32_t tokens) {
    HOPYARD_CUDA(cudaMemcpy(count.get(), &tokens, sizeof(tokens), cudaMemcpyHostToDevice));
  };
  set_count(kCapacity);
  run(nullptr);
  const std::vector<uint16_t> eager = output.Download();
  ASSERT_LE(fixture.WorstRow(eager, kCapacity), kRowTolerance);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  HOPYARD_CUDA(cudaStreamCreate(&stream));
  HOPYARD_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  run(stream);
  HOPYARD_CUDA(cudaStreamEndCapture(stream, &graph));
  HOPYARD_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (const int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{17}, int64_t{511}, kCapacity}) {
    set_count(static_cast<int32_t>(tokens));
    HOPYARD_CUDA(cudaMemset(output.get(), 0xFF, static_cast<size_t>(2 * kCapacity * layer.hidden)));
    HOPYARD_CUDA(cudaGraphLaunch(exec, stream));
    HOPYARD_CUDA(cudaStreamSynchronize(stream));
    const std::vector<uint16_t> got = output.Download();
    for (size_t i = 0; i < got.size(); ++i) {
      const bool live = static_cast<int64_t>(i) < tokens * layer.hidden;
      ASSERT_EQ(got[i], live ? eager[i] : 0xFFFF) << "T=" << tokens << " element " << i;
    }
  }
  HOPYARD_CUDA(cudaGraphExecDestroy(exec));
  HOPYARD_CUDA(cudaGraphDestroy(graph));
  HOPYARD_CUDA(cudaStreamDestroy(stream));
}

TEST(LayerSm90, RepeatedLaunchesGiveTheSameBits) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kTokens = 200;
  const LayerCase& layer = Cases()[4];
  const Fixture fixture(layer, kTokens);
  const DeviceArray<uint16_t> gemm1(fixture.gemm1);
  const DeviceArray<uint16_t> gemm2(fixture.gemm2);
  const DeviceArray<uint16_t> x(fixture.x);
  const DeviceArray<float> logits(fixture.logits);
  for (const int tile : {16, 128}) {
    LayerSm90 gpu(fixture.spec(), kTokens, tile, gemm1.get(), gemm2.get());
    std::vector<uint16_t> first;
    for (int round = 0; round < 20; ++round) {
      const DeviceArray<uint16_t> output(kTokens * layer.hidden);
      for (int i = 0; i < 100; ++i) {
        gpu.Run(x.get(), logits.get(), nullptr, nullptr, output.get(), nullptr);
      }
      const std::vector<uint16_t> got = output.Download();
      first = first.empty() ? got : first;
      ASSERT_EQ(got, first) << "round " << round;
    }
  }
}

}  // namespace
}  // namespace hopyard::test
