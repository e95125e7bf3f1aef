// SPDX-License-Identifier: Apache-2.0
#include "hopyard/weights.h"

#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "plan/weights_impl.h"
#include "spec/validate.h"

namespace hopyard {
namespace {

using gemm::cpu::ExpertRef;
using gemm::cpu::MatrixRef;

// The view of expert e, from the stacked tensor or the list.
TensorView ViewOf(const TensorView& all, const std::vector<TensorView>& each, int64_t expert) {
  if (!each.empty()) {
    return each[static_cast<size_t>(expert)];
  }
  if (!all.defined()) {
    return {};
  }
  TensorView one = all;
  one.data = static_cast<uint8_t*>(all.data) + expert * all.strides[0] * SizeOf(all.dtype);
  one.ndim = all.ndim - 1;
  for (int d = 0; d < one.ndim; ++d) {
    one.shape.at(static_cast<size_t>(d)) = all.shape.at(static_cast<size_t>(d) + 1);
    one.strides.at(static_cast<size_t>(d)) = all.strides.at(static_cast<size_t>(d) + 1);
  }
  return one;
}

struct Part {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t position_begin = 0;
  int64_t position_step = 1;
};

MatrixRef Resolve(const MatrixSet& set, WeightFormat format, int64_t expert, const Part& part) {
  const formats::WeightFormatRule rule = formats::RuleOf(format);
  MatrixRef ref;
  ref.format = format;
  ref.major = set.major;
  ref.scale_layout = set.scale_layout;
  ref.row_map = set.row_map;
  const TensorView values = ViewOf(set.values, set.values_per_expert, expert);
  ref.values = values.as<uint8_t>();
  ref.value_stride = values.strides[0] * SizeOf(values.dtype);
  const TensorView scales = ViewOf(set.scales, set.scales_per_expert, expert);
  if (scales.defined()) {
    ref.scales = scales.as<uint8_t>();
    ref.scale_stride = set.scale_layout == ScaleLayout::kLinear
                           ? scales.strides[0]
                           : CeilDiv(set.col_origin + part.cols, rule.scale_block);
  }
  if (set.global_scales.defined()) {
    ref.global_scale = set.global_scales.as<float>() + expert * set.global_scales.strides[0];
  }
  const TensorView bias = ViewOf(set.bias, set.bias_per_expert, expert);
  if (bias.defined()) {
    ref.bias = bias.data;
    ref.bias_dtype = bias.dtype;
  }
  ref.rows = part.rows;
  ref.cols = part.cols;
  ref.position_begin = part.position_begin;
  ref.position_step = part.position_step;
  ref.row_origin = set.row_origin;
  ref.col_origin = set.col_origin;
  return ref;
}

// Where gate and up rows stand in a fused matrix of I features.
std::pair<Part, Part> GateUpParts(RowOrder order, int64_t inter, int64_t hidden) {
  switch (order) {
    case RowOrder::kUpGate:
      return {{inter, hidden, inter, 1}, {inter, hidden, 0, 1}};
    case RowOrder::kGateUp:
      return {{inter, hidden, 0, 1}, {inter, hidden, inter, 1}};
    case RowOrder::kInterleavedGateUp:
      return {{inter, hidden, 0, 2}, {inter, hidden, 1, 2}};
    case RowOrder::kInterleavedUpGate:
      return {{inter, hidden, 1, 2}, {inter, hidden, 0, 2}};
  }
  return {};
}

ExpertRef ResolveExpert(const MoeSpec& spec, const ExpertMatrices& group, WeightFormat format,
                        int64_t expert) {
  const int64_t inter = spec.intermediate_size;
  const int64_t hidden = spec.hidden_size;
  ExpertRef ref;
  if (group.gate.defined()) {
    ref.gate = Resolve(group.gate, format, expert, {inter, hidden, 0, 1});
    ref.up = Resolve(group.up, format, expert, {inter, hidden, 0, 1});
  } else if (IsGated(spec.activation.kind)) {
    const auto [gate, up] = GateUpParts(group.row_order, inter, hidden);
    ref.gate = Resolve(group.gemm1, format, expert, gate);
    ref.up = Resolve(group.gemm1, format, expert, up);
  } else {
    ref.gate = Resolve(group.gemm1, format, expert, {inter, hidden, 0, 1});
  }
  ref.down = Resolve(group.gemm2, format, expert, {hidden, inter, 0, 1});
  if (group.gemm2_input_scale.defined()) {
    const int64_t index = group.gemm2_input_scale.numel() == 1 ? 0 : expert;
    ref.gemm2_input_scale = group.gemm2_input_scale.as<float>() + index;
  }
  return ref;
}

// What ValidateSlice needs to know of a target that lies in a matrix of `stored_rows`.
spec::SliceTarget RulesOf(const MatrixRef& target, int64_t stored_rows) {
  spec::SliceTarget rules;
  rules.rows = target.rows;
  rules.cols = target.cols;
  rules.format = target.format;
  rules.row_origin = target.row_origin + target.position_begin;
  rules.col_origin = target.col_origin;
  rules.interleaved = target.position_step > 1;
  rules.has_bias = target.bias != nullptr;
  rules.bias_dtype = target.bias_dtype;
  rules.rows_before = target.position_begin;
  rules.rows_after = stored_rows - target.rows - target.position_begin;
  rules.global_scale = target.global_scale;
  return rules;
}

// The rows that a slice addresses, as one matrix whose natural rows are positions of the part.
MatrixRef TargetOf(const Weights::Impl& impl, const WeightSlice& slice) {
  HOPYARD_CHECK(slice.part <= WeightPart::kGemm2, kInvalidArgument)
      << "slice.part=" << static_cast<int>(slice.part) << " is not a WeightPart; wanted 0 .. "
      << static_cast<int>(WeightPart::kGemm2);
  const ExpertRef& expert = impl.experts[static_cast<size_t>(slice.expert)];
  const bool gated = IsGated(impl.spec.activation.kind);
  const auto local = static_cast<int64_t>(impl.spec.num_local_experts());
  const ExpertMatrices& group = slice.expert < local ? impl.desc.routed : impl.desc.shared;
  switch (slice.part) {
    case WeightPart::kGate:
    case WeightPart::kUp:
      HOPYARD_CHECK(gated, kInvalidArgument)
          << "slice.part is gate or up, but activation " << ToString(impl.spec.activation.kind)
          << " is not gated; use kGemm1";
      return slice.part == WeightPart::kGate ? expert.gate : expert.up;
    case WeightPart::kGemm1: {
      HOPYARD_CHECK(group.gemm1.defined(), kInvalidArgument)
          << "slice.part is gemm1, but these weights keep gate and up apart; update them one by "
             "one";
      MatrixRef whole = expert.gate;
      whole.rows = impl.spec.gemm1_rows();
      whole.position_begin = 0;
      whole.position_step = 1;
      return whole;
    }
    case WeightPart::kGemm2:
      return expert.down;
  }
  return expert.down;
}

// Rows of the stored matrix that holds the target: gate and up may be parts of a fused one.
int64_t StoredRows(const Weights::Impl& impl, const WeightSlice& slice, const MatrixRef& target) {
  const bool routed = slice.expert < static_cast<int64_t>(impl.spec.num_local_experts());
  const ExpertMatrices& group = routed ? impl.desc.routed : impl.desc.shared;
  const bool part = slice.part == WeightPart::kGate || slice.part == WeightPart::kUp;
  return part && group.gemm1.defined() ? impl.spec.gemm1_rows() : target.rows;
}

void WriteValues(const MatrixRef& target, const WeightSlice& slice) {
  const formats::WeightFormatRule rule = formats::RuleOf(target.format);
  const TensorView& values = slice.values;
  const int64_t per_byte = rule.codes_per_byte;
  const int64_t size = SizeOf(rule.code_dtype);
  const auto* source = values.as<const uint8_t>();
  for (int64_t r = 0; r < values.shape[0]; ++r) {
    for (int64_t c = 0; c < values.shape[1]; ++c) {
      const uint8_t* from = source + (r * values.strides[0] + c * values.strides[1]) * size;
      uint8_t* to = ValueAddress(target, slice.row_begin + r, slice.col_begin + c * per_byte);
      std::memcpy(to, from, static_cast<size_t>(size));
    }
  }
}

// Scales of the blocks that the slice covers; row_begin and col_begin lie on block boundaries.
void WriteScales(const MatrixRef& target, const WeightSlice& slice) {
  const formats::WeightFormatRule rule = formats::RuleOf(target.format);
  const TensorView& scales = slice.scales;
  const int64_t row_block = rule.scale_block_rows;
  const int64_t col_block = rule.per_row_scale ? 1 : rule.scale_block;
  const int64_t row_phase =
      row_block > 1 ? (target.row_origin + target.position_begin + slice.row_begin) % row_block : 0;
  const int64_t col_phase = (target.col_origin + slice.col_begin) % col_block;
  const int64_t size = SizeOf(rule.scale_dtype);
  const int64_t num_cols = rule.per_row_scale ? 1 : scales.shape[1];
  for (int64_t r = 0; r < scales.shape[0]; ++r) {
    for (int64_t c = 0; c < num_cols; ++c) {
      // The first element of block (r, c): blocks after the first start where the phase ends.
      const int64_t row = slice.row_begin + (r == 0 ? 0 : r * row_block - row_phase);
      const int64_t col = slice.col_begin + (c == 0 ? 0 : c * col_block - col_phase);
      const int64_t offset =
          r * scales.strides[0] + (rule.per_row_scale ? 0 : c * scales.strides[1]);
      std::memcpy(ScaleAddress(target, row, col), scales.as<const uint8_t>() + offset * size,
                  static_cast<size_t>(size));
    }
  }
}

void WriteBias(const MatrixRef& target, const WeightSlice& slice) {
  const int64_t size = SizeOf(target.bias_dtype);
  for (int64_t r = 0; r < slice.bias.shape[0]; ++r) {
    std::memcpy(static_cast<uint8_t*>(target.bias) + StoredRow(target, slice.row_begin + r) * size,
                slice.bias.as<const uint8_t>() + r * slice.bias.strides[0] * size,
                static_cast<size_t>(size));
  }
}

int64_t MatrixBytes(const MatrixRef& ref) {
  const formats::WeightFormatRule rule = formats::RuleOf(ref.format);
  int64_t bytes = ref.rows * ref.cols * SizeOf(rule.code_dtype) / rule.codes_per_byte;
  if (rule.scale_block > 0) {
    bytes += CeilDiv(ref.rows, rule.scale_block_rows) * CeilDiv(ref.cols, rule.scale_block) *
             SizeOf(rule.scale_dtype);
  }
  return bytes + (rule.per_row_scale ? ref.rows * 4 : 0);
}

}  // namespace

Weights::Weights() = default;

Weights::Weights(const MoeSpec& spec, WeightsDesc desc) : impl_(std::make_shared<Impl>()) {
  spec::ValidateSpec(spec);
  const std::string unsupported = spec::UnsupportedReason(spec);
  HOPYARD_CHECK(unsupported.empty(), kUnsupported) << unsupported;
  spec::ValidateWeights(spec, desc);
  impl_->spec = spec;
  impl_->desc = std::move(desc);
  const WeightsDesc& kept = impl_->desc;
  for (int64_t e = 0; e < spec.num_local_experts(); ++e) {
    impl_->experts.push_back(ResolveExpert(spec, kept.routed, spec.weights, e));
  }
  for (int64_t e = 0; e < spec.shared.count; ++e) {
    impl_->experts.push_back(ResolveExpert(spec, kept.shared, spec.shared.weights, e));
  }
  impl_->gemm1_input_scale = kept.routed.gemm1_input_scale.as<float>();
}

const MoeSpec& Weights::spec() const {
  return impl().spec;
}

const WeightsDesc& Weights::desc() const {
  return impl().desc;
}

const Weights::Impl& Weights::impl() const {
  HOPYARD_CHECK(impl_ != nullptr, kInvalidArgument) << "weights are empty; construct them first";
  return *impl_;
}

int64_t Weights::bytes_per_expert() const {
  const bool gated = IsGated(spec().activation.kind);
  const ExpertRef& expert = impl_->experts.front();
  return MatrixBytes(expert.gate) + MatrixBytes(expert.down) + (gated ? MatrixBytes(expert.up) : 0);
}

void Weights::Update(const WeightSlice& slice) {
  HOPYARD_CHECK(impl_ != nullptr, kInvalidArgument) << "weights are empty; construct them first";
  HOPYARD_CHECK(!impl_->desc.read_only, kInvalidArgument)
      << "weights are a read-only view (a mapped checkpoint); load them into memory of your own to "
         "update them";
  HOPYARD_CHECK(slice.expert >= 0 && slice.expert < static_cast<int64_t>(impl_->experts.size()),
                kInvalidArgument)
      << "slice.expert=" << slice.expert << "; wanted 0 .. " << impl_->experts.size() - 1
      << " (local slots, then shared experts)";
  const MatrixRef target = TargetOf(*impl_, slice);
  spec::ValidateSlice(slice, RulesOf(target, StoredRows(*impl_, slice, target)));
  if (slice.values.defined()) {
    WriteValues(target, slice);
  }
  if (slice.scales.defined()) {
    WriteScales(target, slice);
  }
  if (slice.bias.defined()) {
    WriteBias(target, slice);
  }
  if (slice.global_scale.defined()) {
    *target.global_scale = *slice.global_scale.as<float>();
  }
}

}  // namespace hopyard
