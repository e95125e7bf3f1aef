// SPDX-License-Identifier: Apache-2.0
// The functions of the extension module. Python (python/hopyard) is their only caller: it
// fills in defaults and converts arrays, so a field that is missing here is a field left out there.
#include <string>
#include <utility>
#include <vector>

#include <tvm/ffi/function.h>

#include "calls.h"
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

PlanRef MakePlanFn(const Dict& spec, const Dict& options, int device) {
  return Guarded([&] {
    return PlanRef(
        MakePlan(SpecOf(Fields(spec)), DeviceOf(device), PlanOptionsOf(Fields(options))));
  });
}

Dict ExplainFn(const Dict& spec, const Dict& options, int device) {
  return Guarded([&] {
    return ExplanationDict(
        Explain(SpecOf(Fields(spec)), DeviceOf(device), PlanOptionsOf(Fields(options))));
  });
}

WeightsRef MakeWeightsFn(const Dict& spec, const Dict& desc) {
  return Guarded([&] {
    const MoeSpec parsed = SpecOf(Fields(spec));
    return WeightsRef(Weights(parsed, WeightsDescOf(parsed, desc)));
  });
}

Dict WeightOrdersFn(const WeightsRef& weights) {
  return Guarded([&] {
    const Weights& of = weights->weights;
    return DictOf(OrdersOf(of.spec(), of.desc()));
  });
}

// A copy on another device.
WeightsRef CopyWeightsFn(const WeightsRef& weights, int device, bool packed) {
  return Guarded([&] {
    const Weights& from = weights->weights;
    WeightsDesc copy = CopyWeights(from.desc(), DeviceOf(device));
    copy.packed = packed;
    return WeightsRef(Weights(from.spec(), std::move(copy)));
  });
}

void UpdateWeightsFn(const WeightsRef& weights, const Dict& slice, int64_t stream) {
  Guarded([&] {
    Weights handle = weights->weights;  // shares the memory
    handle.Update(SliceOf(handle.spec(), Fields(slice)), StreamOf(stream));
  });
}

LayerFormRef LayerFormFn(const ffi::Array<ffi::String>& names, const ffi::String& routing) {
  return Guarded([&] { return LayerFormRef(names, routing); });
}

// A layer's call: a function of (plan, weights, form, workspace, stream, hidden, output, arguments
// in the order of the form ...). Its number of arguments varies, so it is handed out as an object.
ffi::Function LayerFunctionFn() {
  return ffi::Function::FromPacked([](ffi::PackedArgs args, ffi::Any* /*result*/) {
    Guarded([&] {
      const Plan& plan = args[0].cast<const PlanObj*>()->plan;
      const Weights& weights = args[1].cast<const WeightsObj*>()->weights;
      const auto* form = args[2].cast<const LayerFormObj*>();
      const auto workspace = args[3].cast<ffi::TensorView>();
      const Workspace memory{workspace.data_ptr(), static_cast<size_t>(workspace.numel())};
      const LayerCall call = form->Read(plan.spec(), args.Slice(5));
      Forward(plan, weights, call.inputs, call.outputs, memory, StreamOf(args[4].cast<int64_t>()));
    });
  });
}

void RouteFn(const Dict& rule, int top_k, const Dict& inputs, const Dict& outputs, int64_t stream) {
  Guarded([&] {
    const RouteCall call = RouteCallOf(Fields(inputs), Fields(outputs));
    Route(RuleOf(Fields(rule)), top_k, call.inputs, call.outputs, StreamOf(stream));
  });
}

void FusedTopkDeepseekFn(const Dict& rule, const Dict& tensors, int64_t stream) {
  Guarded([&] {
    const Fields fields(tensors);
    FusedTopkDeepseek(fields.View("scores"), fields.View("bias"), RuleOf(Fields(rule)),
                      fields.View("topk_values"), fields.View("topk_indices"),
                      fields.View("replay"), StreamOf(stream));
  });
}

int CountGpusFn() {
  return Guarded([] { return CountGpus(); });
}

// Zeroed memory of the library's own, for arrays of frameworks that it does not know.
ffi::Tensor NewTensorFn(const ffi::Array<int64_t>& shape, const ffi::String& dtype, int device) {
  return Guarded([&] { return NewTensor(shape, dtype, DeviceOf(device)); });
}

