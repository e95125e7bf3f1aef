// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cmath>
#include <string>

#include "core/error.h"
#include "core/shape.h"
#include "formats/format_rules.h"
#include "spec/validate.h"

namespace hopyard::spec {
namespace {

struct MatrixRule {
  std::string name;  // "weights.routed.gemm1"
  int64_t experts = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  WeightFormat format = WeightFormat::kBf16;
  const Place* place = nullptr;
};

// The view of one expert, or of all with the leading dimension removed.
TensorView OneExpert(const TensorView& all) {
  TensorView one = all;
  one.ndim = all.ndim - 1;
  for (int d = 0; d < one.ndim; ++d) {
    one.shape.at(static_cast<size_t>(d)) = all.shape.at(static_cast<size_t>(d) + 1);
    one.strides.at(static_cast<size_t>(d)) = all.strides.at(static_cast<size_t>(d) + 1);
  }
  return one;
}

// Checks `all` ([experts, ...]) or `each` (experts entries) with `check(view of one expert)`.
template <class Check>
void ForEachExpert(const std::string& name, const MatrixRule& rule, const TensorView& all,
                   const std::vector<TensorView>& each, Check&& check) {
  const int64_t experts = rule.experts;
  HOPYARD_CHECK(!(all.defined() && !each.empty()), kInvalidArgument)
      << name << " is given both as one tensor and per expert; give one of them";
  if (!each.empty()) {
    HOPYARD_CHECK(static_cast<int64_t>(each.size()) == experts, kInvalidArgument)
        << name << " has " << each.size() << " per-expert tensors; wanted " << experts
        << ", one per local expert";
    for (size_t e = 0; e < each.size(); ++e) {
      rule.place->CheckMemory(each[e], (name + '[' + std::to_string(e) + ']').c_str());
      check(each[e]);
    }
    return;
  }
  HOPYARD_CHECK(all.defined(), kInvalidArgument)
      << name << " is missing; wanted one tensor of " << experts << " experts, or one per expert";
  rule.place->CheckMemory(all, name.c_str());
  HOPYARD_CHECK(all.ndim >= 2 && all.shape[0] == experts, kInvalidArgument)
      << name << " has shape " << ShapeString(all) << "; wanted " << experts
      << " local experts as the first dimension";
  check(OneExpert(all));
}

// Contiguous along the last dimension; the outer ones may be padded but must not overlap.
void CheckStrides(const TensorView& view, const std::string& name) {
  int64_t least = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    const auto at = static_cast<size_t>(d);
    const int64_t stride = view.strides.at(at);
    const bool padded = d < view.ndim - 1 && !(view.ndim == 3 && d == 1);
    HOPYARD_CHECK(view.shape.at(at) == 1 || (padded ? stride >= least : stride == least),
                  kInvalidArgument)
        << name << " has stride " << stride << " along dimension " << d << " of "
        << ShapeString(view) << "; wanted " << (padded ? "at least " : "") << least
        << ": copy it to memory in that order";
    least *= view.shape.at(at);
  }
}

void CheckValues(const TensorView& view, const MatrixSet& set, const MatrixRule& rule) {
  const formats::WeightFormatRule format = formats::RuleOf(rule.format);
  const std::string name = rule.name + ".values";
  HOPYARD_CHECK(view.dtype == format.code_dtype, kInvalidArgument)
      << name << " is " << ToString(view.dtype) << "; " << ToString(rule.format) << " wants "
      << ToString(format.code_dtype);
  const int64_t packed = rule.cols / format.codes_per_byte;
  int64_t want[3] = {rule.rows, packed, 0};
  int ndim = 2;
  if (set.major == MajorOrder::kMnMajor) {
    HOPYARD_CHECK(rule.format == WeightFormat::kBf16, kUnsupported)
        << rule.name << " is MN-major; only bf16 is read that way, store " << ToString(rule.format)
        << " K-major";
    want[0] = rule.cols;
    want[1] = rule.rows;
  } else if (set.major == MajorOrder::kBlockKMajor) {
    const int64_t block = 128 / SizeOf(format.code_dtype);
    HOPYARD_CHECK(packed % block == 0, kInvalidArgument)
        << rule.name << " in BlockMajorK needs K to be a multiple of "
        << block * format.codes_per_byte << "; got " << rule.cols << ": store it K-major";
    ndim = 3;
    want[0] = packed / block;
    want[1] = rule.rows;
    want[2] = block;
  }
  bool ok = view.ndim == ndim;
  for (int d = 0; ok && d < ndim; ++d) {
    ok = view.shape.at(static_cast<size_t>(d)) == want[d];
  }
  HOPYARD_CHECK(ok, kInvalidArgument)
      << name << " of one expert has shape " << ShapeString(view) << "; wanted [" << want[0] << ", "
      << want[1] << (ndim == 3 ? ", " + std::to_string(want[2]) : std::string()) << "]";
  CheckStrides(view, name);
}

void CheckScales(const MatrixSet& set, const MatrixRule& rule) {
  const formats::WeightFormatRule format = formats::RuleOf(rule.format);
  const std::string name = rule.name + ".scales";
  if (format.scale_block == 0 && !format.per_row_scale) {
    HOPYARD_CHECK(!set.scales.defined() && set.scales_per_expert.empty(), kInvalidArgument)
        << name << " is given, but " << ToString(rule.format)
        << " has no such scales; leave it absent";
    return;
  }
  HOPYARD_CHECK(set.scale_layout == ScaleLayout::kLinear || !format.per_row_scale, kUnsupported)
      << name << " of " << ToString(rule.format)
      << " are one per row; the 128x4 layout holds block scales, store these linear";
  int64_t rows = rule.rows;
  int64_t cols = 1;
  if (format.scale_block > 0) {
    const int64_t origin = format.scale_block_rows > 1 ? set.row_origin : 0;
    rows = CeilDiv(origin + rule.rows, format.scale_block_rows);
    cols = CeilDiv(set.col_origin + rule.cols, format.scale_block);
  }
  ForEachExpert(name, rule, set.scales, set.scales_per_expert, [&](const TensorView& view) {
    HOPYARD_CHECK(view.dtype == format.scale_dtype, kInvalidArgument)
        << name << " is " << ToString(view.dtype) << "; " << ToString(rule.format) << " wants "
        << ToString(format.scale_dtype);
    if (set.scale_layout == ScaleLayout::kSwizzled128x4) {
      const int64_t size = RoundUp(rows, 128) * RoundUp(cols, 4);
      HOPYARD_CHECK(view.numel() == size && view.is_contiguous(), kInvalidArgument)
          << name << " of one expert has " << view.numel() << " elements; the 128x4 layout of ["
          << rows << ", " << cols << "] has " << size << ", contiguous";
      return;
    }
    const bool vector = format.per_row_scale && view.ndim == 1 && view.shape[0] == rows;
    const bool matrix = view.ndim == 2 && view.shape[0] == rows && view.shape[1] == cols;
    HOPYARD_CHECK(vector || matrix, kInvalidArgument)
        << name << " of one expert has shape " << ShapeString(view) << "; wanted [" << rows
        << (format.per_row_scale ? "]" : ", " + std::to_string(cols) + "]");
    if (matrix) {
      CheckStrides(view, name);
    }
  });
}

void CheckLayout(const MatrixSet& set, const MatrixRule& rule) {
  const auto check = [&](const char* field, int value, int last, const char* type) {
    HOPYARD_CHECK(value <= last, kInvalidArgument)
        << rule.name << '.' << field << '=' << value << " is not a " << type << "; wanted 0 .. "
        << last;
  };
  check("major", static_cast<int>(set.major), static_cast<int>(MajorOrder::kBlockKMajor),
        "MajorOrder");
  check("scale_layout", static_cast<int>(set.scale_layout),
        static_cast<int>(ScaleLayout::kSwizzled128x4), "ScaleLayout");
  check("row_map", static_cast<int>(set.row_map), static_cast<int>(RowMap::kShuffled64), "RowMap");
  const int64_t block = set.row_map == RowMap::kShuffled128  ? 32
                        : set.row_map == RowMap::kShuffled64 ? 16
                                                             : 1;
  HOPYARD_CHECK(rule.rows % block == 0, kInvalidArgument)
      << rule.name << " has " << rule.rows
      << " rows; its shuffled row map works on whole blocks of " << block
      << ": zero-pad the rows or store them natural";
  const formats::WeightFormatRule format = formats::RuleOf(rule.format);
  const int64_t row_block = format.scale_block_rows;
  const int64_t col_block = format.scale_block > 0 ? format.scale_block : 1;
  HOPYARD_CHECK(set.row_origin >= 0 && set.row_origin < row_block, kInvalidArgument)
      << rule.name << ".row_origin=" << set.row_origin << "; wanted 0 .. " << row_block - 1
      << ", the first row's place in its scale block";
  HOPYARD_CHECK(set.col_origin >= 0 && set.col_origin < col_block &&
                    set.col_origin % format.codes_per_byte == 0,
                kInvalidArgument)
      << rule.name << ".col_origin=" << set.col_origin << "; wanted 0 .. " << col_block - 1
      << (format.codes_per_byte > 1 ? ", even" : "");
}

void CheckMatrix(const MatrixSet& set, const MatrixRule& rule) {
  CheckLayout(set, rule);
  ForEachExpert(rule.name + ".values", rule, set.values, set.values_per_expert,
                [&](const TensorView& view) { CheckValues(view, set, rule); });
  CheckScales(set, rule);
  const std::string bias_name = rule.name + ".bias";
  if (set.bias.defined() || !set.bias_per_expert.empty()) {
    ForEachExpert(bias_name, rule, set.bias, set.bias_per_expert, [&](const TensorView& view) {
      rule.place->CheckTensor(view,
                              {bias_name.c_str(), {DType::kFloat32, DType::kBf16}, {rule.rows}});
    });
  }
  const std::string global_name = rule.name + ".global_scales";
  if (set.global_scales.defined()) {
    HOPYARD_CHECK(formats::RuleOf(rule.format).global_scale, kInvalidArgument)
        << global_name << " is given, but " << ToString(rule.format)
        << " has none; leave it absent";
    rule.place->CheckTensor(set.global_scales,
                            {global_name.c_str(), {DType::kFloat32}, {rule.experts}});
    const std::vector<float> scales = rule.place->Read(set.global_scales, rule.experts);
    for (size_t e = 0; e < scales.size(); ++e) {
      HOPYARD_CHECK(std::isfinite(scales[e]), kInvalidArgument)
          << global_name << '[' << e << "] holds " << scales[e] << "; wanted a finite number";
    }
  }
}

// Whether any tensor of the set is given, also one without values.
bool HasTensors(const MatrixSet& set) {
  return set.defined() || set.scales.defined() || !set.scales_per_expert.empty() ||
         set.global_scales.defined() || set.bias.defined() || !set.bias_per_expert.empty();
}

void CheckUnread(const MatrixSet& set, const std::string& name, const char* why) {
  HOPYARD_CHECK(!HasTensors(set), kInvalidArgument)
      << name << " has scales or a bias, but no values: " << why << "; leave it absent";
}

struct GroupRule {
  const char* name = "";
  int64_t experts = 0;
  WeightFormat format = WeightFormat::kBf16;
  const Place* place = nullptr;
};

void CheckGroup(const MoeSpec& spec, const ExpertMatrices& group, const GroupRule& rule) {
  const std::string name = std::string("weights.") + rule.name;
  const int64_t hidden = spec.hidden_size;
  const int64_t inter = spec.intermediate_size;
  const bool apart = group.gate.defined() || group.up.defined();
  HOPYARD_CHECK(group.gemm1.defined() != apart, kInvalidArgument)
      << name
      << (apart ? " has both gemm1 and gate/up; give one of them"
                : " has neither gemm1 nor gate and up; give one of them");
  HOPYARD_CHECK(group.row_order <= RowOrder::kInterleavedUpGate, kInvalidArgument)
      << name << ".row_order=" << static_cast<int>(group.row_order)
      << " is not a RowOrder; wanted 0 .. " << static_cast<int>(RowOrder::kInterleavedUpGate);
  if (apart) {
    HOPYARD_CHECK(IsGated(spec.activation.kind), kInvalidArgument)
        << name << " has gate and up, but activation " << ToString(spec.activation.kind)
        << " is not gated; give gemm1 [experts, intermediate_size, hidden_size]";
    CheckUnread(group.gemm1, name + ".gemm1", "gate and up are given apart");
    CheckMatrix(group.gate, {name + ".gate", rule.experts, inter, hidden, rule.format, rule.place});
    CheckMatrix(group.up, {name + ".up", rule.experts, inter, hidden, rule.format, rule.place});
  } else {
    CheckUnread(group.gate, name + ".gate", "gemm1 holds gate and up");
    CheckUnread(group.up, name + ".up", "gemm1 holds gate and up");
    CheckMatrix(group.gemm1, {name + ".gemm1", rule.experts, spec.gemm1_rows(), hidden, rule.format,
                              rule.place});
  }
  CheckMatrix(group.gemm2, {name + ".gemm2", rule.experts, hidden, inter, rule.format, rule.place});
}

void CheckInputScale(const MoeSpec& spec, const TensorView& scale, const MatrixRule& rule) {
  const std::string& name = rule.name;
  const int64_t experts = rule.experts;
  const bool needed = spec.activations == ActivationFormat::kFp8PerTensor ||
                      spec.activations == ActivationFormat::kNvFp4;
  HOPYARD_CHECK(scale.defined() || !needed, kInvalidArgument)
      << name << " is missing; " << ToString(spec.activations)
      << " activations have a static scale: give f32 [1]"
      << (experts > 1 ? " or [" + std::to_string(experts) + "]" : std::string());
  HOPYARD_CHECK(!scale.defined() || needed, kInvalidArgument)
      << name << " is given, but " << ToString(spec.activations)
      << " activations have no static scale; leave it absent";
  if (!scale.defined()) {
    return;
  }
  const bool one = scale.ndim == 1 && scale.shape[0] == 1;
  rule.place->CheckTensor(scale, {name.c_str(), {DType::kFloat32}, {one ? 1 : experts}});
  const std::vector<float> values = rule.place->Read(scale, scale.numel());
  for (size_t i = 0; i < values.size(); ++i) {
    const float value = values[i];
    HOPYARD_CHECK(std::isfinite(value) && value > 0.0F, kInvalidArgument)
        << name << '[' << i << "] holds " << value
        << "; wanted a finite number above 0, the step that codes are multiplied by";
  }
}

void CheckInputScales(const MoeSpec& spec, const ExpertMatrices& group, const GroupRule& rule) {
  const std::string name = std::string("weights.") + rule.name;
  MatrixRule scale;
  scale.place = rule.place;
  scale.name = name + ".gemm1_input_scale";
  scale.experts = 1;
  CheckInputScale(spec, group.gemm1_input_scale, scale);
  scale.name = name + ".gemm2_input_scale";
  scale.experts = rule.experts;
  CheckInputScale(spec, group.gemm2_input_scale, scale);
}

// The optional tensors of a group beside its matrices.
struct GroupTensor {
  const char* field = "";
  const TensorView* view = nullptr;
};

std::array<GroupTensor, 3> ParametersOf(const ExpertMatrices& group) {
  return {{{".alpha", &group.alpha}, {".beta", &group.beta}, {".limit", &group.limit}}};
}

void CheckParameters(const MoeSpec& spec, const ExpertMatrices& group, const GroupRule& rule) {
  const ActivationKind kind = spec.activation.kind;
  for (const auto& [field, view] : ParametersOf(group)) {
    if (!view->defined()) {
      continue;
    }
    const std::string name = std::string("weights.") + rule.name + field;
    HOPYARD_CHECK(kind == ActivationKind::kSwiGlu || kind == ActivationKind::kSiTu,
                  kInvalidArgument)
        << name << " is given, but activation " << ToString(kind)
        << " takes no alpha, beta or limit; only swiglu and situ do";
    rule.place->CheckTensor(*view, {name.c_str(), {DType::kFloat32}, {rule.experts}});
  }
}

// All experts read the same quantised hidden states.
void CheckOneHiddenScale(const WeightsDesc& desc, const Place& place) {
  if (!desc.routed.gemm1_input_scale.defined()) {
    return;
  }
  const float routed = place.Read(desc.routed.gemm1_input_scale, 1).front();
  const float shared = place.Read(desc.shared.gemm1_input_scale, 1).front();
  HOPYARD_CHECK(routed == shared, kInvalidArgument)
      << "weights.shared.gemm1_input_scale holds " << shared << "; wanted " << routed
      << ", the routed experts' scale: hidden states are quantised once";
}

void CheckNoShared(const ExpertMatrices& unused) {
  const bool matrices = HasTensors(unused.gemm1) || HasTensors(unused.gate) ||
                        HasTensors(unused.up) || HasTensors(unused.gemm2);
  const char* field = matrices                             ? ""
                      : unused.gemm1_input_scale.defined() ? ".gemm1_input_scale"
                      : unused.gemm2_input_scale.defined() ? ".gemm2_input_scale"
                                                           : nullptr;
  for (const auto& [parameter, view] : ParametersOf(unused)) {
    field = field == nullptr && view->defined() ? parameter : field;
  }
  HOPYARD_CHECK(field == nullptr, kInvalidArgument)
      << "weights.shared" << field
      << " is given, but spec.shared.count=0; leave it absent or set the count";
}

void CheckPacked(const MoeSpec& spec, const Place& place) {
  const bool any = formats::HasPackedOrder(spec.weights) ||
                   (spec.shared.count > 0 && formats::HasPackedOrder(spec.shared.weights));
  HOPYARD_CHECK(any, kInvalidArgument)
      << "weights.packed=true, but " << ToString(spec.weights)
      << " weights have no packed order; wanted mxfp4 or nvfp4, or packed=false";
  HOPYARD_CHECK(place.device.kind == DeviceKind::kCuda, kInvalidArgument)
      << "weights.packed=true, but the weights lie on the CPU, which reads them as they are; "
         "wanted "
         "weights on a GPU, or packed=false";
}

}  // namespace

void ValidateWeights(const MoeSpec& spec, const WeightsDesc& desc, const Place& place) {
  HOPYARD_CHECK(desc.struct_size == sizeof(WeightsDesc), kInvalidArgument)
      << "WeightsDesc.struct_size=" << desc.struct_size << "; this library knows "
      << sizeof(WeightsDesc) << ": compile against its headers";
  if (desc.packed) {
    CheckPacked(spec, place);
  }
  const GroupRule routed = {"routed", spec.num_local_experts(), spec.weights, &place};
  CheckGroup(spec, desc.routed, routed);
  CheckInputScales(spec, desc.routed, routed);
  CheckParameters(spec, desc.routed, routed);
  if (spec.shared.count == 0) {
    CheckNoShared(desc.shared);
    return;
  }
  const GroupRule shared = {"shared", spec.shared.count, spec.shared.weights, &place};
  CheckGroup(spec, desc.shared, shared);
  CheckInputScales(spec, desc.shared, shared);
  CheckParameters(spec, desc.shared, shared);
  CheckOneHiddenScale(desc, place);
}

}  // namespace hopyard::spec
