// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "hopyard/routing.h"

namespace hopyard {

// A parameter with one value for all experts, or one per local expert.
struct PerExpert {
  float all = 0.0F;
  std::vector<float> each;  // empty: `all` holds; otherwise one value per local expert

  [[nodiscard]] float at(int64_t expert) const {
    return each.empty() ? all : each[static_cast<size_t>(expert)];
  }
  friend bool operator==(const PerExpert&, const PerExpert&) = default;
};

// x1 = gate, x0 = up; see docs/numerics.md for the formulas (spec 4.6).
enum class ActivationKind : uint8_t {
  kSwiGlu,     // (x0 + beta) * x1 * sigmoid(alpha * x1), x1 <= limit, |x0| <= limit
  kGeGlu,      // x0 * x1 * Phi(x1), exact
  kGeGluTanh,  // x0 * gelu_tanh(x1)
  kSiTu,       // beta * tanh(x0 / beta) * alpha * tanh(x1 / alpha) * sigmoid(x1), clamped as SwiGLU
  kRelu2,      // max(x, 0)^2, not gated
  kSilu,       // x * sigmoid(x), not gated
  kGelu,       // x * Phi(x), not gated
  kIdentity,   // x, not gated
};

[[nodiscard]] constexpr bool IsGated(ActivationKind kind) {
  return kind == ActivationKind::kSwiGlu || kind == ActivationKind::kGeGlu ||
         kind == ActivationKind::kGeGluTanh || kind == ActivationKind::kSiTu;
}

// Parameters are in natural units: they act on the true GEMM1 value, after every scale.
struct Activation {
  ActivationKind kind = ActivationKind::kSwiGlu;
  PerExpert alpha{1.0F, {}};
  PerExpert beta{0.0F, {}};  // SiTU needs a positive beta
  PerExpert limit{std::numeric_limits<float>::infinity(), {}};

  friend bool operator==(const Activation&, const Activation&) = default;
};

enum class WeightFormat : uint8_t {
  kBf16,
  kFp8Block128,
  kFp8PerTensor,
  kFp8PerChannel,
  kMxFp8,
  kNvFp4,
  kMxFp4,
  kMxInt4,
};

// Format that activations are rounded to before each GEMM. The intermediate between the GEMMs
// follows from it (spec 4.7): bf16; e4m3 per tensor (static scale); e4m3 1x128; mxfp8; nvfp4.
enum class ActivationFormat : uint8_t {
  kBf16,
  kFp8Block128,   // e4m3, f32 scale per token and 128 columns
  kFp8PerTensor,  // e4m3, static scale from Weights
  kFp8PerToken,   // e4m3, f32 scale per token; intermediate 1x128
  kMxFp8,
  kNvFp4,          // static global scale from Weights
  kNvFp4PerToken,  // global scale per token, dynamic
};

// Which experts live on this rank. `kRange`: logical ids [offset, offset + count). `kTable`: a
// table [num_experts] i32 logical id -> local slot (-1 = remote), given per call and read at run
// time.
struct ExpertMap {
  enum class Kind : uint8_t { kAll, kRange, kTable };
  Kind kind = Kind::kAll;
  int offset = 0;
  int count = 0;  // local experts; kTable: local slots

  friend bool operator==(const ExpertMap&, const ExpertMap&) = default;
};

// Experts that every token takes, appended as slots top_k .. top_k + count - 1. They are not
// recorded in replay. Under expert parallelism give them to one rank only: outputs are summed.
struct SharedExperts {
  int count = 0;
  bool per_token_weight = false;  // weights from MoeInputs::shared_weights [T, count]
  float weight = 1.0F;            // otherwise this constant
  WeightFormat weights = WeightFormat::kBf16;

  friend bool operator==(const SharedExperts&, const SharedExperts&) = default;
};

// The layer, as a model's config states it. Shapes: hidden states [T, hidden_size]; GEMM1
// [f * intermediate_size, hidden_size] per expert, f = 2 when the activation is gated; GEMM2
// [hidden_size, intermediate_size].
struct MoeSpec {
  uint32_t struct_size = sizeof(MoeSpec);
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int num_experts = 0;
  int top_k = 0;
  RoutingRule routing;
  Activation activation;
  WeightFormat weights = WeightFormat::kBf16;
  ActivationFormat activations = ActivationFormat::kBf16;
  ExpertMap local;
  SharedExperts shared;
  bool router_weight_on_input = false;  // Llama-4: the weight scales GEMM1's input, finalize uses 1

  [[nodiscard]] int num_local_experts() const {
    return local.kind == ExpertMap::Kind::kAll ? num_experts : local.count;
  }
  [[nodiscard]] int slots_per_token() const { return top_k + shared.count; }
  [[nodiscard]] int64_t gemm1_rows() const {
    return (IsGated(activation.kind) ? 2 : 1) * intermediate_size;
  }
  friend bool operator==(const MoeSpec&, const MoeSpec&) = default;
};

[[nodiscard]] std::string_view ToString(ActivationKind kind);
[[nodiscard]] std::string_view ToString(WeightFormat format);      // "mxfp4", ...
[[nodiscard]] std::string_view ToString(ActivationFormat format);  // "bf16", ...
[[nodiscard]] std::string ToString(const MoeSpec& spec);           // one line
// Inverse of the names above; Error{kInvalidArgument} lists the known names.
[[nodiscard]] ActivationKind ParseActivationKind(std::string_view name);
[[nodiscard]] WeightFormat ParseWeightFormat(std::string_view name);
[[nodiscard]] ActivationFormat ParseActivationFormat(std::string_view name);

}  // namespace hopyard
