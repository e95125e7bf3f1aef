// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "core/shape.h"
#include "formats/format_rules.h"
#include "spec/validate.h"

namespace hopyard::spec {
namespace {

void CheckAbsent(const TensorView& tensor, const char* name, const char* why) {
  HOPYARD_CHECK(!tensor.defined(), kInvalidArgument)
      << name << " is given, but " << why << "; leave it absent";
}

void CheckHidden(const MoeSpec& spec, const MoeInputs& inputs, const Place& place) {
  const TensorView& hidden = inputs.hidden_states;
  HOPYARD_CHECK(hidden.defined(), kInvalidArgument)
      << "hidden_states is missing; wanted bf16 [T, " << spec.hidden_size << "]";
  HOPYARD_CHECK(hidden.ndim == 2, kInvalidArgument)
      << "hidden_states has shape " << ShapeString(hidden) << "; wanted [T, " << spec.hidden_size
      << "]: flatten leading dimensions";
  HOPYARD_CHECK(hidden.dtype != DType::kFp16, kUnsupported)
      << "hidden_states is f16; wanted bf16 or codes of the plan's activation format: convert to "
         "bf16";
  const int64_t tokens = hidden.shape[0];
  if (hidden.dtype == DType::kBf16) {
    place.CheckTensor(hidden, {"hidden_states", {DType::kBf16}, {tokens, spec.hidden_size}});
    CheckAbsent(inputs.hidden_scales, "hidden_scales", "hidden_states is bf16");
    CheckAbsent(inputs.token_scales, "token_scales", "hidden_states is bf16");
    return;
  }
  const int64_t h = spec.hidden_size;
  const char* scales = "hidden_scales";
  switch (spec.activations) {
    case ActivationFormat::kBf16:
      place.CheckTensor(hidden, {"hidden_states", {DType::kBf16}, {tokens, h}});
      return;
    case ActivationFormat::kNvFp4:
    case ActivationFormat::kNvFp4PerToken:
      place.CheckTensor(hidden, {"hidden_states", {DType::kBf16, DType::kUint8}, {tokens, h / 2}});
      place.CheckTensor(inputs.hidden_scales, {scales, {DType::kE4m3}, {tokens, CeilDiv(h, 16)}});
      if (spec.activations == ActivationFormat::kNvFp4PerToken) {
        place.CheckTensor(inputs.token_scales, {"token_scales", {DType::kFloat32}, {tokens}});
      } else {
        CheckAbsent(inputs.token_scales, "token_scales",
                    "nvfp4 activations have one static global scale in the weights");
      }
      return;
    default:
      break;
  }
  place.CheckTensor(hidden, {"hidden_states", {DType::kBf16, DType::kE4m3}, {tokens, h}});
  CheckAbsent(inputs.token_scales, "token_scales", "only nvfp4_per_token activations have them");
  if (spec.activations == ActivationFormat::kFp8Block128) {
    place.CheckTensor(inputs.hidden_scales, {scales, {DType::kFloat32}, {tokens, CeilDiv(h, 128)}});
  } else if (spec.activations == ActivationFormat::kFp8PerToken) {
    place.CheckTensor(inputs.hidden_scales, {scales, {DType::kFloat32}, {tokens}});
  } else if (spec.activations == ActivationFormat::kMxFp8) {
    place.CheckTensor(inputs.hidden_scales, {scales, {DType::kE8m0}, {tokens, CeilDiv(h, 32)}});
  } else {
    CheckAbsent(inputs.hidden_scales, scales, "fp8_per_tensor has one static scale in the weights");
  }
}

void CheckLogits(const MoeSpec& spec, const MoeInputs& inputs, int64_t tokens, const Place& place) {
  place.CheckTensor(inputs.logits,
                    {"logits", {DType::kFloat32, DType::kBf16}, {tokens, spec.num_experts}});
  if (inputs.routing_bias.defined()) {
    HOPYARD_CHECK(spec.routing.use_bias, kInvalidArgument)
        << "routing_bias is given, but the routing rule (" << ToString(spec.routing)
        << ") uses none; leave it absent or set routing.use_bias";
    place.CheckTensor(inputs.routing_bias,
                      {"routing_bias", {DType::kFloat32, DType::kBf16}, {spec.num_experts}});
  }
}

constexpr const char* kModeNames[] = {"kLogits", "kPacked", "kUnpacked", "kReplay", "kHash"};
constexpr const char* kModeFields[] = {"logits", "packed_ids", "expert_ids and expert_weights",
                                       "logits and expert_ids",
                                       "logits, token_ids and token_to_experts"};

// A field that the mode does not read would be ignored in silence: refused instead.
void CheckUnusedFields(const MoeInputs& inputs) {
  const RoutingInput mode = inputs.routing;
  const bool scored =
      mode == RoutingInput::kLogits || mode == RoutingInput::kReplay || mode == RoutingInput::kHash;
  const bool unpacked = mode == RoutingInput::kUnpacked;
  const bool hash = mode == RoutingInput::kHash;
  const struct {
    const TensorView& tensor;
    const char* name;
    bool used;
  } fields[] = {{inputs.logits, "logits", scored},
                {inputs.routing_bias, "routing_bias", scored},
                {inputs.packed_ids, "packed_ids", mode == RoutingInput::kPacked},
                {inputs.expert_ids, "expert_ids", unpacked || mode == RoutingInput::kReplay},
                {inputs.expert_weights, "expert_weights", unpacked},
                {inputs.token_ids, "token_ids", hash},
                {inputs.token_to_experts, "token_to_experts", hash}};
  for (const auto& field : fields) {
    HOPYARD_CHECK(field.used || !field.tensor.defined(), kInvalidArgument)
        << field.name << " is given, but inputs.routing is " << kModeNames[static_cast<int>(mode)]
        << ", which takes " << kModeFields[static_cast<int>(mode)]
        << "; leave it absent or choose the mode that reads it";
  }
}

void CheckMode(RoutingInput mode) {
  HOPYARD_CHECK(mode != RoutingInput::kPermuted, kUnsupported)
      << "inputs.routing is kPermuted (rows already in expert order), which is reserved; give "
         "tokens with logits or ids";
  HOPYARD_CHECK(mode != RoutingInput::kBatched, kUnsupported)
      << "inputs.routing is kBatched ([experts, max_rows, H] with counts), which is reserved; give "
         "tokens with logits or ids";
  HOPYARD_CHECK(mode <= RoutingInput::kHash, kInvalidArgument)
      << "inputs.routing=" << static_cast<int>(mode) << " is not a RoutingInput; wanted 0 .. "
      << static_cast<int>(RoutingInput::kHash);
}

void CheckRoutingInput(const MoeSpec& spec, const MoeInputs& inputs, int64_t tokens,
                       const Place& place) {
  const int64_t k = spec.top_k;
  CheckMode(inputs.routing);
  CheckUnusedFields(inputs);
  switch (inputs.routing) {
    case RoutingInput::kPacked:
      place.CheckTensor(inputs.packed_ids, {"packed_ids", {DType::kInt32}, {tokens, k}});
      return;
    case RoutingInput::kUnpacked:
      place.CheckTensor(inputs.expert_ids, {"expert_ids", {DType::kInt32}, {tokens, k}});
      place.CheckTensor(inputs.expert_weights,
                        {"expert_weights", {DType::kFloat32, DType::kBf16}, {tokens, k}});
      return;
    case RoutingInput::kReplay:
      place.CheckTensor(inputs.expert_ids,
                        {"expert_ids", {DType::kInt16, DType::kInt32}, {tokens, k}});
      break;
    case RoutingInput::kHash:
      place.CheckTensor(inputs.token_ids, {"token_ids", {DType::kInt32, DType::kInt64}, {tokens}});
      place.CheckTensor(inputs.token_to_experts, {"token_to_experts", {DType::kInt32}, {-1, k}});
      break;
    default:
      break;
  }
  CheckLogits(spec, inputs, tokens, place);
}

void CheckOptionalInputs(const MoeSpec& spec, const MoeInputs& inputs, int64_t tokens,
                         const Place& place) {
  if (spec.local.kind == ExpertMap::Kind::kTable) {
    place.CheckTensor(inputs.expert_table, {"expert_table", {DType::kInt32}, {spec.num_experts}});
  } else {
    CheckAbsent(inputs.expert_table, "expert_table", "spec.local is not a table");
  }
  if (spec.shared.per_token_weight && spec.shared.count > 0) {
    place.CheckTensor(
        inputs.shared_weights,
        {"shared_weights", {DType::kFloat32, DType::kBf16}, {tokens, spec.shared.count}});
  } else {
    CheckAbsent(inputs.shared_weights, "shared_weights",
                "the spec has no shared experts with per-token weights");
  }
  if (inputs.gemm1_delta.defined()) {
    HOPYARD_CHECK(IsGated(spec.activation.kind), kUnsupported)
        << "gemm1_delta requires a gated activation; got " << ToString(spec.activation.kind)
        << ": merge the adapter into the weights (Weights::Update)";
    place.CheckTensor(inputs.gemm1_delta,
                      {"gemm1_delta", {DType::kBf16}, {tokens, spec.top_k, spec.gemm1_rows()}});
  }
  if (inputs.num_tokens.defined()) {
    inputs.num_tokens.ndim == 0
        ? place.CheckTensor(inputs.num_tokens, {"num_tokens", {DType::kInt32}, {}})
        : place.CheckTensor(inputs.num_tokens, {"num_tokens", {DType::kInt32}, {1}});
    if (place.device.kind != DeviceKind::kCpu) {
      return;  // the kernels clamp it
    }
    const int32_t count = *inputs.num_tokens.as<int32_t>();
    HOPYARD_CHECK(count >= 0 && count <= tokens, kInvalidArgument)
        << "num_tokens=" << count << "; wanted 0 .. " << tokens << ", the rows of hidden_states";
  }
}

void CheckReplay(const MoeSpec& spec, const TensorView& replay, int64_t tokens,
                 const Place& place) {
  if (!replay.defined()) {
    return;
  }
  place.CheckTensor(replay, {"replay", {DType::kInt16}, {-1, spec.top_k}});
  HOPYARD_CHECK(replay.shape[0] >= tokens, kInvalidArgument)
      << "replay has " << replay.shape[0] << " rows; wanted at least " << tokens
      << ", one per token";
}

void CheckOutputs(const MoeSpec& spec, const MoeOutputs& outputs, int64_t tokens,
                  const Place& place) {
  const int64_t slots = spec.slots_per_token();
  HOPYARD_CHECK(outputs.output.defined() || outputs.rows.defined(), kInvalidArgument)
      << "outputs have neither output nor rows; give one of them, or nothing is computed";
  HOPYARD_CHECK(!outputs.accumulate || outputs.output.defined(), kInvalidArgument)
      << "outputs.accumulate is set, but output is missing; give the tensor to add to";
  if (outputs.output.defined()) {
    place.CheckTensor(outputs.output, {"output", {DType::kBf16}, {tokens, -1}});
    HOPYARD_CHECK(outputs.output.shape[1] >= 1 && outputs.output.shape[1] <= spec.hidden_size,
                  kInvalidArgument)
        << "output has " << outputs.output.shape[1] << " columns; wanted 1 .. " << spec.hidden_size;
  }
  CheckReplay(spec, outputs.replay, tokens, place);
  if (outputs.expert_load.defined()) {
    place.CheckTensor(outputs.expert_load,
                      {"expert_load", {DType::kInt32, DType::kInt64}, {spec.num_experts}});
  }
  if (outputs.routing_weights.defined()) {
    place.CheckTensor(outputs.routing_weights,
                      {"routing_weights", {DType::kFloat32}, {tokens, slots}});
  }
  if (outputs.routing_ids.defined()) {
    place.CheckTensor(outputs.routing_ids, {"routing_ids", {DType::kInt32}, {tokens, slots}});
  }
  if (outputs.rows.defined()) {
    place.CheckTensor(outputs.rows, {"rows", {DType::kBf16}, {tokens * slots, spec.hidden_size}});
    HOPYARD_CHECK(outputs.slot_to_row.defined(), kInvalidArgument)
        << "slot_to_row is missing; wanted i32 [" << tokens << ", " << slots
        << "], rows are of no use without it";
  }
  if (outputs.slot_to_row.defined()) {
    place.CheckTensor(outputs.slot_to_row, {"slot_to_row", {DType::kInt32}, {tokens, slots}});
  }
  if (outputs.gemm1_activation.defined()) {
    place.CheckTensor(
        outputs.gemm1_activation,
        {"gemm1_activation", {DType::kBf16}, {tokens * slots, spec.intermediate_size}});
  }
}

}  // namespace

void ValidateForward(const MoeSpec& spec, int64_t max_tokens, const MoeInputs& inputs,
                     const MoeOutputs& outputs, const Place& place) {
  HOPYARD_CHECK(inputs.struct_size == sizeof(MoeInputs), kInvalidArgument)
      << "MoeInputs.struct_size=" << inputs.struct_size << "; this library knows "
      << sizeof(MoeInputs) << ": compile against its headers";
  HOPYARD_CHECK(outputs.struct_size == sizeof(MoeOutputs), kInvalidArgument)
      << "MoeOutputs.struct_size=" << outputs.struct_size << "; this library knows "
      << sizeof(MoeOutputs) << ": compile against its headers";
  CheckHidden(spec, inputs, place);
  const int64_t tokens = inputs.hidden_states.shape[0];
  HOPYARD_CHECK(tokens <= max_tokens, kInvalidArgument)
      << "hidden_states has " << tokens
      << " tokens; the plan was made for max_tokens=" << max_tokens << ", make a larger plan";
  CheckRoutingInput(spec, inputs, tokens, place);
  CheckOptionalInputs(spec, inputs, tokens, place);
  CheckOutputs(spec, outputs, tokens, place);
}

}  // namespace hopyard::spec
