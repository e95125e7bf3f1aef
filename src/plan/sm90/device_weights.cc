// SPDX-License-Identifier: Apache-2.0
#include "plan/sm90/device_weights.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/shape.h"
#include "formats/format_rules.h"
#include "plan/sm90/kernel_roles.h"
#include "plan/sm90/layer_plan.h"

namespace hopyard::sm90 {
namespace {

using gemm::ExpertRef;
using gemm::MatrixRef;
using gemm::sm90::ExpertPointers;
using gemm::sm90::MapShape;
using gemm::sm90::TensorMap;

// Copies tables to the device and keeps them in `out`.
class Uploader {
 public:
  explicit Uploader(DeviceWeights* out) : out_(out) {}

  template <class T>
  T* Array(int64_t count) {
    out_->tables.emplace_back(count * static_cast<int64_t>(sizeof(T)));
    return out_->tables.back().as<T>();
  }
  template <class T>
  const T* Table(const std::vector<T>& values) {
    const auto count = static_cast<int64_t>(values.size());
    T* const table = Array<T>(count);
    device::Copy(table, values.data(), count * static_cast<int64_t>(sizeof(T)));
    return table;
  }

 private:
  DeviceWeights* out_;
};

// A matrix of a group as the description gives it.
struct Source {
  std::string name;  // "weights.routed.gemm1"
  const MatrixSet* set = nullptr;
  std::vector<MatrixRef> experts;
  bool row_exponents = false;
  bool swizzled = false;  // tiles go to the tensor cores as they are
  // Where it is packed to, of the first expert (null: not at all), and the bytes of an expert.
  gemm::PackedOrder packed;
  int64_t packed_stride = 0;
};

bool IsMnMajor(const MatrixSet& set) {
  return set.major == MajorOrder::kMnMajor;
}

MapShape ShapeOf(const MatrixRef& ref, bool swizzled) {
  MapShape shape;
  shape.swizzled = swizzled;
  shape.format = ref.format;
  shape.values = ref.values;
  shape.rows = ref.rows;
  shape.cols = ref.cols;
  shape.value_stride = ref.value_stride;
  shape.position_begin = ref.position_begin;
  shape.position_step = ref.position_step;
  shape.major = ref.major;
  shape.row_map = ref.row_map;
  return shape;
}

// One map reaches all experts: they lie a stride apart, and the map has a dimension left.
bool HasOneMap(const MatrixSet& set) {
  return set.values_per_expert.empty() && set.major != MajorOrder::kBlockKMajor &&
         set.values.strides[0] >= 0;
}

void CheckReadable(const MapShape& shape, const std::string& name) {
  const std::string problem = MapProblem(shape);
  HOPYARD_CHECK(problem.empty(), kUnsupported) << name << ": " << problem;
}

// The kernels take one stride and one type for all experts of a group.
void CheckUniform(const Source& source) {
  const MatrixRef& first = source.experts.front();
  const formats::WeightFormatRule rule = formats::RuleOf(first.format);
  const MatrixSet& set = *source.set;
  HOPYARD_CHECK(set.col_origin == 0, kUnsupported)
      << source.name << ".col_origin=" << set.col_origin
      << "; the GPU reads rows from the start of a scale block: wanted 0, cut shards on multiples "
         "of "
      << rule.scale_block << " columns";
  for (size_t e = 0; e < source.experts.size(); ++e) {
    const MatrixRef& ref = source.experts[e];
    HOPYARD_CHECK(ref.scale_stride == first.scale_stride, kUnsupported)
        << source.name << ".scales[" << e << "] has " << ref.scale_stride
        << " elements from row to row; the GPU wants " << first.scale_stride
        << ", as for expert 0: copy them to one layout";
    HOPYARD_CHECK(ref.scale_layout == ScaleLayout::kLinear ||
                      reinterpret_cast<uintptr_t>(ref.scales) % 4 == 0,
                  kUnsupported)
        << source.name << ".scales[" << e << "] begins at " << static_cast<const void*>(ref.scales)
        << "; the GPU wants a multiple of 4 in the 128x4 layout";
    HOPYARD_CHECK(ref.bias_dtype == first.bias_dtype, kUnsupported)
        << source.name << ".bias[" << e << "] is " << ToString(ref.bias_dtype) << "; the GPU wants "
        << ToString(first.bias_dtype) << ", as for expert 0";
  }
  HOPYARD_CHECK(!rule.per_row_scale || first.scale_stride == 1, kUnsupported)
      << source.name << ".scales has " << first.scale_stride
      << " elements from row to row; the GPU wants 1: copy them to contiguous memory";
}

void MakeMaps(const Source& source, GroupMatrix* out, Uploader* uploader) {
  const MatrixSet& set = *source.set;
  const auto experts = static_cast<int64_t>(source.experts.size());
  const std::string name = source.name + ".values";
  if (HasOneMap(set)) {
    out->shape.expert_stride = experts > 1 ? set.values.strides[0] * SizeOf(set.values.dtype) : 0;
    CheckReadable(out->shape, name);
    out->args.map = MakeTensorMap(out->shape);
    return;
  }
  std::vector<TensorMap> maps;
  for (int64_t e = 0; e < experts; ++e) {
    const MapShape shape = ShapeOf(source.experts[static_cast<size_t>(e)], source.swizzled);
    CheckReadable(shape, name + '[' + std::to_string(e) + ']');
    maps.push_back(MakeTensorMap(shape));
  }
  out->args.expert_maps = uploader->Table(maps);
}

gemm::sm90::RowExponentArgs ExponentsOf(const GroupMatrix& matrix, int64_t expert,
                                        int64_t experts) {
  gemm::sm90::RowExponentArgs args;
  args.matrix = matrix.args;
  args.matrix.pointers = matrix.args.pointers + expert;
  args.shape = matrix.shape;
  args.shape.experts = experts;
  args.values = matrix.values + expert;
  args.out = matrix.row_exponents + expert * matrix.args.rows;
  args.packed = matrix.packed;
  if (args.packed.base != nullptr) {
    args.packed.base += expert * matrix.args.packed_stride;
  }
  return args;
}

// Packs every expert's matrix.
void Pack(const Source& source, GroupMatrix* out) {
  out->packed = source.packed;
  out->args.packed = source.packed.base;
  out->args.packed_stride = source.packed_stride;
  for (size_t e = 0; e < source.experts.size(); ++e) {
    const MatrixRef& from = source.experts[e];
    gemm::PackedOrder to = source.packed;
    to.base += static_cast<int64_t>(e) * source.packed_stride;
    gemm::PackSm90({from, formats::RuleOf(from.format), to}, nullptr);
  }
}

GroupMatrix MakeMatrix(const Source& source, Uploader* uploader) {
  CheckUniform(source);
  const MatrixRef& first = source.experts.front();
  const auto experts = static_cast<int64_t>(source.experts.size());
  GroupMatrix out;
  out.shape = ShapeOf(first, source.swizzled);
  out.shape.experts = experts;
  if (source.packed.base == nullptr) {
    MakeMaps(source, &out, uploader);
  } else {
    Pack(source, &out);
  }
  out.args.rows = first.rows;
  out.args.position_begin = first.position_begin;
  out.args.position_step = first.position_step;
  out.args.row_map = first.row_map;
  out.args.scale_layout = first.scale_layout;
  out.args.scale_stride = first.scale_stride;
  out.args.scale_row_origin = first.row_origin;
  out.args.bias_dtype = first.bias_dtype;
  out.args.has_bias = first.bias != nullptr;
  out.args.has_global_scale = first.global_scale != nullptr;
  out.args.k_blocks_last = first.major == MajorOrder::kBlockKMajor ? 1 : 0;
  if (out.args.packed == nullptr) {
    out.args.row_unit = RowUnitOf(out.shape);
    out.args.whole_lines = gemm::sm90::HasWholeLines(out.shape);
  }
  if (source.row_exponents) {
    out.row_exponents = uploader->Array<uint8_t>(experts * first.rows);
  }
  std::vector<ExpertPointers> pointers;
  std::vector<const void*> values;
  for (const MatrixRef& ref : source.experts) {
    ExpertPointers one;
    one.scales = out.args.packed == nullptr ? ref.scales : nullptr;
    one.bias = ref.bias;
    one.global_scale = ref.global_scale;
    if (out.row_exponents != nullptr) {
      one.row_exponents = out.row_exponents + static_cast<int64_t>(values.size()) * first.rows;
    }
    values.push_back(ref.values);
    pointers.push_back(one);
  }
  out.args.pointers = uploader->Table(pointers);
  if (source.row_exponents) {
    out.values = out.args.packed == nullptr ? uploader->Table(values) : nullptr;
    ComputeRowExponents(ExponentsOf(out, 0, experts), nullptr);
  }
  return out;
}

// One parameter of the activation for every expert of the group; null where all are neutral.
const float* Parameter(const PerExpert& parameter, const Group& group, bool shared, float neutral,
                       Uploader* uploader) {
  std::vector<float> values;
  for (int32_t s = group.segment_begin; s < group.segment_end; ++s) {
    values.push_back(shared ? parameter.all : parameter.at(s));
  }
  const bool plain =
      std::all_of(values.begin(), values.end(), [&](float value) { return value == neutral; });
  return plain ? nullptr : uploader->Table(values);
}

// The caller's own tensors are read where they are, by every call.
void SetActivation(const Activation& activation, const ExpertMatrices& matrices, bool shared,
                   Group* group, Uploader* uploader) {
  // NaN equals nothing: SiTU has no neutral alpha and beta.
  const bool has_neutral = activation.kind != ActivationKind::kSiTu;
  const Activation usual;
  const auto set = [&](const TensorView& own, const PerExpert& of_spec, float neutral) {
    return own.defined() ? own.as<const float>()
                         : Parameter(of_spec, *group, shared, neutral, uploader);
  };
  group->alpha = set(matrices.alpha, activation.alpha, has_neutral ? usual.alpha.all : NAN);
  group->beta = set(matrices.beta, activation.beta, has_neutral ? usual.beta.all : NAN);
  group->limit = set(matrices.limit, activation.limit, usual.limit.all);
}

// Memory for the packed matrices of a group's experts; gate and up share it.
struct PackedRoom {
  gemm::PackedOrder order;
  int64_t stride = 0;
};
PackedRoom RoomFor(const MatrixRef& matrix, bool paired, int64_t experts, Uploader* uploader) {
  const formats::WeightFormatRule rule = formats::RuleOf(matrix.format);
  PackedRoom room;
  room.order.groups = CeilDiv(matrix.cols, gemm::sm90::kKGroup);
  room.order.scale_bytes = static_cast<int32_t>(gemm::sm90::kKGroup / rule.scale_block);
  room.order.paired = paired;
  room.stride = PackedExpertBytes(room.order, matrix.rows);
  room.order.base = uploader->Array<uint8_t>(experts * room.stride);
  device::Zero(room.order.base, experts * room.stride);
  return room;
}

// Every kernel that a plan may choose has one for packed weights.
void CheckPackable(WeightFormat weights, const gemm::sm90::LayerOperands& operands, bool gated,
                   const char* name) {
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    const gemm::sm90::KernelInfo kernel = gemm::sm90::KernelAt(i);
    const bool used = gemm::sm90::Runs(i, weights, operands.x, gated) ||
                      gemm::sm90::Runs(i, weights, operands.h, false);
    HOPYARD_CHECK(kernel.packed || !used || gemm::sm90::PackedTwin(i) >= 0, kUnsupported)
        << "weights." << name << ": " << NoPackedKernel(weights, i);
  }
}

struct GroupSource {
  const ExpertMatrices* matrices = nullptr;
  const char* name = "";
  WeightFormat weights = WeightFormat::kBf16;
  bool shared = false;
  int segment_begin = 0;
  int segment_end = 0;
};

Group MakeGroup(const Weights::Impl& weights, const GroupSource& source, Uploader* uploader) {
  Group group;
  group.segment_begin = source.segment_begin;
  group.segment_end = source.segment_end;
  const MoeSpec& spec = weights.spec;
  const ExpertMatrices& matrices = *source.matrices;
  const gemm::sm90::LayerOperands operands = FormatsOf(spec, source.weights, false).operands;
  // Plans that round may come to the same weights.
  const bool fp8_math = FormatsOf(spec, source.weights, true).operands.x.dtype == DType::kE4m3;
  const bool row_exponents = fp8_math && formats::RuleOf(source.weights).codes_per_byte == 2;
  const bool packed = weights.desc.packed && formats::HasPackedOrder(source.weights);
  const bool gated = IsGated(spec.activation.kind);
  if (packed) {
    CheckPackable(source.weights, operands, gated, source.name);
  }
  const auto matrix = [&](const char* field, const MatrixSet& set, MatrixRef ExpertRef::*part,
                          const gemm::sm90::RowFormat& rows, const PackedRoom& room) {
    Source one;
    one.packed = room.order;
    one.packed.second = part == &ExpertRef::up;
    one.packed_stride = room.stride;
    one.name = std::string("weights.") + source.name + '.' + field;
    one.set = &set;
    one.row_exponents = row_exponents;
    one.swizzled = gemm::sm90::IsSwizzled(source.weights, rows);
    for (int32_t s = group.segment_begin; s < group.segment_end; ++s) {
      one.experts.push_back(weights.experts[static_cast<size_t>(s)].*part);
    }
    return MakeMatrix(one, uploader);
  };
  const bool apart = matrices.gate.defined();
  const auto room = [&](const MatrixRef ExpertRef::*part, bool paired) {
    const auto first = static_cast<size_t>(group.segment_begin);
    return packed ? RoomFor(weights.experts[first].*part, paired,
                            group.segment_end - group.segment_begin, uploader)
                  : PackedRoom{};
  };
  const PackedRoom gemm1 = room(&ExpertRef::gate, gated);
  group.first = matrix(apart ? "gate" : "gemm1", apart ? matrices.gate : matrices.gemm1,
                       &ExpertRef::gate, operands.x, gemm1);
  if (gated) {
    group.second = matrix(apart ? "up" : "gemm1", apart ? matrices.up : matrices.gemm1,
                          &ExpertRef::up, operands.x, gemm1);
  }
  HOPYARD_CHECK(!apart || IsMnMajor(matrices.gate) == IsMnMajor(matrices.up), kUnsupported)
      << "weights." << source.name << ".up is " << (IsMnMajor(matrices.up) ? "MN" : "K")
      << "-major and gate is not; the GPU reads both in one pass: store them in the same order";
  group.down =
      matrix("gemm2", matrices.gemm2, &ExpertRef::down, operands.h, room(&ExpertRef::down, false));
  SetActivation(spec.activation, matrices, source.shared, &group, uploader);
  if (matrices.gemm2_input_scale.defined()) {
    group.gemm2_input_scale = matrices.gemm2_input_scale.as<const float>();
    group.gemm2_input_scale_stride = matrices.gemm2_input_scale.numel() == 1 ? 0 : 1;
  }
  return group;
}

// The elements of a host source one after the other.
std::vector<uint8_t> Pack(const gemm::SliceWrite& write) {
  std::vector<uint8_t> packed;
  packed.reserve(static_cast<size_t>(write.rows * write.cols * write.size));
  for (int64_t r = 0; r < write.rows; ++r) {
    for (int64_t c = 0; c < write.cols; ++c) {
      const uint8_t* from = write.source + r * write.row_stride + c * write.col_stride;
      packed.insert(packed.end(), from, from + write.size);
    }
  }
  return packed;
}

// From the host by way of a buffer, which must live until the write has been done.
void WriteFromHost(gemm::SliceWrite write, void* stream) {
  const std::vector<uint8_t> packed = Pack(write);
  const auto bytes = static_cast<int64_t>(packed.size());
  const device::Buffer staging(bytes);
  device::CopyAsync(staging.as<uint8_t>(), packed.data(), bytes, stream);
  write.source = staging.as<uint8_t>();
  write.col_stride = write.size;
  write.row_stride = write.cols * write.size;
  WriteSliceSm90(write, stream);
  device::Synchronize(stream);
}

// A write of rows of gate and up as two, each into one of them.
std::vector<PartWrite> SplitGemm1(const PartWrite& part, const ExpertRef& expert) {
  std::vector<PartWrite> split;
  const gemm::SliceWrite& whole = part.write;
  for (const MatrixRef* matrix : {&expert.gate, &expert.up}) {
    const int64_t step = matrix->position_step;
    // The first natural row at or behind the slice's first position.
    const int64_t ahead = whole.row_begin - matrix->position_begin;
    const int64_t first = ahead <= 0 ? 0 : CeilDiv(ahead, step);
    const int64_t skipped = matrix->position_begin + first * step - whole.row_begin;
    const int64_t left = std::min(CeilDiv(whole.rows - skipped, step), matrix->rows - first);
    if (left <= 0) {
      continue;
    }
    PartWrite one = part;
    one.write.target = *matrix;
    one.write.row_begin = first;
    one.write.rows = left;
    one.write.source = whole.source + skipped * whole.row_stride;
    one.write.row_stride = whole.row_stride * step;
    split.push_back(one);
  }
  return split;
}

// The writes of a slice, into packed memory where that is what is read.
std::vector<PartWrite> WritesInto(const Group& group, const ExpertRef& expert,
                                  const Update& update) {
  const bool down = update.part == WeightPart::kGemm2;
  const int64_t index = update.expert - group.segment_begin;
  std::vector<PartWrite> writes;
  for (const PartWrite& part : update.parts) {
    const bool packed =
        group.down.args.packed != nullptr && part.write.part != gemm::SlicePart::kBias;
    const bool both = update.part == WeightPart::kGemm1 && group.second.args.rows > 0;
    const std::vector<PartWrite> pieces =
        packed && both ? SplitGemm1(part, expert) : std::vector<PartWrite>{part};
    for (PartWrite piece : pieces) {
      const bool up = update.part == WeightPart::kUp ||
                      (both && piece.write.target.position_begin == expert.up.position_begin);
      const GroupMatrix& matrix = down ? group.down : up ? group.second : group.first;
      if (packed) {
        piece.write.target.packed = matrix.packed;
        piece.write.target.packed.base += index * matrix.args.packed_stride;
      }
      writes.push_back(piece);
    }
  }
  return writes;
}

void UpdateExponents(const GroupMatrix& matrix, int64_t expert, void* stream) {
  if (matrix.row_exponents != nullptr) {
    ComputeRowExponents(ExponentsOf(matrix, expert, 1), stream);
  }
}

}  // namespace