// Between tensors of equal sizes, one of them on the host.
void CopyTensorFn(const ffi::Tensor& from, const ffi::Tensor& to) {
  Guarded([&] {
    const TensorView source = ViewOf(from, "source");
    const TensorView target = ViewOf(to, "destination");
    const int64_t bytes = source.numel() * SizeOf(source.dtype);
    if (bytes != target.numel() * SizeOf(target.dtype) || !source.is_contiguous()) {
      ThrowInvalid("source is not contiguous or has another size than destination");
    }
    CopyBytes(target.data, source.data, bytes,
              source.device.kind == DeviceKind::kCpu ? target.device : source.device);
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

TuningTableRef NewTuningTableFn(int device, int num_threads) {
  return Guarded(
      [&] { return TuningTableRef(TuningTable(MachineOf(DeviceOf(device), num_threads))); });
}

TuningTableRef ReadTuningTableFn(const ffi::String& text) {
  return Guarded([&] { return TuningTableRef(TuningTable::FromJson(std::string(text))); });
}

ffi::String TuningTableTextFn(const TuningTableRef& table) {
  return Guarded([&] { return ffi::String(table->table->ToJson()); });
}

TuningTableRef LoadTuningTableFn(const ffi::String& path) {
  return Guarded([&] { return TuningTableRef(TuningTable::Load(path)); });
}

void SaveTuningTableFn(const TuningTableRef& table, const ffi::String& path) {
  Guarded([&] { table->table->Save(path); });
}

TuningTableRef MergeTuningTablesFn(const TuningTableRef& table, const TuningTableRef& other) {
  return Guarded([&] {
    TuningTable merged = *table->table;
    merged.Merge(*other->table);
    return TuningTableRef(std::move(merged));
  });
}

// A table with the one layer that a plan would take, or none.
TuningTableRef FindTuningFn(const TuningTableRef& table, const Dict& spec, const Dict& options) {
  return Guarded([&] {
    TuningTable found(table->table->machine());
    const TuningKey key = KeyOf(SpecOf(Fields(spec)), PlanOptionsOf(Fields(options)));
    if (const TunedLayer* const layer = table->table->FindFor(key)) {
      found.Put(*layer);
    }
    return TuningTableRef(std::move(found));
  });
}

// A table with the one layer.
TuningTableRef WaitForTuningFn(const ffi::String& path, const Dict& spec, const Dict& options,
                               double seconds) {
  return Guarded([&] {
    const TuningKey key = KeyOf(SpecOf(Fields(spec)), PlanOptionsOf(Fields(options)));
    TuningTable found;
    found.Put(WaitForTuning(path, key, seconds));
    return TuningTableRef(std::move(found));
  });
}

void UseTuningFn(const TuningTableRef& table) {
  Guarded([&] { UseTuning(*table->table); });
}

void ForgetTuningFn() {
  Guarded([] { ForgetTuning(); });
}

Dict TuningStatsFn() {
  return Guarded([] {
    const TuningStats stats = GetTuningStats();
    const auto strings = [](const std::vector<std::string>& texts) {
      ffi::Array<ffi::String> list;
      for (const std::string& text : texts) {
        list.push_back(ffi::String(text));
      }
      return list;
    };
    return Dict{{"hits", stats.hits},
                {"misses", stats.misses},
                {"stale", stats.stale},
                {"measured", stats.measured},
                {"missed", strings(stats.missed)},
                {"ignored", strings(stats.ignored)}};
  });
}

void ResetTuningStatsFn() {
  Guarded([] { ResetTuningStats(); });
}

ffi::Array<int64_t> TokenBucketsFn(int64_t max_tokens) {
  return Guarded([&] {
    ffi::Array<int64_t> buckets;
    for (const int64_t bucket : TokenBuckets(max_tokens)) {
      buckets.push_back(bucket);
    }
    return buckets;
  });
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(weight_orders, WeightOrdersFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_weights, CopyWeightsFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(update_weights, UpdateWeightsFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_form, LayerFormFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_function, LayerFunctionFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, RouteFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_topk_deepseek, FusedTopkDeepseekFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(count_gpus, CountGpusFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(new_tensor, NewTensorFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_tensor, CopyTensorFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(format_shape, FormatShapeFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, QuantizeFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, DequantizeFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(new_tuning_table, NewTuningTableFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_tuning_table, ReadTuningTableFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tuning_table_text, TuningTableTextFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_tuning_table, LoadTuningTableFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(save_tuning_table, SaveTuningTableFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_tuning_tables, MergeTuningTablesFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(find_tuning, FindTuningFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(wait_for_tuning, WaitForTuningFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_tuning, UseTuningFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forget_tuning, ForgetTuningFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tuning_stats, TuningStatsFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(reset_tuning_stats, ResetTuningStatsFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_buckets, TokenBucketsFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_checkpoint, OpenCheckpointFn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(checkpoint_layer, CheckpointLayerFn);

}  // namespace hopyard::binding
