// SPDX-License-Identifier: Apache-2.0
#include "objects.h"

#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include <tvm/ffi/dtype.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/reflection/registry.h>

namespace hopyard::binding {
namespace {

namespace ffi = tvm::ffi;

template <class Enum>
struct Named {
  const char* name;
  Enum value;
};

constexpr Named<RoutingScore> kScores[] = {
    {"logit", RoutingScore::kLogit},
    {"softmax", RoutingScore::kSoftmax},
    {"sigmoid", RoutingScore::kSigmoid},
    {"sqrt_softplus", RoutingScore::kSqrtSoftplus},
};
constexpr Named<RoutingWeight> kWeights[] = {
    {"score", RoutingWeight::kScore},
    {"softmax_selected", RoutingWeight::kSoftmaxSelected},
    {"sigmoid_selected", RoutingWeight::kSigmoidSelected},
};
constexpr Named<Renormalise> kRenormalise[] = {
    {"none", Renormalise::kNone},
    {"sum_plus_epsilon", Renormalise::kSumPlusEpsilon},
    {"sum_at_least", Renormalise::kSumAtLeast},
};
constexpr Named<ExpertMap::Kind> kMapKinds[] = {
    {"all", ExpertMap::Kind::kAll},
    {"range", ExpertMap::Kind::kRange},
    {"table", ExpertMap::Kind::kTable},
};
constexpr Named<RowOrder> kRowOrders[] = {
    {"up_gate", RowOrder::kUpGate},
    {"gate_up", RowOrder::kGateUp},
    {"interleaved_gate_up", RowOrder::kInterleavedGateUp},
    {"interleaved_up_gate", RowOrder::kInterleavedUpGate},
};
constexpr Named<RowMap> kRowMaps[] = {
    {"natural", RowMap::kNatural},
    {"shuffled128", RowMap::kShuffled128},
    {"shuffled64", RowMap::kShuffled64},
};
constexpr Named<MajorOrder> kMajors[] = {
    {"k", MajorOrder::kKMajor},
    {"mn", MajorOrder::kMnMajor},
    {"block_k", MajorOrder::kBlockKMajor},
};
constexpr Named<ReadOrder> kReadOrders[] = {
    {"k_major", ReadOrder::kKMajor},
    {"mn_major", ReadOrder::kMnMajor},
    {"mn_major_interleaved", ReadOrder::kMnMajorInterleaved},
    {"packed", ReadOrder::kPacked},
};
constexpr Named<ScaleLayout> kScaleLayouts[] = {
    {"linear", ScaleLayout::kLinear},
    {"swizzled128x4", ScaleLayout::kSwizzled128x4},
};
constexpr Named<WeightPart> kParts[] = {
    {"gate", WeightPart::kGate},
    {"up", WeightPart::kUp},
    {"gemm1", WeightPart::kGemm1},
    {"gemm2", WeightPart::kGemm2},
};

template <class Enum, size_t kCount>
Enum Parse(const Named<Enum> (&table)[kCount], std::string_view name, const char* what) {
  std::string known;
  for (const Named<Enum>& row : table) {
    if (name == row.name) {
      return row.value;
    }
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  ThrowInvalid(std::string(what) + " is '" + std::string(name) + "', wanted one of " + known);
}

template <class Enum, size_t kCount>
ffi::String NameOf(const Named<Enum> (&table)[kCount], Enum value) {
  for (const Named<Enum>& row : table) {
    if (row.value == value) {
      return row.name;
    }
  }
  return "unknown";
}

PerExpert PerExpertOf(const Fields& fields, const char* key, PerExpert value) {
  // The Python package always sends a list: one value for all experts, or one per expert.
  const ffi::Array<double> list = fields.Get<ffi::Array<double>>(key, {});
  if (list.size() == 1) {
    value.all = static_cast<float>(list[0]);
  } else {
    for (const double entry : list) {
      value.each.push_back(static_cast<float>(entry));
    }
  }
  return value;
}

ffi::Array<double> ToArray(const PerExpert& value) {
  ffi::Array<double> list;
  if (value.each.empty()) {
    list.push_back(static_cast<double>(value.all));
  }
  for (const float entry : value.each) {
    list.push_back(static_cast<double>(entry));
  }
  return list;
}

struct StoredTypes {
  DType values = DType::kUint8;
  DType scales = DType::kUint8;
};

// What bytes mean in a weight format; kUint8 where bytes are bytes.
StoredTypes StoredTypesOf(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFp8Block128:
    case WeightFormat::kFp8PerTensor:
    case WeightFormat::kFp8PerChannel:
      return {DType::kE4m3, DType::kUint8};
    case WeightFormat::kMxFp8:
      return {DType::kE4m3, DType::kE8m0};
    case WeightFormat::kMxFp4:
      return {DType::kUint8, DType::kE8m0};
    case WeightFormat::kNvFp4:
      return {DType::kUint8, DType::kE4m3};
    case WeightFormat::kBf16:
    case WeightFormat::kMxInt4:
      break;
  }
  return {};
}

Fields::Tensors AllBytesAs(Fields::Tensors tensors, DType dtype) {
  tensors.one = BytesAs(tensors.one, dtype);
  for (TensorView& view : tensors.many) {
    view = BytesAs(view, dtype);
  }
  return tensors;
}

MatrixSet MatrixOf(const Fields& fields, WeightFormat format) {
  MatrixSet set;
  if (fields.empty()) {
    return set;
  }
  const StoredTypes types = StoredTypesOf(format);
  Fields::Tensors values = AllBytesAs(fields.OneOrMany("values"), types.values);
  set.values = values.one;
  set.values_per_expert = std::move(values.many);
  Fields::Tensors scales = AllBytesAs(fields.OneOrMany("scales"), types.scales);
  set.scales = scales.one;
  set.scales_per_expert = std::move(scales.many);
  Fields::Tensors bias = fields.OneOrMany("bias");
  set.bias = bias.one;
  set.bias_per_expert = std::move(bias.many);
  set.global_scales = fields.View("global_scales");
  set.major = Parse(kMajors, fields.Text("major", "k"), "major");
  set.scale_layout = ScaleLayoutOf(fields.Text("scale_layout", "linear"));
  set.row_map = Parse(kRowMaps, fields.Text("row_map", "natural"), "row_map");
  set.row_origin = fields.Get<int64_t>("row_origin", 0);
  set.col_origin = fields.Get<int64_t>("col_origin", 0);
  return set;
}

ExpertMatrices MatricesOf(const Fields& fields, WeightFormat format) {
  ExpertMatrices matrices;
  matrices.gemm1 = MatrixOf(fields.Nested("gemm1"), format);
  matrices.gate = MatrixOf(fields.Nested("gate"), format);
  matrices.up = MatrixOf(fields.Nested("up"), format);
  matrices.gemm2 = MatrixOf(fields.Nested("gemm2"), format);
  matrices.row_order = Parse(kRowOrders, fields.Text("row_order", "gate_up"), "row_order");
  matrices.gemm1_input_scale = fields.View("gemm1_input_scale");
  matrices.gemm2_input_scale = fields.View("gemm2_input_scale");
  matrices.alpha = fields.View("alpha");
  matrices.beta = fields.View("beta");
  matrices.limit = fields.View("limit");
  return matrices;
}

// Memory of a tensor that the extension gives away.
class OwnedMemory {
 public:
  explicit OwnedMemory(Device device) : device_(device) {}
  void AllocData(DLTensor* tensor) {
    memory_ = DeviceMemory(device_, static_cast<int64_t>(ffi::GetDataSize(*tensor)));
    tensor->data = memory_.data();
  }
  void FreeData(DLTensor* /*tensor*/) { memory_ = DeviceMemory(); }