std::shared_ptr<const DeviceWeights> MakeDeviceWeights(const Weights::Impl& weights) {
  const MoeSpec& spec = weights.spec;
  auto out = std::make_shared<DeviceWeights>();
  Uploader uploader(out.get());
  const int local = spec.num_local_experts();
  out->routed = MakeGroup(weights, {&weights.desc.routed, "routed", spec.weights, false, 0, local},
                          &uploader);
  if (spec.shared.count > 0) {
    out->shared = MakeGroup(weights,
                            {&weights.desc.shared, "shared", spec.shared.weights, true, local,
                             local + spec.shared.count},
                            &uploader);
  }
  out->gemm1_input_scale = weights.gemm1_input_scale;
  device::SynchronizeDevice();
  return out;
}

void WriteSlice(const Weights::Impl& weights, const Update& update, void* stream) {
  const DeviceWeights& described = *weights.sm90;
  const bool routed = update.expert < described.routed.segment_end;
  const Group& group = routed ? described.routed : described.shared;
  const ExpertRef& expert_matrices = weights.experts[static_cast<size_t>(update.expert)];
  bool values_or_scales = false;
  for (const PartWrite& part : WritesInto(group, expert_matrices, update)) {
    values_or_scales = values_or_scales || part.write.part != gemm::SlicePart::kBias;
    if (part.write.rows == 0 || part.write.cols == 0) {
      continue;
    }
    if (part.source_on_host) {
      WriteFromHost(part.write, stream);
    } else {
      WriteSliceSm90(part.write, stream);
    }
  }
  if (update.global_scale != nullptr) {
    device::CopyAsync(update.global_scale_target, update.global_scale, sizeof(float), stream);
    device::Synchronize(stream);
  }
  if (!values_or_scales) {
    return;
  }
  const int64_t expert = update.expert - group.segment_begin;
  if (update.part == WeightPart::kGemm2) {
    UpdateExponents(group.down, expert, stream);
    return;
  }
  if (update.part != WeightPart::kUp) {
    UpdateExponents(group.first, expert, stream);
  }
  if (update.part != WeightPart::kGate) {
    UpdateExponents(group.second, expert, stream);
  }
}

}  // namespace hopyard::sm90
