// SPDX-License-Identifier: Apache-2.0
#include "hopyard/weights.h"

#include <utility>

#include "core/error.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "plan/backend_sm90.h"
#include "spec/validate.h"

namespace hopyard {
namespace {

using gemm::ExpertRef;
using gemm::MatrixRef;

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
  const auto parameter = [expert](const TensorView& all) {
    return all.defined() ? all.as<const float>() + expert : nullptr;
  };
  ref.alpha = parameter(group.alpha);
  ref.beta = parameter(group.beta);
  ref.limit = parameter(group.limit);
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
  rules.has_global_scale = target.global_scale != nullptr;
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

gemm::SliceWrite WriteOf(gemm::SlicePart part, const MatrixRef& target, const WeightSlice& slice,
                         const TensorView& source) {
  gemm::SliceWrite write;
  write.target = target;
  write.rule = formats::RuleOf(target.format);
  write.part = part;
  write.row_begin = slice.row_begin;
  write.col_begin = slice.col_begin;
  write.size = SizeOf(source.dtype);
  write.rows = source.shape[0];
  write.cols = source.ndim == 2 ? source.shape[1] : 1;
  write.source = source.as<const uint8_t>();
  write.row_stride = source.strides[0] * write.size;
  write.col_stride = source.ndim == 2 ? source.strides[1] * write.size : 0;
  return write;
}

// The parts that a checked slice writes by element; the global scale is not one of them.
std::vector<sm90::PartWrite> WritesOf(const MatrixRef& target, const WeightSlice& slice) {
  std::vector<sm90::PartWrite> writes;
  const auto add = [&](gemm::SlicePart part, const TensorView& source) {
    if (source.defined()) {
      writes.push_back(
          {WriteOf(part, target, slice, source), source.device.kind == DeviceKind::kCpu});
    }
  };
  add(gemm::SlicePart::kValues, slice.values);
  add(gemm::SlicePart::kScales, slice.scales);
  add(gemm::SlicePart::kBias, slice.bias);
  return writes;
}

// The device that the weights lie on, by one of the tensors that every layer has. Without a GPU
// backend it can only be the CPU.
spec::Place PlaceOf(const WeightsDesc& desc) {
  const MatrixSet& set = desc.routed.gemm2;
  const Device device =
      set.values_per_expert.empty() ? set.values.device : set.values_per_expert.front().device;
  const sm90::Backend* const backend = sm90::FindBackend();
  spec::Place place;
  if (device.kind == DeviceKind::kCpu || backend == nullptr) {
    return place;
  }
  place.device = device;
  place.whose = "the weights'";
  place.read = [](void* to, const void* from, int64_t bytes) {
    sm90::FindBackend()->Read(to, from, bytes);
  };
  return place;
}

// The global scale as it stands, where the slice has one to compare it with.
float StoredGlobalScale(const spec::Place& place, const MatrixRef& target,
                        const WeightSlice& slice) {
  if (target.global_scale == nullptr || !slice.global_scale.defined()) {
    return 0.0F;
  }
  return place.Read(TensorView::Contiguous(target.global_scale, DType::kFloat32, {1}, place.device),
                    1)[0];
}

void UpdateCpu(const WeightSlice& slice, const MatrixRef& target, int64_t stored_rows) {
  spec::SliceTarget rules = RulesOf(target, stored_rows);
  rules.global_scale = StoredGlobalScale({}, target, slice);
  spec::ValidateSlice(slice, rules);
  for (const sm90::PartWrite& part : WritesOf(target, slice)) {
    WriteSliceCpu(part.write);
  }
  if (slice.global_scale.defined()) {
    *target.global_scale = *slice.global_scale.as<float>();
  }
}

void UpdateSm90(const Weights::Impl& impl, const WeightSlice& slice, const MatrixRef& target,
                int64_t stored_rows, Stream stream) {
  const sm90::Backend* const backend = sm90::FindBackend();
  spec::Place place = PlaceOf(impl.desc);
  place.or_host = true;
  if (slice.global_scale.defined()) {
    backend->Wait(place.device.index);  // both of those that are compared have been written
  }
  spec::SliceTarget rules = RulesOf(target, stored_rows);
  rules.global_scale = StoredGlobalScale(place, target, slice);
  spec::ValidateSlice(slice, rules, place);
  sm90::Update update;
  update.expert = slice.expert;
  update.part = slice.part;
  update.parts = WritesOf(target, slice);
  float scale = 0.0F;
  if (slice.global_scale.defined()) {
    scale = place.Read(slice.global_scale, 1)[0];
    update.global_scale = &scale;
    update.global_scale_target = target.global_scale;
  }
  backend->Write(impl, update, stream.handle);
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

// Nothing of what `codes_owner` holds is read once the weights are packed.
bool HasOnlyPackedCodes(const MoeSpec& spec) {
  return formats::HasPackedOrder(spec.weights) &&
         (spec.shared.count == 0 || formats::HasPackedOrder(spec.shared.weights));
}

}  // namespace

Weights::Weights() = default;

Weights::Weights(const MoeSpec& spec, WeightsDesc desc) : impl_(std::make_shared<Impl>()) {
  spec::ValidateSpec(spec);
  const std::string unsupported = spec::UnsupportedReason(spec);
  HOPYARD_CHECK(unsupported.empty(), kUnsupported) << unsupported;
  const spec::Place place = PlaceOf(desc);
  const bool on_gpu = place.device.kind == DeviceKind::kCuda;
  if (on_gpu) {
    sm90::FindBackend()->Wait(place.device.index);  // whatever fills the weights is done
  }
  spec::ValidateWeights(spec, desc, place);
  impl_->spec = spec;
  impl_->device = place.device;
  impl_->desc = std::move(desc);
  const WeightsDesc& kept = impl_->desc;
  for (int64_t e = 0; e < spec.num_local_experts(); ++e) {
    impl_->experts.push_back(ResolveExpert(spec, kept.routed, spec.weights, e));
  }
  for (int64_t e = 0; e < spec.shared.count; ++e) {
    impl_->experts.push_back(ResolveExpert(spec, kept.shared, spec.shared.weights, e));
  }
  impl_->gemm1_input_scale = kept.routed.gemm1_input_scale.as<float>();
  if (on_gpu) {
    impl_->sm90 = sm90::FindBackend()->MakeWeights(*impl_);
    if (kept.packed && HasOnlyPackedCodes(spec)) {
      impl_->desc.codes_owner.reset();
    }
  }
}

const MoeSpec& Weights::spec() const {
  return impl().spec;
}

const WeightsDesc& Weights::desc() const {
  return impl().desc;
}

Device Weights::device() const {
  return impl().device;
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

void Weights::Update(const WeightSlice& slice, Stream stream) {
  HOPYARD_CHECK(impl_ != nullptr, kInvalidArgument) << "weights are empty; construct them first";
  HOPYARD_CHECK(!impl_->desc.read_only, kInvalidArgument)
      << "weights are a read-only view (a mapped checkpoint); load them into memory of your own to "
         "update them";
  HOPYARD_CHECK(slice.expert >= 0 && slice.expert < static_cast<int64_t>(impl_->experts.size()),
                kInvalidArgument)
      << "slice.expert=" << slice.expert << "; wanted 0 .. " << impl_->experts.size() - 1
      << " (local slots, then shared experts)";
  const MatrixRef target = TargetOf(*impl_, slice);
  const int64_t stored_rows = StoredRows(*impl_, slice, target);
  if (impl_->device.kind == DeviceKind::kCpu) {
    UpdateCpu(slice, target, stored_rows);
  } else {
    UpdateSm90(*impl_, slice, target, stored_rows, stream);
  }
}

}  // namespace hopyard
