// SPDX-License-Identifier: Apache-2.0
// The public routing and permutation functions: argument rules, then the backend.
#include <algorithm>
#include <sstream>
#include <string>

#include "hopyard/permute.h"
#include "hopyard/routing.h"

#include "core/error.h"
#include "core/parallel.h"
#include "plan/backend_sm90.h"
#include "spec/names.h"
#include "spec/validate.h"
#include "spec/validate_route.h"
#include "stages/1_route/route.h"
#include "stages/2_permute/permute.h"

namespace hopyard {
namespace {

RoutingRule MakeRule(RoutingScore score, RoutingWeight weight,
                     Renormalise renormalise = Renormalise::kNone) {
  RoutingRule rule;
  rule.score = score;
  rule.weight = weight;
  rule.renormalise = renormalise;
  return rule;
}

// The GPU of the logits, where the ids are on one as well. Without a GPU backend it can only be the
// CPU.
spec::Place PlaceOf(const RouteInputs& inputs, const RouteOutputs& outputs) {
  spec::Place place;
  const bool on_gpu = inputs.logits.device.kind == DeviceKind::kCuda &&
                      outputs.expert_ids.device.kind == DeviceKind::kCuda;
  if (on_gpu && sm90::FindBackend() != nullptr) {
    place.device = inputs.logits.device;
    place.whose = "the logits'";
  }
  return place;
}

void RouteChecked(const sm90::RouteCall& call) {
  if (call.device.kind == DeviceKind::kCpu) {
    route::RouteCpu(*call.rule, call.top_k, *call.inputs, *call.outputs, MaxThreads());
  } else {
    sm90::NeedBackend().Route(call);
  }
}

}  // namespace

RoutingRule RoutingRule::Default() {
  return MakeRule(RoutingScore::kSoftmax, RoutingWeight::kScore);
}

RoutingRule RoutingRule::Renormalize() {
  return MakeRule(RoutingScore::kLogit, RoutingWeight::kSoftmaxSelected);
}

RoutingRule RoutingRule::RenormalizeNaive() {
  return Renormalize();
}

RoutingRule RoutingRule::DeepSeekV3(int num_groups, int top_groups, float scaling_factor) {
  RoutingRule rule = MiniMax2(scaling_factor);
  rule.num_groups = num_groups;
  rule.top_groups = top_groups;
  return rule;
}

RoutingRule RoutingRule::Llama4() {
  return TopKSigmoid();
}

RoutingRule RoutingRule::TopK() {
  return MakeRule(RoutingScore::kLogit, RoutingWeight::kScore);
}

RoutingRule RoutingRule::SigmoidRenorm(bool norm_topk_prob) {
  return MakeRule(RoutingScore::kSigmoid, RoutingWeight::kScore,
                  norm_topk_prob ? Renormalise::kSumAtLeast : Renormalise::kNone);
}

RoutingRule RoutingRule::MiniMax2(float scaling_factor) {
  RoutingRule rule =
      MakeRule(RoutingScore::kSigmoid, RoutingWeight::kScore, Renormalise::kSumPlusEpsilon);
  rule.use_bias = true;
  rule.scaling_factor = scaling_factor;
  return rule;
}

RoutingRule RoutingRule::Sigmoid() {
  return MakeRule(RoutingScore::kSigmoid, RoutingWeight::kScore);
}

RoutingRule RoutingRule::TopKSigmoid() {
  return MakeRule(RoutingScore::kLogit, RoutingWeight::kSigmoidSelected);
}

RoutingRule RoutingRule::SqrtSoftplus(float scaling_factor) {
  RoutingRule rule =
      MakeRule(RoutingScore::kSqrtSoftplus, RoutingWeight::kScore, Renormalise::kSumAtLeast);
  rule.use_bias = true;
  rule.scaling_factor = scaling_factor;
  return rule;
}

std::string ToString(const RoutingRule& rule) {
  std::ostringstream text;
  text << "score=" << spec::NameOf(rule.score) << " weight=" << spec::NameOf(rule.weight)
       << " renormalise=" << spec::NameOf(rule.renormalise)
       << " bias=" << (rule.use_bias ? "yes" : "no") << " groups=" << rule.top_groups << '/'
       << rule.num_groups << " scaling_factor=" << rule.scaling_factor;
  return text.str();
}

void Route(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
           const RouteOutputs& outputs, Stream stream) {
  const spec::Place place = PlaceOf(inputs, outputs);
  spec::ValidateRoute(rule, top_k, inputs, outputs, place);
  RouteChecked({&rule, top_k, &inputs, &outputs, place.device, stream.handle});
}

void FusedTopkDeepseek(const TensorView& scores, const TensorView& bias, const RoutingRule& rule,
                       const TensorView& topk_values, const TensorView& topk_indices,
                       const TensorView& replay, Stream stream) {
  HOPYARD_CHECK(rule.score == RoutingScore::kSigmoid && rule.weight == RoutingWeight::kScore &&
                    rule.renormalise == Renormalise::kSumPlusEpsilon && rule.use_bias,
                kInvalidArgument)
      << "rule is " << ToString(rule)
      << "; fused_topk_deepseek wants RoutingRule::DeepSeekV3 or MiniMax2: use Route for others";
  HOPYARD_CHECK(topk_indices.ndim == 2, kInvalidArgument)
      << "topk_indices has shape " << spec::ShapeString(topk_indices) << "; wanted [T, top_k] i32";
  HOPYARD_CHECK(topk_indices.shape[1] >= 1 && topk_indices.shape[1] <= kMaxTopK, kInvalidArgument)
      << "topk_indices has " << topk_indices.shape[1] << " columns, the top_k; wanted 1 .. "
      << kMaxTopK;
  const auto top_k = static_cast<int>(topk_indices.shape[1]);
  RouteInputs inputs;
  inputs.logits = scores;
  inputs.bias = bias;
  RouteOutputs outputs;
  outputs.expert_ids = topk_indices;
  outputs.replay = replay;
  // Route itself has no f16 weights; here the values follow the scores.
  outputs.weights = topk_values;
  outputs.weights.dtype = topk_values.dtype == DType::kFp16 ? DType::kBf16 : topk_values.dtype;
  const spec::Place place = PlaceOf(inputs, outputs);
  spec::ValidateRoute(rule, top_k, inputs, outputs, place,
                      {"scores", "topk_indices", "topk_values"});
  HOPYARD_CHECK(topk_values.dtype == scores.dtype, kInvalidArgument)
      << "topk_values is " << ToString(topk_values.dtype) << "; wanted the dtype of scores, "
      << ToString(scores.dtype);
  outputs.weights.dtype = topk_values.dtype;
  RouteChecked({&rule, top_k, &inputs, &outputs, place.device, stream.handle});
}

int64_t MaxTiles(int64_t num_slots, const PermuteOptions& options) {
  spec::ValidatePermuteOptions(num_slots, options);
  const int64_t busy = std::min<int64_t>(options.num_local_experts, num_slots);
  return (busy + (num_slots - busy) / (options.tile * options.cluster)) * options.cluster;
}

int64_t MaxRows(int64_t num_slots, const PermuteOptions& options) {
  const int64_t padded = MaxTiles(num_slots, options) * options.tile;
  return options.row_alignment == 1 ? num_slots : padded;
}

void Permute(const TensorView& local_slots, const PermuteOptions& options,
             const PermuteOutputs& outputs) {
  spec::ValidatePermute(local_slots, options, outputs);
  permute::PermuteCpu(local_slots, options, outputs);
}

}  // namespace hopyard
