// SPDX-License-Identifier: Apache-2.0
#include "spec/validate_route.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/error.h"

namespace hopyard::spec {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
// Larger ones mean nothing; with at most 2^31 slots every product of sizes stays below 2^57.
constexpr int64_t kMaxTile = int64_t{1} << 16;
constexpr int64_t kMaxCluster = int64_t{1} << 8;

void CheckGroups(const RoutingRule& rule, int num_experts, int top_k) {
  HOPYARD_CHECK(rule.num_groups >= 1, kInvalidArgument)
      << "num_groups=" << rule.num_groups << "; wanted at least 1 (1 = no groups)";
  HOPYARD_CHECK(rule.top_groups >= 1 && rule.top_groups <= rule.num_groups, kInvalidArgument)
      << "top_groups=" << rule.top_groups << "; wanted 1 .. num_groups=" << rule.num_groups;
  HOPYARD_CHECK(num_experts % rule.num_groups == 0, kInvalidArgument)
      << "num_experts=" << num_experts << " is not divisible by num_groups=" << rule.num_groups
      << "; groups have equal size";
  const int candidates = num_experts / rule.num_groups * rule.top_groups;
  HOPYARD_CHECK(top_k <= candidates, kInvalidArgument)
      << "top_k=" << top_k << " exceeds the " << candidates
      << " experts of top_groups=" << rule.top_groups << " groups (num_experts=" << num_experts
      << ", num_groups=" << rule.num_groups << "); keep more groups or lower top_k";
}

void CheckEnums(const RoutingRule& rule) {
  HOPYARD_CHECK(rule.score <= RoutingScore::kSqrtSoftplus, kInvalidArgument)
      << "rule.score=" << static_cast<int>(rule.score) << " is not a RoutingScore";
  HOPYARD_CHECK(rule.weight <= RoutingWeight::kSigmoidSelected, kInvalidArgument)
      << "rule.weight=" << static_cast<int>(rule.weight) << " is not a RoutingWeight";
  HOPYARD_CHECK(rule.renormalise <= Renormalise::kSumAtLeast, kInvalidArgument)
      << "rule.renormalise=" << static_cast<int>(rule.renormalise) << " is not a Renormalise";
}

void CheckIds(int top_k, int64_t num_tokens, const RouteInputs& inputs, const Place& place) {
  const bool forced = inputs.forced_ids.defined();
  const bool table = inputs.token_ids.defined() || inputs.token_to_experts.defined();
  HOPYARD_CHECK(!forced || !table, kInvalidArgument)
      << "forced_ids and token_ids / token_to_experts are both given; give one source of ids";
  if (forced) {
    place.CheckTensor(inputs.forced_ids,
                      {"forced_ids", {DType::kInt16, DType::kInt32}, {num_tokens, top_k}});
  }
  if (table) {
    place.CheckTensor(inputs.token_ids,
                      {"token_ids", {DType::kInt32, DType::kInt64}, {num_tokens}});
    place.CheckTensor(inputs.token_to_experts, {"token_to_experts", {DType::kInt32}, {-1, top_k}});
  }
}

void CheckNumTokens(const TensorView& num_tokens, int64_t capacity, const Place& place) {
  if (!num_tokens.defined()) {
    return;
  }
  if (num_tokens.ndim == 0) {
    place.CheckTensor(num_tokens, {"num_tokens", {DType::kInt32}, {}});
  } else {
    place.CheckTensor(num_tokens, {"num_tokens", {DType::kInt32}, {1}});
  }
  if (place.device.kind != DeviceKind::kCpu) {
    return;  // the kernel clamps it
  }
  const int32_t value = *num_tokens.as<const int32_t>();
  HOPYARD_CHECK(value >= 0 && value <= capacity, kInvalidArgument)
      << "num_tokens holds " << value << "; wanted 0 .. " << capacity << ", the rows of logits";
}

void CheckBias(const RoutingRule& rule, const TensorView& bias, int num_experts,
               const Place& place) {
  if (!bias.defined()) {
    return;
  }
  HOPYARD_CHECK(rule.use_bias, kInvalidArgument)
      << "bias is given but the rule has use_bias = false, so it would be ignored; drop it or set "
         "use_bias";
  place.CheckTensor(bias, {"bias", {DType::kFloat32, DType::kBf16, DType::kFp16}, {num_experts}});
}

void CheckReplay(const TensorView& replay, int top_k, int64_t num_tokens, const Place& place) {
  if (!replay.defined()) {
    return;
  }
  place.CheckTensor(replay, {"replay", {DType::kInt16}, {-1, top_k}});
  HOPYARD_CHECK(replay.shape[0] >= num_tokens, kInvalidArgument)
      << "replay has " << replay.shape[0] << " rows; wanted at least one per token (" << num_tokens
      << ")";
}

}  // namespace

