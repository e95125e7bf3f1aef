// SPDX-License-Identifier: Apache-2.0
#include "calls.h"

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>

namespace hopyard::binding {
namespace {

namespace ffi = tvm::ffi;

constexpr TensorField<MoeInputs> kInputs[] = {
    {"hidden_states", &MoeInputs::hidden_states, Rows::kTokens},
    {"hidden_scales", &MoeInputs::hidden_scales, Rows::kTokens},
    {"token_scales", &MoeInputs::token_scales, Rows::kTokens},
    {"logits", &MoeInputs::logits, Rows::kTokens},
    {"routing_bias", &MoeInputs::routing_bias},
    {"packed_ids", &MoeInputs::packed_ids, Rows::kTokens},
    {"expert_ids", &MoeInputs::expert_ids, Rows::kTokens},
    {"expert_weights", &MoeInputs::expert_weights, Rows::kTokens},
    {"token_ids", &MoeInputs::token_ids, Rows::kTokens},
    {"token_to_experts", &MoeInputs::token_to_experts},
    {"shared_weights", &MoeInputs::shared_weights, Rows::kTokens},
    {"expert_table", &MoeInputs::expert_table},
    {"num_tokens", &MoeInputs::num_tokens},
    {"gemm1_delta", &MoeInputs::gemm1_delta, Rows::kTokens},
};
constexpr TensorField<MoeOutputs> kOutputs[] = {
    {"output", &MoeOutputs::output, Rows::kTokens},
    {"replay", &MoeOutputs::replay},
    {"expert_load", &MoeOutputs::expert_load},
    {"routing_weights", &MoeOutputs::routing_weights, Rows::kTokens},
    {"routing_ids", &MoeOutputs::routing_ids, Rows::kTokens},
    {"slot_to_row", &MoeOutputs::slot_to_row, Rows::kTokens},
    {"rows", &MoeOutputs::rows, Rows::kSlots},
    {"gemm1_activation", &MoeOutputs::gemm1_activation, Rows::kSlots},
};
constexpr TensorField<RouteInputs> kRouteInputs[] = {
    {"logits", &RouteInputs::logits, Rows::kTokens},
    {"bias", &RouteInputs::bias},
    {"forced_ids", &RouteInputs::forced_ids, Rows::kTokens},
    {"token_ids", &RouteInputs::token_ids, Rows::kTokens},
    {"token_to_experts", &RouteInputs::token_to_experts},
    {"num_tokens", &RouteInputs::num_tokens},
};
constexpr TensorField<RouteOutputs> kRouteOutputs[] = {
    {"expert_ids", &RouteOutputs::expert_ids, Rows::kTokens},
    {"weights", &RouteOutputs::weights, Rows::kTokens},
    {"replay", &RouteOutputs::replay},
    {"expert_load", &RouteOutputs::expert_load},
};

template <class Struct, size_t kCount>
const TensorField<Struct>* FindField(const TensorField<Struct> (&table)[kCount],
                                     std::string_view name) {
  const auto* found = std::find_if(std::begin(table), std::end(table),
                                   [&](const auto& field) { return field.name == name; });
  return found == std::end(table) ? nullptr : found;
}

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

// A view of an argument that is a tensor; absent for None.
TensorView ViewOfValue(const ffi::AnyView& value, const char* name) {
  if (value == nullptr) {
    return {};
  }
  const std::optional<ffi::TensorView> tensor = value.try_cast<ffi::TensorView>();
  if (!tensor) {
    ThrowInvalid(std::string(name) + " is a " + value.GetTypeKey() + ", wanted a tensor");
  }
  return ViewOf(*tensor, name);
}

// One-byte numbers of any name as `dtype`: what a format stores is known, and frameworks have
// several names for it.
TensorView CodesAs(TensorView view, DType dtype) {
  if (view.dtype == DType::kE4m3 || view.dtype == DType::kE8m0) {
    view.dtype = DType::kUint8;
  }
  return BytesAs(view, dtype);
}

void NameBytes(MoeInputs& inputs, ActivationFormat activations) {
  const bool fp4 =
      activations == ActivationFormat::kNvFp4 || activations == ActivationFormat::kNvFp4PerToken;
  inputs.hidden_states = CodesAs(inputs.hidden_states, fp4 ? DType::kUint8 : DType::kE4m3);
  if (fp4 || activations == ActivationFormat::kMxFp8) {
    inputs.hidden_scales = CodesAs(inputs.hidden_scales, fp4 ? DType::kE4m3 : DType::kE8m0);
  }
}

// Leaves the first `kept` of `tokens` tokens of the tensors that have rows for each. `of` names the
// tensor that says how many tokens there are.
class TokenLimit {
 public:
  TokenLimit(int64_t kept, int64_t tokens, const char* of) : kept_(kept), tokens_(tokens), of_(of) {
    if (kept < 0 || kept > tokens) {
      ThrowInvalid("num_tokens=" + std::to_string(kept) + "; wanted 0 .. " +
                   std::to_string(tokens) + ", the rows of " + of);
    }
  }

