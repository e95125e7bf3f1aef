// SPDX-License-Identifier: Apache-2.0
// Every activation, with and without its parameters, in every pair of formats; and the router
// weight on GEMM1's input.
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "formats/codes.h"
#include "tests/layer.h"

namespace hopyard::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct ActivationCase {
  const char* name;
  Activation activation;
};

Activation Plain(ActivationKind kind) {
  Activation activation;
  activation.kind = kind;
  activation.beta.all = kind == ActivationKind::kSiTu ? 1.0F : 0.0F;
  return activation;
}

std::vector<ActivationCase> Activations() {
  using K = ActivationKind;
  std::vector<ActivationCase> cases;
  for (const auto& [name, kind] :
       std::vector<std::pair<const char*, K>>{{"SwiGlu", K::kSwiGlu},
                                              {"GeGlu", K::kGeGlu},
                                              {"GeGluTanh", K::kGeGluTanh},
                                              {"SiTu", K::kSiTu},
                                              {"Relu2", K::kRelu2},
                                              {"Silu", K::kSilu},
                                              {"Gelu", K::kGelu},
                                              {"Identity", K::kIdentity}}) {
    cases.push_back({name, Plain(kind)});
  }
  cases.push_back({"SwiGluOss", {K::kSwiGlu, {1.702F, {}}, {1, {}}, {0.7F, {}}}});
  cases.push_back({"SwiGluPerExpert",
                   {K::kSwiGlu,
                    {1, {0.5F, 1, 1.7F, 3}},
                    {0, {0, 1, -1, 0.5F}},
                    {kInfinity, {kInfinity, 0.5F, 1, 0.1F}}}});
  cases.push_back({"SiTu4And25", {K::kSiTu, {4, {}}, {25, {}}, {kInfinity, {}}}});
  cases.push_back(
      {"SiTuPerExpert",
       {K::kSiTu, {1, {4, 3, 2, 1}}, {1, {1, 2, 3, 4}}, {kInfinity, {kInfinity, 2, 1, 0.5F}}}});
  return cases;
}

class ForwardActivation : public ::testing::TestWithParam<FormatPair> {
 protected:
  static WeightSource Source(const Activation& activation) {
    WeightSource source;
    source.spec = MiniSpec(GetParam());
    source.spec.intermediate_size = 48;
    source.spec.num_experts = 4;
    source.spec.activation = activation;
    return source;
  }
};

TEST_P(ForwardActivation, MatchesOracleWithAndWithoutBias) {
  for (const ActivationCase& c : Activations()) {
    for (const bool bias : {false, true}) {
      WeightSource source = Source(c.activation);
      source.bias = bias;
      source.layout.bias_dtype = bias ? DType::kBf16 : DType::kFloat32;
      const TestLayer layer(source);
      LayerInputs inputs(source.spec, 9);
      inputs.Logits();
      EXPECT_TRUE(layer.RunAndJudge(inputs)) << c.name << (bias ? " with bias" : "");
    }
  }
}

// Parameters act on the true value of GEMM1 whatever the scales of the formats: a layer with them
// is not the layer without.
TEST_P(ForwardActivation, ParametersMatterAndTheirDefaultsDoNot) {
  const Activation plain = Plain(ActivationKind::kSwiGlu);
  const TestLayer layer(Source(plain));
  LayerInputs inputs(layer.spec(), 6);
  inputs.Logits();
  const RunResult result = layer.Run(inputs);
  Activation defaults = plain;
  defaults.alpha.each.assign(4, 1.0F);
  defaults.beta.each.assign(4, 0.0F);
  defaults.limit.each.assign(4, kInfinity);
  EXPECT_TRUE(SameBits(TestLayer(Source(defaults)).Run(inputs).output, result.output));
  for (const Activation& other : {Activation{plain.kind, {-1, {}}, plain.beta, plain.limit},
                                  Activation{plain.kind, plain.alpha, {2, {}}, plain.limit},
                                  Activation{plain.kind, plain.alpha, plain.beta, {0.3F, {}}}}) {
    const TestLayer changed(Source(other));
    EXPECT_FALSE(changed.Judge(inputs, result));
    EXPECT_TRUE(changed.RunAndJudge(inputs));
  }
}

