// SPDX-License-Identifier: Apache-2.0
// Named MoE layers of published models, as data. The only place, with src/checkpoint, where model
// names appear in code.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "hopyard/spec.h"
#include "hopyard/weights.h"

namespace hopyard::bench {

struct ModelShape {
  std::string_view name;
  MoeSpec spec;  // weights and activations: what the published checkpoint holds
  RowOrder row_order = RowOrder::kGateUp;
  bool biases = false;  // GEMM biases and a linear router bias
};

// Fields that differ between the rows of the table below.
struct ShapeRow {
  std::string_view name;
  int64_t hidden_size;
  int64_t intermediate_size;
  int num_experts;
  int top_k;
  RoutingRule routing;
  WeightFormat weights = WeightFormat::kBf16;
  int shared = 0;
};

inline ActivationFormat DefaultActivations(WeightFormat weights) {
  switch (weights) {
    case WeightFormat::kFp8Block128:
      return ActivationFormat::kFp8Block128;
    case WeightFormat::kFp8PerTensor:
      return ActivationFormat::kFp8PerTensor;
    case WeightFormat::kFp8PerChannel:
      return ActivationFormat::kFp8PerToken;
    case WeightFormat::kBf16:
    case WeightFormat::kMxFp8:
    case WeightFormat::kNvFp4:
    case WeightFormat::kMxFp4:
    case WeightFormat::kMxInt4:
      return ActivationFormat::kBf16;
  }
  return ActivationFormat::kBf16;
}

inline ModelShape MakeShape(const ShapeRow& row) {
  ModelShape shape;
  shape.name = row.name;
  shape.spec.hidden_size = row.hidden_size;
  shape.spec.intermediate_size = row.intermediate_size;
  shape.spec.num_experts = row.num_experts;
  shape.spec.top_k = row.top_k;
  shape.spec.routing = row.routing;
  shape.spec.weights = row.weights;
  shape.spec.activations = DefaultActivations(row.weights);
  shape.spec.shared.count = row.shared;
  shape.spec.shared.weights = row.weights;
  return shape;
}

// Clamped SwiGLU, biases, gate and up rows interleaved.
inline ModelShape MakeGptOss(std::string_view name, int num_experts) {
  ModelShape shape = MakeShape(
      {name, 2880, 2880, num_experts, 4, RoutingRule::Renormalize(), WeightFormat::kMxFp4});
  shape.spec.activation.alpha = {1.702F, {}};
  shape.spec.activation.beta = {1.0F, {}};
  shape.spec.activation.limit = {7.0F, {}};
  shape.row_order = RowOrder::kInterleavedGateUp;
  shape.biases = true;
  return shape;
}

inline ModelShape MakeLlama4Scout() {
  ModelShape shape = MakeShape({.name = "llama-4-scout",
                                .hidden_size = 5120,
                                .intermediate_size = 8192,
                                .num_experts = 16,
                                .top_k = 1,
                                .routing = RoutingRule::Llama4(),
                                .shared = 1});
  shape.spec.router_weight_on_input = true;
  return shape;
}

inline const std::vector<ModelShape>& ModelShapes() {
  constexpr WeightFormat kBf16 = WeightFormat::kBf16;
  constexpr WeightFormat kFp8 = WeightFormat::kFp8Block128;
  // clang-format off
  static const std::vector<ModelShape> shapes = {
      MakeShape({"qwen3-30b-a3b", 2048, 768, 128, 8, RoutingRule::Renormalize(), kBf16}),
      MakeShape({"qwen3-235b-a22b", 4096, 1536, 128, 8, RoutingRule::Renormalize(), kBf16}),
      MakeShape({"deepseek-v3", 7168, 2048, 256, 8, RoutingRule::DeepSeekV3(8, 4, 2.5F), kFp8, 1}),
      // One of eight ranks: 32 experts, eight local choices a token.
      MakeShape({"deepseek-v3-ep8", 7168, 2048, 32, 8, RoutingRule::DeepSeekV3(8, 4, 2.5F), kFp8, 1}),
      MakeShape({"kimi-k2", 7168, 2048, 384, 8, RoutingRule::DeepSeekV3(1, 1, 2.827F), kFp8, 1}),
      MakeGptOss("gpt-oss-20b", 32),
      MakeGptOss("gpt-oss-120b", 128),
      MakeShape({"glm-4.5", 5120, 1536, 160, 8, RoutingRule::DeepSeekV3(1, 1, 2.5F), kBf16, 1}),
      MakeShape({"mixtral-8x7b", 4096, 14336, 8, 2, RoutingRule::Renormalize(), kBf16}),
      MakeLlama4Scout(),
      MakeShape({"minimax-m2", 3072, 1536, 256, 8, RoutingRule::MiniMax2(), kFp8}),
  };
  // clang-format on
  return shapes;
}

inline const ModelShape* FindShape(std::string_view name) {
  for (const ModelShape& shape : ModelShapes()) {
    if (shape.name == name) {
      return &shape;
    }
  }
  return nullptr;
}

inline std::string ShapeNames() {
  std::string names;
  for (const ModelShape& shape : ModelShapes()) {
    names += names.empty() ? "" : ", ";
    names += shape.name;
  }
  return names;
}

}  // namespace hopyard::bench