 private:
  Device device_;
  DeviceMemory memory_;
};

}  // namespace

PlanObj::PlanObj(Plan value)
    : plan(std::move(value)),
      workspace_bytes(plan.workspace_bytes()),
      tokens_per_chunk(plan.tokens_per_chunk()) {}

WeightsObj::WeightsObj(Weights value)
    : weights(std::move(value)),
      bytes_per_expert(weights.bytes_per_expert()),
      device(weights.device().kind == DeviceKind::kCuda ? weights.device().index : -1) {}

CheckpointObj::CheckpointObj(Checkpoint value)
    : checkpoint(std::move(value)), model_type(std::string(checkpoint.model_type())) {
  for (const int layer : checkpoint.moe_layers()) {
    moe_layers.push_back(layer);
  }
}

RoutingRule RuleOf(const Fields& fields) {
  RoutingRule rule;
  rule.score = Parse(kScores, fields.Text("score", "logit"), "routing.score");
  rule.weight = Parse(kWeights, fields.Text("weight", "softmax_selected"), "routing.weight");
  rule.renormalise = Parse(kRenormalise, fields.Text("renormalise", "none"), "routing.renormalise");
  rule.use_bias = fields.Get<bool>("use_bias", false);
  rule.num_groups = fields.Get<int>("num_groups", 1);
  rule.top_groups = fields.Get<int>("top_groups", 1);
  rule.scaling_factor = static_cast<float>(fields.Get<double>("scaling_factor", 1.0));
  return rule;
}

MoeSpec SpecOf(const Fields& fields) {
  MoeSpec spec;
  spec.hidden_size = fields.Get<int64_t>("hidden_size", 0);
  spec.intermediate_size = fields.Get<int64_t>("intermediate_size", 0);
  spec.num_experts = fields.Get<int>("num_experts", 0);
  spec.top_k = fields.Get<int>("top_k", 0);
  spec.routing = RuleOf(fields.Nested("routing"));
  const Fields activation = fields.Nested("activation");
  spec.activation.kind = ParseActivationKind(activation.Text("kind", "swiglu"));
  spec.activation.alpha = PerExpertOf(activation, "alpha", spec.activation.alpha);
  spec.activation.beta = PerExpertOf(activation, "beta", spec.activation.beta);
  spec.activation.limit = PerExpertOf(activation, "limit", spec.activation.limit);
  spec.weights = ParseWeightFormat(fields.Text("weights", "bf16"));
  spec.activations = ParseActivationFormat(fields.Text("activations", "bf16"));
  const Fields local = fields.Nested("local");
  spec.local.kind = Parse(kMapKinds, local.Text("kind", "all"), "local.kind");
  spec.local.offset = local.Get<int>("offset", 0);
  spec.local.count = local.Get<int>("count", 0);
  const Fields shared = fields.Nested("shared");
  spec.shared.count = shared.Get<int>("count", 0);
  spec.shared.per_token_weight = shared.Get<bool>("per_token_weight", false);
  spec.shared.weight = static_cast<float>(shared.Get<double>("weight", 1.0));
  spec.shared.weights = ParseWeightFormat(shared.Text("weights", "bf16"));
  spec.router_weight_on_input = fields.Get<bool>("router_weight_on_input", false);
  return spec;
}

Dict ToDict(const MoeSpec& spec) {
  const auto text = [](std::string_view view) { return ffi::String(std::string(view)); };
  const RoutingRule& rule = spec.routing;
  const Dict routing{{"score", NameOf(kScores, rule.score)},
                     {"weight", NameOf(kWeights, rule.weight)},
                     {"renormalise", NameOf(kRenormalise, rule.renormalise)},
                     {"use_bias", rule.use_bias},
                     {"num_groups", rule.num_groups},
                     {"top_groups", rule.top_groups},
                     {"scaling_factor", static_cast<double>(rule.scaling_factor)}};
  const Dict activation{{"kind", text(ToString(spec.activation.kind))},
                        {"alpha", ToArray(spec.activation.alpha)},
                        {"beta", ToArray(spec.activation.beta)},
                        {"limit", ToArray(spec.activation.limit)}};
  const Dict local{{"kind", NameOf(kMapKinds, spec.local.kind)},
                   {"offset", spec.local.offset},
                   {"count", spec.local.count}};
  const Dict shared{{"count", spec.shared.count},
                    {"per_token_weight", spec.shared.per_token_weight},
                    {"weight", static_cast<double>(spec.shared.weight)},
                    {"weights", text(ToString(spec.shared.weights))}};
  return Dict{{"hidden_size", spec.hidden_size},
              {"intermediate_size", spec.intermediate_size},
              {"num_experts", spec.num_experts},
              {"top_k", spec.top_k},
              {"routing", routing},
              {"activation", activation},
              {"weights", text(ToString(spec.weights))},
              {"activations", text(ToString(spec.activations))},
              {"local", local},
              {"shared", shared},
              {"router_weight_on_input", spec.router_weight_on_input}};
}

namespace {

WeightOrders WeightOrdersOf(const Fields& fields) {
  const auto order = [&](const char* matrix) {
    return Parse(kReadOrders, fields.Text(matrix, "k_major"), matrix);
  };
  return {order("gemm1"), order("gemm2"), order("shared_gemm1"), order("shared_gemm2")};
}

}  // namespace

Dict DictOf(const WeightOrders& orders) {
  return Dict{{"gemm1", NameOf(kReadOrders, orders.gemm1)},
              {"gemm2", NameOf(kReadOrders, orders.gemm2)},
              {"shared_gemm1", NameOf(kReadOrders, orders.shared_gemm1)},
              {"shared_gemm2", NameOf(kReadOrders, orders.shared_gemm2)}};
}

PlanOptions PlanOptionsOf(const Fields& fields) {
  PlanOptions options;
  options.max_tokens = fields.Get<int64_t>("max_tokens", 0);
  options.tactic = fields.Text("tactic", "");
  options.batch_invariant = fields.Get<bool>("batch_invariant", false);
  options.workspace_cap = fields.Get<int64_t>("workspace_cap", 0);
  options.num_threads = fields.Get<int>("num_threads", 0);
  options.overlap_launches = fields.Get<bool>("overlap_launches", false);
  options.path.ids = fields.Get<bool>("given_ids", false);
  options.path.unfinalised = fields.Get<bool>("unfinalised", false);
  options.path.replay = fields.Get<bool>("records_replay", false);
  options.weight_orders = WeightOrdersOf(fields.Nested("weight_orders"));
  options.untuned = fields.Get<bool>("untuned", false);
  const auto tuning = fields.Get<ffi::Optional<TuningTableRef>>("tuning", std::nullopt);
  if (tuning) {
    options.tuning = (*tuning)->table;
  }
  return options;
}

Format FormatOf(const std::string& name) {
  std::string known;
  for (int i = 0; i <= static_cast<int>(Format::kMxInt4); ++i) {
    const auto format = static_cast<Format>(i);
    if (ToString(format) == name) {
      return format;
    }
    known += (known.empty() ? "" : ", ") + std::string(ToString(format));
  }
  ThrowInvalid("format is '" + name + "', wanted one of " + known);
}

ScaleLayout ScaleLayoutOf(const std::string& name) {
  return Parse(kScaleLayouts, name, "scale_layout");
}

// All but values and scales, which packed weights do without.
Dict WithoutCodes(const Dict& map) {
  Dict rest;
  for (const auto& [name, value] : map) {
    if (name == "values" || name == "scales") {
      continue;
    }
    if (const auto nested = value.try_cast<Dict>()) {
      rest.Set(name, WithoutCodes(*nested));
    } else {
      rest.Set(name, value);
    }
  }
  return rest;
}

WeightsDesc WeightsDescOf(const MoeSpec& spec, const Dict& map) {
  const Fields fields(map);
  WeightsDesc desc;
  desc.routed = MatricesOf(fields, spec.weights);
  desc.shared = MatricesOf(fields.Nested("shared"), spec.shared.weights);
  desc.read_only = fields.Get<bool>("read_only", false);
  desc.packed = fields.Get<bool>("packed", false);
  desc.owner = std::make_shared<const Dict>(WithoutCodes(map));
  desc.codes_owner = std::make_shared<const Dict>(map);
  return desc;
}

WeightSlice SliceOf(const MoeSpec& spec, const Fields& fields) {
  WeightSlice slice;
  slice.expert = fields.Get<int64_t>("expert", 0);
  const bool shared = slice.expert >= spec.num_local_experts();
  const StoredTypes types = StoredTypesOf(shared ? spec.shared.weights : spec.weights);
  slice.part = Parse(kParts, fields.Text("part", "gemm1"), "part");
  slice.row_begin = fields.Get<int64_t>("row_begin", 0);
  slice.col_begin = fields.Get<int64_t>("col_begin", 0);
  slice.values = BytesAs(fields.View("values"), types.values);
  slice.scales = BytesAs(fields.View("scales"), types.scales);
  slice.bias = fields.View("bias");
  slice.global_scale = fields.View("global_scale");
  return slice;
}

ffi::Tensor NewTensor(const ffi::Array<int64_t>& shape, const std::string& dtype, Device device) {
  const std::vector<int64_t> sizes(shape.begin(), shape.end());
  const DLDevice place =
      device.kind == DeviceKind::kCuda ? DLDevice{kDLCUDA, device.index} : DLDevice{kDLCPU, 0};
  return ffi::Tensor::FromNDAlloc(OwnedMemory(device), ffi::ShapeView(sizes.data(), sizes.size()),
                                  ffi::StringToDLDataType(dtype), place);
}

ffi::Tensor ToFloatTensor(const TensorView& view) {
  const std::array<int64_t, 2> shape = {view.shape[0], view.ndim == 2 ? view.shape[1] : 1};
  ffi::Tensor result = ffi::Tensor::FromNDAlloc(
      OwnedMemory(Device{}), ffi::ShapeView(shape.data(), static_cast<size_t>(view.ndim)),
      DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  const TensorView destination =
      TensorView::Contiguous(result.data_ptr(), DType::kFloat32, {shape[0], shape[1]});
  if (view.dtype == DType::kFloat32) {
    std::memcpy(destination.data, view.data, static_cast<size_t>(view.numel()) * sizeof(float));
    return result;
  }
  QuantizedView source;
  source.format = view.dtype == DType::kFp16 ? Format::kFp16 : Format::kBf16;
  source.codes =
      TensorView::Contiguous(static_cast<const void*>(view.data), view.dtype, {shape[0], shape[1]});
  Dequantize(source, destination);
  return result;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  refl::ObjectDef<PlanObj>()
      .def_ro("workspace_bytes", &PlanObj::workspace_bytes)
      .def_ro("tokens_per_chunk", &PlanObj::tokens_per_chunk);
  refl::ObjectDef<WeightsObj>()
      .def_ro("bytes_per_expert", &WeightsObj::bytes_per_expert)
      .def_ro("device", &WeightsObj::device);
  refl::ObjectDef<CheckpointObj>()
      .def_ro("model_type", &CheckpointObj::model_type)
      .def_ro("moe_layers", &CheckpointObj::moe_layers);
}

}  // namespace hopyard::binding
