// SPDX-License-Identifier: Apache-2.0
// The shapes that other libraries' fused layers are tested with: numbers of experts, top_k, rules,
// activations and formats as published, batches small and large, narrower matrices. Sampled tokens
// are judged by the oracle.
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "tests/layer.h"

namespace hopyard::test {
namespace {

struct Row {
  std::string name;
  RoutingRule rule;
  int num_experts = 0;
  int top_k = 0;
  std::vector<FormatPair> pairs;
  std::vector<ActivationKind> activations = {ActivationKind::kSwiGlu};
  DType logits = DType::kFloat32;
  int shared = 0;
  bool weight_on_input = false;

  friend std::ostream& operator<<(std::ostream& out, const Row& row) { return out << row.name; }
};

constexpr FormatPair kBf16{WeightFormat::kBf16, ActivationFormat::kBf16};
constexpr FormatPair kFp8Block{WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128};
constexpr FormatPair kFp8Tensor{WeightFormat::kFp8PerTensor, ActivationFormat::kFp8PerTensor};
constexpr FormatPair kMxFp8{WeightFormat::kMxFp8, ActivationFormat::kMxFp8};
constexpr FormatPair kNvFp4{WeightFormat::kNvFp4, ActivationFormat::kNvFp4};
constexpr FormatPair kMxFp4{WeightFormat::kMxFp4, ActivationFormat::kMxFp8};
constexpr FormatPair kMxFp4Bf16{WeightFormat::kMxFp4, ActivationFormat::kBf16};
constexpr FormatPair kMxInt4{WeightFormat::kMxInt4, ActivationFormat::kBf16};

std::vector<Row> Rows() {
  using K = ActivationKind;
  const std::vector<FormatPair> all = {kBf16,  kFp8Block, kFp8Tensor, kMxFp8,
                                       kNvFp4, kMxFp4,    kMxFp4Bf16, kMxInt4};
  const std::vector<K> glus = {K::kSwiGlu, K::kGeGlu};
  const RoutingRule grouped = RoutingRule::DeepSeekV3(8, 4, 2.5F);
  const RoutingRule flat = RoutingRule::DeepSeekV3(1, 1, 2.5F);
  return {
      {"Renormalize128", RoutingRule::Renormalize(), 128, 8, all, {K::kSwiGlu}, DType::kBf16},
      {"Renormalize512", RoutingRule::Renormalize(), 512, 10, {kFp8Block, kMxFp4}},
      {"Renormalize2048", RoutingRule::Renormalize(), 2048, 32, {kMxFp4Bf16}},
      {"Sigmoid128", RoutingRule::Sigmoid(), 128, 8, {kNvFp4, kMxFp8}, glus},
      {"TopKSigmoid128", RoutingRule::TopKSigmoid(), 128, 8, {kNvFp4, kMxFp4}, glus},
      {"DeepSeek512Relu2", flat, 512, 22, {kBf16, kFp8Tensor, kNvFp4}, {K::kRelu2}},
      {"DeepSeek256", grouped, 256, 8, {kNvFp4, kFp8Block, kMxInt4, kBf16}, glus},
      {"DeepSeek256Shared1", grouped, 256, 8, {kNvFp4, kFp8Block}, {K::kSwiGlu}, DType::kBf16, 1},
      {"DeepSeek256Shared2", grouped, 256, 8, {kMxFp4, kFp8Block}, {K::kSwiGlu}, DType::kBf16, 2},
      {"DeepSeek1024", RoutingRule::DeepSeekV3(1, 1, 1.0F), 1024, 8, {kFp8Block}},
      {"DeepSeek384", flat, 384, 6, {kFp8Block, kBf16, kFp8Tensor, kNvFp4}},
      {"TopK16", RoutingRule::TopK(), 16, 2, {kNvFp4, kMxFp4}, glus, DType::kBf16},
      {"TopK16SiTu", RoutingRule::TopK(), 16, 2, {kNvFp4, kMxFp4}, {K::kSiTu}},
      {"Llama4",
       RoutingRule::Llama4(),
       128,
       1,
       {kFp8Tensor, kNvFp4},
       {K::kSwiGlu},
       DType::kBf16,
       0,
       true},
      {"MiniMax2", RoutingRule::MiniMax2(1.0F), 256, 6, {kFp8Block}},
      {"SigmoidRenorm", RoutingRule::SigmoidRenorm(), 128, 8, {kFp8Block}},
      {"Default", RoutingRule::Default(), 128, 8, {kMxFp8}, {K::kRelu2}},
  };
}

MoeSpec SpecOf(const Row& row, const FormatPair& pair, ActivationKind activation) {
  MoeSpec spec = MiniSpec(pair);
  spec.num_experts = row.num_experts;
  spec.top_k = row.top_k;
  spec.routing = row.rule;
  spec.activation.kind = activation;
  spec.activation.beta.all = activation == ActivationKind::kSiTu ? 25.0F : 0.0F;
  spec.activation.alpha.all = activation == ActivationKind::kSiTu ? 4.0F : 1.0F;
  spec.shared = {row.shared, false, 1.0F, pair.weights};
  spec.router_weight_on_input = row.weight_on_input;
  return spec;
}

class ForwardGrid : public ::testing::TestWithParam<Row> {};

TEST_P(ForwardGrid, SmallAndLargeBatchesMatchOracle) {
  const Row& row = GetParam();
  const int64_t many = SmallTests() || row.num_experts > 1024 ? 150 : 3072;
  for (const ActivationKind activation : row.activations) {
    for (const FormatPair& pair : row.pairs) {
      const TestLayer layer(SpecOf(row, pair, activation));
      for (const int64_t tokens : {int64_t{8}, many}) {
        LayerInputs inputs(layer.spec(), tokens);
        inputs.Logits(row.logits);
        if (row.rule.use_bias) {
          inputs.RoutingBias();
        }
        EXPECT_TRUE(layer.Judge(inputs, layer.Run(inputs), {0, tokens / 3, tokens - 1}))
            << ToString(layer.spec()) << ", " << tokens << " tokens";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, ForwardGrid, ::testing::ValuesIn(Rows()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace hopyard::test