// Tensors of parameters give the bits of the spec's values, for shared experts too, and are read by
// every call: what they hold then decides.
TEST_P(ForwardActivation, ParametersAsTensorsAreReadByEveryCall) {
  for (const ActivationCase& c : Activations()) {
    if (c.activation.kind != ActivationKind::kSwiGlu &&
        c.activation.kind != ActivationKind::kSiTu) {
      continue;
    }
    WeightSource source = Source(c.activation);
    source.spec.shared.count = 1;
    source.spec.shared.weights = source.spec.weights;
    LayerInputs inputs(source.spec, 6);
    inputs.Logits();
    const RunResult wanted = TestLayer(source).Run(inputs);
    source.parameter_tensors = true;
    source.spec.activation = Plain(c.activation.kind);  // what the tensors hold counts instead
    LayerWeights stored(source);
    const Weights weights = stored.Make();
    RunOptions options;
    options.plan.num_threads = 1;
    const auto fill = [](const TensorView& to, const PerExpert& from, bool routed) {
      for (int64_t e = 0; e < to.numel(); ++e) {
        to.as<float>()[e] = routed ? from.at(e) : from.all;
      }
    };
    for (const bool routed : {true, false}) {
      const ExpertMatrices& group = routed ? stored.desc().routed : stored.desc().shared;
      fill(group.alpha, c.activation.alpha, routed);
      fill(group.beta, c.activation.beta, routed);
      fill(group.limit, c.activation.limit, routed);
    }
    const RunResult result = RunLayer(source.spec, weights, inputs.get(), options);
    EXPECT_TRUE(SameBits(result.output, wanted.output)) << c.name;
    EXPECT_TRUE(MatchesOracle(source.spec, weights, inputs.get(), result, {})) << c.name;
  }
}

// Logits whose largest sigmoid is far from 1, so that it matters where the weight goes.
void ShiftLogits(const LayerInputs& inputs, float by) {
  const TensorView& logits = inputs.get().logits;
  for (int64_t i = 0; i < logits.numel(); ++i) {
    uint16_t& bits = logits.as<uint16_t>()[i];
    bits = formats::EncodeBf16(formats::DecodeBf16(bits) + by);
  }
}

// The Llama-4 grid: one expert per token, its sigmoid on the input of GEMM1.
TEST_P(ForwardActivation, RouterWeightOnInputMatchesOracle) {
  MoeSpec spec = MiniSpec(GetParam());
  spec.hidden_size = 192;  // one expert alone: fewer columns would not average its roundings
  spec.intermediate_size = 96;
  spec.routing = RoutingRule::Llama4();
  spec.router_weight_on_input = true;
  spec.num_experts = 16;
  spec.top_k = 1;
  const int64_t many = SmallTests() ? 40 : 768;
  for (const bool bias : {false, true}) {
    const TestLayer layer(spec, bias);
    for (const int64_t tokens : {int64_t{1}, int64_t{8}, many}) {
      LayerInputs inputs(spec, tokens);
      inputs.Logits(DType::kBf16);
      ShiftLogits(inputs, -1.5F);
      const RunResult result = layer.Run(inputs);
      std::vector<int64_t> sampled;
      for (int64_t t = 0; t < tokens; t += 1 + tokens / 9) {
        sampled.push_back(t);
      }
      EXPECT_TRUE(layer.Judge(inputs, result, sampled)) << tokens << " tokens";
      MoeSpec usual = spec;
      usual.router_weight_on_input = false;
      EXPECT_TRUE(tokens == 1 ||
                  !MatchesOracle(usual, layer.weights(), inputs.get(), result, sampled))
          << "the weight must matter where it is";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, ForwardActivation, ::testing::ValuesIn(SupportedPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
