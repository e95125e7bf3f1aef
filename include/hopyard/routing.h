// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "hopyard/tensor.h"

namespace hopyard {

// A routing method is data: which score ranks the experts, and how the weight of a selected expert
// follows from it. All arithmetic is FP32 whatever the dtype of the logits (docs/numerics.md gives
// the operation sequence). Larger scores win, equal scores are won by the smaller expert id, ids
// come out in descending score order.
enum class RoutingScore : uint8_t {
  kLogit,         // z
  kSoftmax,       // softmax over all experts
  kSigmoid,       // 1 / (1 + exp(-z))
  kSqrtSoftplus,  // sqrt(log(1 + exp(z)))   (DeepSeek-V4)
};

enum class RoutingWeight : uint8_t {
  kScore,            // the score of the selected expert, without bias
  kSoftmaxSelected,  // softmax of the selected logits
  kSigmoidSelected,  // sigmoid of the selected logit
};

// How the selected weights are divided by their sum.
enum class Renormalise : uint8_t {
  kNone,
  kSumPlusEpsilon,  // w * scaling_factor / (sum + 1e-20)
  kSumAtLeast,      // w * scaling_factor / max(sum, 1e-20)
};

struct RoutingRule {
  RoutingScore score = RoutingScore::kLogit;
  RoutingWeight weight = RoutingWeight::kSoftmaxSelected;
  Renormalise renormalise = Renormalise::kNone;
  bool use_bias = false;        // selection ranks score + bias; an absent bias tensor means zeros
  int num_groups = 1;           // > 1: groups of equal size, ranked by their two best biased scores
  int top_groups = 1;           // groups kept; experts of the others cannot be selected
  float scaling_factor = 1.0F;  // multiplies every weight; finite, > 0

  friend bool operator==(const RoutingRule&, const RoutingRule&) = default;

  // The named methods (FlashInfer's RoutingMethodType, same mathematics).
  static RoutingRule Default();           // softmax over all, no renormalisation
  static RoutingRule Renormalize();       // top-k of the logits, softmax of the survivors
  static RoutingRule RenormalizeNaive();  // the same rule under its other name
  static RoutingRule DeepSeekV3(int num_groups, int top_groups, float scaling_factor);
  static RoutingRule Llama4();  // top-1, sigmoid of the logit
  static RoutingRule TopK();    // weight = logit
  static RoutingRule SigmoidRenorm(bool norm_topk_prob = true);
  static RoutingRule MiniMax2(float scaling_factor = 1.0F);
  static RoutingRule Sigmoid();
  static RoutingRule TopKSigmoid();
  static RoutingRule SqrtSoftplus(float scaling_factor = 1.0F);  // DeepSeek-V4
};

[[nodiscard]] std::string ToString(const RoutingRule& rule);

inline constexpr int kMaxExperts = 2048;
inline constexpr int kMaxTopK = 32;

// Inputs of one routing call. Exactly one of these holds:
//   logits                                   select from the logits
//   logits + forced_ids                      replay in: ids given, weights recomputed from logits
//   logits + token_ids + token_to_experts    ids from a table by token id (hash routing)
struct RouteInputs {
  TensorView logits;            // [T, E] f32, bf16 or f16
  TensorView bias;              // [E] f32, bf16 or f16; absent = zeros
  TensorView forced_ids;        // [T, K] i16 or i32 global ids; an id outside [0, E) skips its slot
  TensorView token_ids;         // [T] i32 or i64
  TensorView token_to_experts;  // [vocabulary, K] i32
  TensorView num_tokens;        // [] or [1] i32, at most T; absent = T
};

// Outputs of one routing call. Rows at and beyond num_tokens are never written. A slot that is
// skipped (forced or table id outside [0, E), token id outside the table) gets id -1, weight 0.
// NaN logits rank below every number, and a row that holds one gets NaN weights, valid distinct
// ids.
struct RouteOutputs {
  TensorView expert_ids;   // [T, K] i32 global ids, required
  TensorView weights;      // [T, K] f32 or bf16, required
  TensorView replay;       // [>= T, K] i16, optional: the ids again
  TensorView expert_load;  // [E] i32 or i64, optional: += tokens per expert
};

// Routing alone: logits [T, E] -> expert ids and weights [T, K]. Bit-identical to the routing
// inside Forward. Throws Error{kInvalidArgument} naming the argument; nothing is written then.
// All tensors lie on the device of the logits. On a GPU one kernel is enqueued on `stream`, with
// the bits of the CPU; num_tokens is then clamped to 0 .. T where it is used.
void Route(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
           const RouteOutputs& outputs, Stream stream = {});

// FlashInfer's fused_topk_deepseek: sigmoid + bias, grouped top-k, normalised and scaled weights.
// scores [T, E] f32/bf16/f16; bias [E] f32/bf16/f16; topk_values [T, K] of the dtype of scores;
// topk_indices [T, K] i32; replay [>= T, K] i16 or absent. FlashInfer's compiled limits are lifted.
void FusedTopkDeepseek(const TensorView& scores, const TensorView& bias, const RoutingRule& rule,
                       const TensorView& topk_values, const TensorView& topk_indices,
                       const TensorView& replay, Stream stream = {});

}  // namespace hopyard
