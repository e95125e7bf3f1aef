// SPDX-License-Identifier: Apache-2.0
#include "plan/sm90/device_weights.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "core/error.h"
#include "formats/format_rules.h"
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
  out->shape = ShapeOf(source.experts.front(), source.swizzled);
  out->shape.experts = experts;
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
  return args;
}

GroupMatrix MakeMatrix(const Source& source, Uploader* uploader) {
  CheckUniform(source);
  const MatrixRef& first = source.experts.front();
  const auto experts = static_cast<int64_t>(source.experts.size());
  GroupMatrix out;
  MakeMaps(source, &out, uploader);
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
  out.args.row_unit = RowUnitOf(out.shape);
  out.args.whole_lines = gemm::sm90::HasWholeLines(out.shape);
  if (source.row_exponents) {
    out.row_exponents = uploader->Array<uint8_t>(experts * first.rows);
  }
  std::vector<ExpertPointers> pointers;
  std::vector<const void*> values;
  for (const MatrixRef& ref : source.experts) {
    ExpertPointers one;
    one.scales = ref.scales;
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
    out.values = uploader->Table(values);
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
  const auto matrix = [&](const char* field, const MatrixSet& set, MatrixRef ExpertRef::*part,
                          const gemm::sm90::RowFormat& rows) {
    Source one;
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
  group.first = matrix(apart ? "gate" : "gemm1", apart ? matrices.gate : matrices.gemm1,
                       &ExpertRef::gate, operands.x);
  if (IsGated(spec.activation.kind)) {
    group.second = matrix(apart ? "up" : "gemm1", apart ? matrices.up : matrices.gemm1,
                          &ExpertRef::up, operands.x);
  }
  HOPYARD_CHECK(!apart || IsMnMajor(matrices.gate) == IsMnMajor(matrices.up), kUnsupported)
      << "weights." << source.name << ".up is " << (IsMnMajor(matrices.up) ? "MN" : "K")
      << "-major and gate is not; the GPU reads both in one pass: store them in the same order";
  group.down = matrix("gemm2", matrices.gemm2, &ExpertRef::down, operands.h);
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
  bool values_or_scales = false;
  for (const PartWrite& part : update.parts) {
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
  const DeviceWeights& described = *weights.sm90;
  const bool routed = update.expert < described.routed.segment_end;
  const Group& group = routed ? described.routed : described.shared;
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