  template <class Struct, size_t kCount>
  void Apply(Struct& tensors, const TensorField<Struct> (&table)[kCount], int64_t slots = 1) const {
    for (const TensorField<Struct>& field : table) {
      TensorView& view = tensors.*field.view;
      if (field.rows == Rows::kOther || view.ndim == 0) {
        continue;
      }
      const int64_t per_token = field.rows == Rows::kSlots ? slots : 1;
      if (view.shape[0] != tokens_ * per_token) {
        ThrowInvalid(std::string(field.name) + " has " + std::to_string(view.shape[0]) +
                     " rows; wanted " + std::to_string(tokens_ * per_token) + ", as many as " +
                     of_ + " has tokens" + (per_token > 1 ? " x slots" : ""));
      }
      view.shape[0] = kept_ * per_token;
    }
  }

 private:
  int64_t kept_;
  int64_t tokens_;
  const char* of_;
};

}  // namespace

LayerFormObj::LayerFormObj(const ffi::Array<ffi::String>& names, const std::string& routing)
    : routing_(RoutingInputOf(routing)) {
  for (const ffi::String& text : names) {
    const std::string name = text;
    Slot slot;
    slot.input = FindField(kInputs, name);
    slot.output = FindField(kOutputs, name);
    slot.accumulate = name == "accumulate";
    if (slot.input == nullptr && slot.output == nullptr && !slot.accumulate && !name.empty()) {
      ThrowInvalid("a layer's call has no field '" + name + "'");
    }
    slots_.push_back(slot);
  }
}

LayerCall LayerFormObj::Read(const MoeSpec& spec, ffi::PackedArgs values) const {
  const auto count = static_cast<int>(slots_.size());
  if (values.size() != count + 2) {
    ThrowInvalid("a call has " + std::to_string(values.size()) + " arguments, its form " +
                 std::to_string(count + 2));
  }
  LayerCall call;
  MoeInputs& in = call.inputs;
  MoeOutputs& out = call.outputs;
  in.routing = routing_;
  in.hidden_states = ViewOfValue(values[0], "hidden_states");
  out.output = ViewOfValue(values[1], "output");
  std::optional<int64_t> kept;
  for (int i = 0; i < count; ++i) {
    const Slot& slot = slots_[static_cast<size_t>(i)];
    const ffi::AnyView value = values[i + 2];
    if (slot.output != nullptr) {
      out.*slot.output->view = ViewOfValue(value, slot.output->name);
    } else if (slot.accumulate) {
      out.accumulate = value.cast<bool>();
    } else if (slot.input != nullptr && slot.input->view == &MoeInputs::num_tokens &&
               value.type_index() == ffi::TypeIndex::kTVMFFIInt) {
      kept = value.cast<int64_t>();
    } else if (slot.input != nullptr) {
      in.*slot.input->view = ViewOfValue(value, slot.input->name);
    }
  }
  NameBytes(in, spec.activations);
  if (kept) {
    const TokenLimit limit(*kept, in.hidden_states.shape[0], "hidden_states");
    limit.Apply(in, kInputs);
    limit.Apply(out, kOutputs, spec.slots_per_token());
  }
  return call;
}

RouteCall RouteCallOf(const Fields& inputs, const Fields& outputs) {
  RouteCall call;
  const std::optional<int64_t> kept = inputs.Number("num_tokens");
  for (const TensorField<RouteInputs>& field : kRouteInputs) {
    if (!kept || field.view != &RouteInputs::num_tokens) {
      call.inputs.*field.view = inputs.View(field.name);
    }
  }
  for (const TensorField<RouteOutputs>& field : kRouteOutputs) {
    call.outputs.*field.view = outputs.View(field.name);
  }
  if (kept) {
    const TokenLimit limit(*kept, call.inputs.logits.shape[0], "logits");
    limit.Apply(call.inputs, kRouteInputs);
    limit.Apply(call.outputs, kRouteOutputs);
  }
  return call;
}

}  // namespace hopyard::binding
