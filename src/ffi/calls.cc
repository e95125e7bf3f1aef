// SPDX-License-Identifier: Apache-2.0
#include "calls.h"

#include <initializer_list>
#include <optional>
#include <string>

namespace hopyard::binding {
namespace {

RoutingInput RoutingInputOf(const std::string& name) {
  if (name == "logits") {
    return RoutingInput::kLogits;
  }
  if (name == "packed") {
    return RoutingInput::kPacked;
  }
  if (name == "unpacked") {
    return RoutingInput::kUnpacked;
  }
  if (name == "replay") {
    return RoutingInput::kReplay;
  }
  if (name == "hash") {
    return RoutingInput::kHash;
  }
  ThrowInvalid("routing is '" + name + "', wanted logits, packed, unpacked, replay or hash");
}

MoeInputs InputsOf(const Fields& fields, ActivationFormat activations) {
  MoeInputs inputs;
  inputs.routing = RoutingInputOf(fields.Text("routing", "logits"));
  inputs.hidden_states = fields.View("hidden_states");
  inputs.hidden_scales = fields.View("hidden_scales");
  if (activations == ActivationFormat::kMxFp8) {
    inputs.hidden_scales = BytesAs(inputs.hidden_scales, DType::kE8m0);
  }
  if (activations == ActivationFormat::kNvFp4 || activations == ActivationFormat::kNvFp4PerToken) {
    inputs.hidden_scales = BytesAs(inputs.hidden_scales, DType::kE4m3);
  } else {
    inputs.hidden_states = BytesAs(inputs.hidden_states, DType::kE4m3);
  }
  inputs.token_scales = fields.View("token_scales");
  inputs.logits = fields.View("logits");
  inputs.routing_bias = fields.View("routing_bias");
  inputs.packed_ids = fields.View("packed_ids");
  inputs.expert_ids = fields.View("expert_ids");
  inputs.expert_weights = fields.View("expert_weights");
  inputs.token_ids = fields.View("token_ids");
  inputs.token_to_experts = fields.View("token_to_experts");
  inputs.shared_weights = fields.View("shared_weights");
  inputs.expert_table = fields.View("expert_table");
  inputs.gemm1_delta = fields.View("gemm1_delta");
  return inputs;
}

MoeOutputs OutputsOf(const Fields& fields) {
  MoeOutputs outputs;
  outputs.output = fields.View("output");
  outputs.accumulate = fields.Get<bool>("accumulate", false);
  outputs.replay = fields.View("replay");
  outputs.expert_load = fields.View("expert_load");
  outputs.routing_weights = fields.View("routing_weights");
  outputs.routing_ids = fields.View("routing_ids");
  outputs.rows = fields.View("rows");
  outputs.slot_to_row = fields.View("slot_to_row");
  outputs.gemm1_activation = fields.View("gemm1_activation");
  return outputs;
}

// A tensor with `per_token` rows for each token.
struct TokenRows {
  const char* name;
  TensorView* view;
  int64_t per_token = 1;
};

// Leaves the first `kept` of `tokens` tokens. `of` names the tensor that has the tokens.
void KeepTokens(std::initializer_list<TokenRows> rows, int64_t kept, int64_t tokens,
                const char* of) {
  if (kept < 0 || kept > tokens) {
    ThrowInvalid("num_tokens=" + std::to_string(kept) + "; wanted 0 .. " + std::to_string(tokens) +
                 ", the rows of " + of);
  }
  for (const TokenRows& row : rows) {
    if (row.view->ndim == 0) {
      continue;
    }
    if (row.view->shape[0] != tokens * row.per_token) {
      ThrowInvalid(std::string(row.name) + " has " + std::to_string(row.view->shape[0]) +
                   " rows; wanted " + std::to_string(tokens * row.per_token) + ", as many as " +
                   of + " has tokens" + (row.per_token > 1 ? " x slots" : ""));
    }
    row.view->shape[0] = kept * row.per_token;
  }
}

}  // namespace

LayerCall LayerCallOf(const MoeSpec& spec, const Fields& inputs, const Fields& outputs) {
  LayerCall call{InputsOf(inputs, spec.activations), OutputsOf(outputs)};
  MoeInputs& in = call.inputs;
  MoeOutputs& out = call.outputs;
  const std::optional<int64_t> kept = inputs.Number("num_tokens");
  if (!kept) {
    in.num_tokens = inputs.View("num_tokens");
    return call;
  }
  const int64_t slots = spec.slots_per_token();
  KeepTokens({{"hidden_states", &in.hidden_states},
              {"hidden_scales", &in.hidden_scales},
              {"token_scales", &in.token_scales},
              {"logits", &in.logits},
              {"packed_ids", &in.packed_ids},
              {"expert_ids", &in.expert_ids},
              {"expert_weights", &in.expert_weights},
              {"token_ids", &in.token_ids},
              {"shared_weights", &in.shared_weights},
              {"gemm1_delta", &in.gemm1_delta},
              {"output", &out.output},
              {"routing_weights", &out.routing_weights},
              {"routing_ids", &out.routing_ids},
              {"slot_to_row", &out.slot_to_row},
              {"rows", &out.rows, slots},
              {"gemm1_activation", &out.gemm1_activation, slots}},
             *kept, in.hidden_states.shape[0], "hidden_states");
  return call;
}

RouteCall RouteCallOf(const Fields& inputs, const Fields& outputs) {
  RouteCall call;
  RouteInputs& in = call.inputs;
  RouteOutputs& out = call.outputs;
  in.logits = inputs.View("logits");
  in.bias = inputs.View("bias");
  in.forced_ids = inputs.View("forced_ids");
  in.token_ids = inputs.View("token_ids");
  in.token_to_experts = inputs.View("token_to_experts");
  out.expert_ids = outputs.View("expert_ids");
  out.weights = outputs.View("weights");
  out.replay = outputs.View("replay");
  out.expert_load = outputs.View("expert_load");
  const std::optional<int64_t> kept = inputs.Number("num_tokens");
  if (!kept) {
    in.num_tokens = inputs.View("num_tokens");
    return call;
  }
  KeepTokens({{"logits", &in.logits},
              {"forced_ids", &in.forced_ids},
              {"token_ids", &in.token_ids},
              {"expert_ids", &out.expert_ids},
              {"weights", &out.weights}},
             *kept, in.logits.shape[0], "logits");
  return call;
}

}  // namespace hopyard::binding