void ValidateRule(const RoutingRule& rule, int num_experts, int top_k) {
  HOPYARD_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, kInvalidArgument)
      << "num_experts=" << num_experts << "; wanted 1 .. " << kMaxExperts;
  HOPYARD_CHECK(top_k >= 1 && top_k <= kMaxTopK, kInvalidArgument)
      << "top_k=" << top_k << "; wanted 1 .. " << kMaxTopK;
  HOPYARD_CHECK(top_k <= num_experts, kInvalidArgument)
      << "top_k=" << top_k << "; top_k must be between 1 and num_experts=" << num_experts;
  CheckEnums(rule);
  CheckGroups(rule, num_experts, top_k);
  HOPYARD_CHECK(std::isfinite(rule.scaling_factor), kInvalidArgument)
      << "scaling_factor=" << rule.scaling_factor << "; wanted a finite number";
  HOPYARD_CHECK(rule.scaling_factor > 0.0F, kInvalidArgument)
      << "scaling_factor=" << rule.scaling_factor
      << "; wanted more than 0, it multiplies every weight (1 changes none)";
}

void ValidateRoute(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
                   const RouteOutputs& outputs, const Place& place, const RouteNames& names) {
  place.CheckTensor(inputs.logits,
                    {names.logits, {DType::kFloat32, DType::kBf16, DType::kFp16}, {-1, -1}});
  const int64_t num_tokens = inputs.logits.shape[0];
  HOPYARD_CHECK(inputs.logits.shape[1] <= kMaxExperts, kInvalidArgument)
      << names.logits << " have " << inputs.logits.shape[1] << " experts; wanted 1 .. "
      << kMaxExperts;
  const auto num_experts = static_cast<int>(inputs.logits.shape[1]);
  ValidateRule(rule, num_experts, top_k);
  CheckBias(rule, inputs.bias, num_experts, place);
  CheckIds(top_k, num_tokens, inputs, place);
  CheckNumTokens(inputs.num_tokens, num_tokens, place);
  place.CheckTensor(outputs.expert_ids, {names.expert_ids, {DType::kInt32}, {num_tokens, top_k}});
  place.CheckTensor(outputs.weights,
                    {names.weights, {DType::kFloat32, DType::kBf16}, {num_tokens, top_k}});
  CheckReplay(outputs.replay, top_k, num_tokens, place);
  if (outputs.expert_load.defined()) {
    place.CheckTensor(outputs.expert_load,
                      {"expert_load", {DType::kInt32, DType::kInt64}, {num_experts}});
  }
}

void ValidatePermuteOptions(int64_t num_slots, const PermuteOptions& options) {
  HOPYARD_CHECK(num_slots >= 0 && num_slots <= kMaxInt32, kInvalidArgument)
      << "num_slots=" << num_slots << "; wanted 0 .. " << kMaxInt32
      << " (maps are i32): split the tokens into chunks";
  HOPYARD_CHECK(options.num_local_experts >= 1, kInvalidArgument)
      << "num_local_experts=" << options.num_local_experts << "; wanted at least 1";
  HOPYARD_CHECK(options.tile >= 1 && options.tile <= kMaxTile, kInvalidArgument)
      << "tile=" << options.tile << "; wanted 1 .. " << kMaxTile;
  HOPYARD_CHECK(options.cluster >= 1 && options.cluster <= kMaxCluster, kInvalidArgument)
      << "cluster=" << options.cluster << "; wanted 1 .. " << kMaxCluster;
  const int64_t padded = options.tile * options.cluster;
  HOPYARD_CHECK(options.row_alignment == 1 || options.row_alignment == padded, kInvalidArgument)
      << "row_alignment=" << options.row_alignment
      << "; wanted 1 (dense rows) or tile * cluster=" << padded << " (padded rows)";
}

void ValidatePermute(const TensorView& local_slots, const PermuteOptions& options,
                     const PermuteOutputs& outputs) {
  CheckTensor(local_slots, {"local_slots", {DType::kInt32}, {-1, -1}});
  const int64_t num_slots = local_slots.shape[0] * local_slots.shape[1];
  ValidatePermuteOptions(num_slots, options);
  const int64_t max_tiles = MaxTiles(num_slots, options);
  const int64_t max_rows = MaxRows(num_slots, options);
  // Also bounds the row numbers of the empty tiles behind the last row.
  HOPYARD_CHECK(max_tiles <= kMaxInt32 && max_rows <= kMaxInt32 - options.tile * options.cluster,
                kInvalidArgument)
      << num_slots << " slots over " << options.num_local_experts << " experts may need "
      << max_rows << " rows and " << max_tiles << " tiles of " << options.tile << " x "
      << options.cluster << "; both must fit i32: split the tokens into chunks";
  const int64_t experts = options.num_local_experts;
  const auto check = [](const TensorView& tensor, const char* name, int64_t size) {
    CheckTensor(tensor, {name, {DType::kInt32}, {size}});
  };
  check(outputs.expert_offsets, "expert_offsets", experts + 1);
  check(outputs.expert_counts, "expert_counts", experts);
  check(outputs.slot_to_row, "slot_to_row", num_slots);
  check(outputs.row_to_slot, "row_to_slot", max_rows);
  check(outputs.row_to_token, "row_to_token", max_rows);
  check(outputs.tile_expert, "tile_expert", max_tiles);
  check(outputs.tile_row_begin, "tile_row_begin", max_tiles);
  check(outputs.tile_row_end, "tile_row_end", max_tiles);
  check(outputs.num_tiles, "num_tiles", 1);
  check(outputs.num_rows, "num_rows", 1);
}

}  // namespace hopyard::spec
