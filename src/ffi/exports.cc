// SPDX-License-Identifier: Apache-2.0
// The twelve functions of the extension module. Python (python/hopyard) is their only caller: it
// fills in defaults and converts arrays, so a field that is missing here is a field left out there.
#include <string>

#include <tvm/ffi/function.h>

#include "objects.h"

namespace hopyard::binding {
namespace {

namespace ffi = tvm::ffi;

Dict ExplanationDict(const Explanation& explanation) {
  ffi::Array<Dict> candidates;
  for (const Candidate& candidate : explanation.candidates) {
    candidates.push_back(Dict{{"kernel", ffi::String(candidate.kernel)},
                              {"chosen", candidate.chosen},
                              {"reason", ffi::String(candidate.reason)}});
  }
  return Dict{{"supported", explanation.supported},
              {"reason", ffi::String(explanation.reason)},
              {"candidates", candidates},
              {"text", ffi::String(explanation.ToString())}};
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
  inputs.num_tokens = fields.View("num_tokens");
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

QuantizedView QuantizedOf(const Fields& fields) {
  QuantizedView view;
  view.format = FormatOf(fields.Text("format", ""));
  const FormatShape shape = ShapeOf(view.format, 0, 0);
  view.codes = BytesAs(fields.View("codes"), shape.code_dtype);
  view.scales = BytesAs(fields.View("scales"), shape.scale_dtype);
  view.scale_layout = ScaleLayoutOf(fields.Text("scale_layout", "linear"));
  view.global_scale = static_cast<float>(fields.Get<double>("global_scale", 0.0));
  return view;
}

PlanRef MakePlanFn(const Dict& spec, const Dict& options) {
  return Guarded([&] {
    return PlanRef(MakePlan(SpecOf(Fields(spec)), Device{}, PlanOptionsOf(Fields(options))));
  });
}

Dict ExplainFn(const Dict& spec, const Dict& options) {
  return Guarded([&] {
    return ExplanationDict(Explain(SpecOf(Fields(spec)), Device{}, PlanOptionsOf(Fields(options))));
  });
}

WeightsRef MakeWeightsFn(const Dict& spec, const Dict& desc) {
  return Guarded([&] {
    const MoeSpec parsed = SpecOf(Fields(spec));
    return WeightsRef(Weights(parsed, WeightsDescOf(parsed, desc)));
  });
}

void UpdateWeightsFn(const WeightsRef& weights, const Dict& slice) {
  Guarded([&] {
    Weights handle = weights->weights;  // shares the memory
    handle.Update(SliceOf(handle.spec(), Fields(slice)));
  });
}

void ForwardFn(const PlanRef& plan, const WeightsRef& weights, const Dict& inputs,
               const Dict& outputs, const ffi::Tensor& workspace) {
  Guarded([&] {
    const Workspace memory{workspace.data_ptr(), static_cast<size_t>(workspace.numel())};
    Forward(plan->plan, weights->weights, InputsOf(Fields(inputs), plan->plan.spec().activations),
            OutputsOf(Fields(outputs)), memory);
  });
}

void RouteFn(const Dict& rule, int top_k, const Dict& inputs, const Dict& outputs) {
  Guarded([&] {
    const Fields in(inputs);
    const Fields out(outputs);
    RouteInputs route_inputs;
    route_inputs.logits = in.View("logits");
    route_inputs.bias = in.View("bias");
    route_inputs.forced_ids = in.View("forced_ids");
    route_inputs.token_ids = in.View("token_ids");
    route_inputs.token_to_experts = in.View("token_to_experts");
    route_inputs.num_tokens = in.View("num_tokens");
    RouteOutputs route_outputs;
    route_outputs.expert_ids = out.View("expert_ids");
    route_outputs.weights = out.View("weights");
    route_outputs.replay = out.View("replay");
    route_outputs.expert_load = out.View("expert_load");
    Route(RuleOf(Fields(rule)), top_k, route_inputs, route_outputs);
  });
}

void FusedTopkDeepseekFn(const Dict& rule, const Dict& tensors) {
  Guarded([&] {
    const Fields fields(tensors);
    FusedTopkDeepseek(fields.View("scores"), fields.View("bias"), RuleOf(Fields(rule)),
                      fields.View("topk_values"), fields.View("topk_indices"),
                      fields.View("replay"));
  });
}

Dict FormatShapeFn(const ffi::String& format, int64_t rows, int64_t cols,
                   const ffi::String& layout) {
  return Guarded([&] {
    const FormatShape shape = ShapeOf(FormatOf(format), rows, cols, ScaleLayoutOf(layout));
    return Dict{{"code_dtype", ffi::String(std::string(ToString(shape.code_dtype)))},
                {"code_cols", shape.code_cols},
                {"scale_dtype", ffi::String(std::string(ToString(shape.scale_dtype)))},
                {"scale_rows", shape.scale_rows},
                {"scale_cols", shape.scale_cols},
                {"scale_numel", shape.scale_numel}};
  });
}

double QuantizeFn(const ffi::Tensor& source, const Dict& destination) {
  return Guarded([&] {
    return static_cast<double>(
        Quantize(ViewOf(source, "source"), QuantizedOf(Fields(destination))));
  });
}

void DequantizeFn(const Dict& source, const ffi::Tensor& destination) {
  Guarded([&] { Dequantize(QuantizedOf(Fields(source)), ViewOf(destination, "destination")); });
}

CheckpointRef OpenCheckpointFn(const ffi::String& directory) {
  return Guarded([&] { return CheckpointRef(Checkpoint::Open(directory)); });
}

// An empty `activations` stands for the format that goes with the checkpoint's weights.
Dict CheckpointLayerFn(const CheckpointRef& checkpoint, int index, const ffi::String& activations) {
  return Guarded([&] {
    CheckpointLayer layer = checkpoint->checkpoint.Layer(index);
    if (!activations.empty()) {
      layer.spec.activations = ParseActivationFormat(std::string(activations));
    }
    Dict result{{"name", ffi::String(layer.name)}, {"spec", ToDict(layer.spec)}};
    result.Set("weights", WeightsRef(Weights(layer.spec, std::move(layer.weights))));
    const auto set_tensor = [&result](const char* key, const TensorView& view) {
      if (view.defined()) {
        result.Set(key, ToFloatTensor(view));
      }
    };
    set_tensor("router_weight", layer.router_weight);
    set_tensor("router_bias", layer.router_bias);
    set_tensor("routing_bias", layer.routing_bias);
    return result;
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_plan, MakePlanFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(explain, ExplainFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_weights, MakeWeightsFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(update_weights, UpdateWeightsFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward, ForwardFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, RouteFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_topk_deepseek, FusedTopkDeepseekFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(format_shape, FormatShapeFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, QuantizeFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, DequantizeFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_checkpoint, OpenCheckpointFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(checkpoint_layer, CheckpointLayerFn);

}  // namespace hopyard::binding
