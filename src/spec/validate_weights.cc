// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "core/error.h"
#include "core/shape.h"
#include "spec/format_rules.h"
#include "spec/validate.h"

namespace hopyard::spec {
namespace {

struct MatrixRule {
  std::string name;  // "weights.routed.gemm1"
  int64_t experts = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  WeightFormat format = WeightFormat::kBf16;
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
void ForEachExpert(const std::string& name, int64_t experts, const TensorView& all,
                   const std::vector<TensorView>& each, Check&& check) {
  HOPYARD_CHECK(!(all.defined() && !each.empty()), kInvalidArgument)
      << name << " is given both as one tensor and per expert; give one of them";
  if (!each.empty()) {
    HOPYARD_CHECK(static_cast<int64_t>(each.size()) == experts, kInvalidArgument)
        << name << " has " << each.size() << " per-expert tensors; wanted " << experts;
    for (const TensorView& view : each) {
      check(view);
    }
    return;
  }
  HOPYARD_CHECK(all.defined(), kInvalidArgument) << name << " is missing";
  HOPYARD_CHECK(all.ndim >= 2 && all.shape[0] == experts, kInvalidArgument)
      << name << " has shape " << ShapeString(all) << "; wanted " << experts
      << " experts as the first dimension";
  check(OneExpert(all));
}

void CheckValues(const TensorView& view, const MatrixSet& set, const MatrixRule& rule) {
  const WeightFormatRule format = RuleOf(rule.format);
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
        << block * format.codes_per_byte << "; got " << rule.cols;
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
  HOPYARD_CHECK(view.data != nullptr, kInvalidArgument) << name << " has a null pointer";
  HOPYARD_CHECK(view.strides.at(static_cast<size_t>(ndim - 1)) == 1 || want[ndim - 1] == 1,
                kInvalidArgument)
      << name << " must be contiguous along its last dimension";
  HOPYARD_CHECK(ndim == 2 || view.strides[1] == want[2], kInvalidArgument)
      << name << " must have contiguous K blocks";
}

void CheckScales(const MatrixSet& set, const MatrixRule& rule) {
  const WeightFormatRule format = RuleOf(rule.format);
  const std::string name = rule.name + ".scales";
  if (format.scale_block == 0 && !format.per_row_scale) {
    HOPYARD_CHECK(!set.scales.defined() && set.scales_per_expert.empty(), kInvalidArgument)
        << name << " is given, but " << ToString(rule.format) << " has no such scales";
    return;
  }
  int64_t rows = rule.rows;
  int64_t cols = 1;
  if (format.scale_block > 0) {
    const int64_t origin = format.scale_block_rows > 1 ? set.row_origin : 0;
    rows = CeilDiv(origin + rule.rows, format.scale_block_rows);
    cols = CeilDiv(set.col_origin + rule.cols, format.scale_block);
  }
  ForEachExpert(name, rule.experts, set.scales, set.scales_per_expert, [&](const TensorView& view) {
    HOPYARD_CHECK(view.dtype == format.scale_dtype, kInvalidArgument)
        << name << " is " << ToString(view.dtype) << "; " << ToString(rule.format) << " wants "
        << ToString(format.scale_dtype);
    HOPYARD_CHECK(view.data != nullptr, kInvalidArgument) << name << " has a null pointer";
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
    HOPYARD_CHECK(vector || cols == 1 || view.strides[1] == 1, kInvalidArgument)
        << name << " must be contiguous along its last dimension";
  });
}

void CheckLayout(const MatrixSet& set, const MatrixRule& rule) {
  const int64_t block = set.row_map == RowMap::kShuffled128  ? 32
                        : set.row_map == RowMap::kShuffled64 ? 16
                                                             : 1;
  HOPYARD_CHECK(rule.rows % block == 0, kInvalidArgument)
      << rule.name << " has " << rule.rows
      << " rows; its shuffled row map works on whole blocks of " << block;
  const WeightFormatRule format = RuleOf(rule.format);
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
  ForEachExpert(rule.name + ".values", rule.experts, set.values, set.values_per_expert,
                [&](const TensorView& view) { CheckValues(view, set, rule); });
  CheckScales(set, rule);
  const std::string bias_name = rule.name + ".bias";
  if (set.bias.defined() || !set.bias_per_expert.empty()) {
    ForEachExpert(
        bias_name, rule.experts, set.bias, set.bias_per_expert, [&](const TensorView& view) {
          CheckTensor(view, {bias_name.c_str(), {DType::kFloat32, DType::kBf16}, {rule.rows}});
        });
  }
  const std::string global_name = rule.name + ".global_scales";
  if (set.global_scales.defined()) {
    HOPYARD_CHECK(RuleOf(rule.format).global_scale, kInvalidArgument)
        << global_name << " is given, but " << ToString(rule.format) << " has none";
    CheckTensor(set.global_scales, {global_name.c_str(), {DType::kFloat32}, {rule.experts}});
  }
}

struct GroupRule {
  const char* name = "";
  int64_t experts = 0;
  WeightFormat format = WeightFormat::kBf16;
};

void CheckGroup(const MoeSpec& spec, const ExpertMatrices& group, const GroupRule& rule) {
  const std::string name = std::string("weights.") + rule.name;
  const int64_t hidden = spec.hidden_size;
  const int64_t inter = spec.intermediate_size;
  const bool apart = group.gate.defined() || group.up.defined();
  HOPYARD_CHECK(group.gemm1.defined() != apart, kInvalidArgument)
      << name
      << (apart ? " has both gemm1 and gate/up; give one of them"
                : " has neither gemm1 nor gate and up");
  if (apart) {
    HOPYARD_CHECK(IsGated(spec.activation.kind), kInvalidArgument)
        << name << " has gate and up, but activation " << ToString(spec.activation.kind)
        << " is not gated; give gemm1 [experts, intermediate_size, hidden_size]";
    CheckMatrix(group.gate, {name + ".gate", rule.experts, inter, hidden, rule.format});
    CheckMatrix(group.up, {name + ".up", rule.experts, inter, hidden, rule.format});
  } else {
    CheckMatrix(group.gemm1,
                {name + ".gemm1", rule.experts, spec.gemm1_rows(), hidden, rule.format});
  }
  CheckMatrix(group.gemm2, {name + ".gemm2", rule.experts, hidden, inter, rule.format});
}

void CheckInputScales(const MoeSpec& spec, const ExpertMatrices& group, const GroupRule& rule) {
  const bool needed = spec.activations == ActivationFormat::kFp8PerTensor ||
                      spec.activations == ActivationFormat::kNvFp4;
  const auto check = [&](const TensorView& scale, const char* name, int64_t experts) {
    HOPYARD_CHECK(scale.defined() || !needed, kInvalidArgument)
        << "weights." << rule.name << '.' << name << " is missing; " << ToString(spec.activations)
        << " activations have a static scale";
    if (!scale.defined()) {
      return;
    }
    HOPYARD_CHECK(scale.numel() == 1 || scale.numel() == experts, kInvalidArgument)
        << "weights." << rule.name << '.' << name << " has " << scale.numel() << " values; wanted 1"
        << (experts > 1 ? " or " + std::to_string(experts) : std::string());
    CheckTensor(scale, {name, {DType::kFloat32}, {scale.numel()}});
  };
  check(group.gemm1_input_scale, "gemm1_input_scale", 1);
  check(group.gemm2_input_scale, "gemm2_input_scale", rule.experts);
}

}  // namespace

void ValidateWeights(const MoeSpec& spec, const WeightsDesc& desc) {
  HOPYARD_CHECK(desc.struct_size == sizeof(WeightsDesc), kInvalidArgument)
      << "WeightsDesc.struct_size=" << desc.struct_size << "; this library knows "
      << sizeof(WeightsDesc) << ": compile against its headers";
  const GroupRule routed = {"routed", spec.num_local_experts(), spec.weights};
  CheckGroup(spec, desc.routed, routed);
  CheckInputScales(spec, desc.routed, routed);
  if (spec.shared.count > 0) {
    const GroupRule shared = {"shared", spec.shared.count, spec.shared.weights};
    CheckGroup(spec, desc.shared, shared);
    CheckInputScales(spec, desc.shared, shared);
  }
}

}  // namespace hopyard::spec
