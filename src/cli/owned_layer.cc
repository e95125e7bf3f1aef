// SPDX-License-Identifier: Apache-2.0
#include "cli/owned_layer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cli/console.h"
#include "cli/random.h"
#include "core/error.h"

namespace hopyard::cli {
namespace {

constexpr uint64_t kWeightPurpose = 1;
constexpr uint64_t kBiasPurpose = 2;
constexpr double kBiasStddev = 0.1;

bool HasGlobalScale(Format format) {
  return format == Format::kFp8PerTensor || format == Format::kNvFp4;
}

// The experts of one group, one matrix at a time.
struct GroupJob {
  OwnedExperts& experts;
  bool shared;
};

void BuildGroup(const GroupJob& job, const MatrixSource& source, const MatrixObserver& observer,
                Progress& progress) {
  OwnedMatrices& gemm1 = job.experts.gemm1;
  OwnedMatrices& gemm2 = job.experts.gemm2;
  Buffer scratch(std::max(gemm1.rows() * gemm1.cols(), gemm2.rows() * gemm2.cols()) * 2);
  for (int64_t expert = 0; expert < gemm1.experts(); ++expert) {
    for (const bool second : {false, true}) {
      OwnedMatrices& matrices = second ? gemm2 : gemm1;
      const MatrixId id{job.shared, second, expert};
      const TensorView values = source(id, scratch.as<uint16_t>());
      matrices.Set(expert, values);
      if (observer) {
        observer(id, values, matrices.Expert(expert));
      }
    }
    progress.Advance();
  }
}

void AllocateGroup(const MoeSpec& spec, bool shared, OwnedExperts* experts) {
  const Format format = FormatOf(shared ? spec.shared.weights : spec.weights);
  const int64_t count = shared ? spec.shared.count : spec.num_local_experts();
  experts->gemm1 = OwnedMatrices(format, count, spec.gemm1_rows(), spec.hidden_size);
  experts->gemm2 = OwnedMatrices(format, count, spec.hidden_size, spec.intermediate_size);
}

}  // namespace

Format FormatOf(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return Format::kBf16;
    case WeightFormat::kFp8Block128:
      return Format::kFp8Block128;
    case WeightFormat::kFp8PerTensor:
      return Format::kFp8PerTensor;
    case WeightFormat::kFp8PerChannel:
      return Format::kFp8PerRow;
    case WeightFormat::kMxFp8:
      return Format::kMxFp8;
    case WeightFormat::kNvFp4:
      return Format::kNvFp4;
    case WeightFormat::kMxFp4:
      return Format::kMxFp4;
    case WeightFormat::kMxInt4:
      return Format::kMxInt4;
  }
  return Format::kBf16;
}

OwnedMatrices::OwnedMatrices(Format format, int64_t experts, int64_t rows, int64_t cols)
    : format_(format),
      shape_(ShapeOf(format, rows, cols)),
      experts_(experts),
      rows_(rows),
      cols_(cols),
      codes_(experts * rows * shape_.code_cols * SizeOf(shape_.code_dtype)) {
  // A per-tensor scale is the global scale of its expert.
  if (!HasGlobalScale(format) || format == Format::kNvFp4) {
    scales_ = Buffer(experts * shape_.scale_numel * SizeOf(shape_.scale_dtype));
  } else {
    shape_.scale_rows = 0;
    shape_.scale_numel = 0;
  }
  if (HasGlobalScale(format)) {
    global_scales_ = Buffer(experts * SizeOf(DType::kFloat32));
    std::fill_n(global_scales_.as<float>(), experts, 1.0F);
  }
}

int64_t OwnedMatrices::Bytes(Format format, int64_t experts, int64_t rows, int64_t cols) {
  const FormatShape shape = ShapeOf(format, rows, cols);
  return experts * (rows * shape.code_cols * SizeOf(shape.code_dtype) +
                    shape.scale_numel * SizeOf(shape.scale_dtype));
}

QuantizedView OwnedMatrices::Expert(int64_t expert) const {
  QuantizedView view;
  view.format = format_;
  const int64_t code_bytes = rows_ * shape_.code_cols * SizeOf(shape_.code_dtype);
  view.codes = TensorView::Contiguous(codes_.as<char>() + expert * code_bytes, shape_.code_dtype,
                                      {rows_, shape_.code_cols});
  if (shape_.scale_numel > 0) {
    const int64_t scale_bytes = shape_.scale_numel * SizeOf(shape_.scale_dtype);
    view.scales = TensorView::Contiguous(scales_.as<char>() + expert * scale_bytes,
                                         shape_.scale_dtype, {shape_.scale_numel});
  }
  if (HasGlobalScale(format_)) {
    view.global_scale = global_scales_.as<float>()[expert];
  }
  return view;
}

void OwnedMatrices::Set(int64_t expert, const TensorView& source) {
  QuantizedView destination = Expert(expert);
  // The scale follows from the data, not from what an earlier call stored.
  destination.global_scale = 0.0F;
  const float scale = Quantize(source, destination);
  if (HasGlobalScale(format_)) {
    global_scales_.as<float>()[expert] = scale;
  }
}

void OwnedMatrices::AllocateBias() {
  bias_ = Buffer(experts_ * rows_ * SizeOf(DType::kBf16));
}

TensorView OwnedMatrices::codes() const {
  return TensorView::Contiguous(codes_.data(), shape_.code_dtype,
                                {experts_, rows_, shape_.code_cols});
}

TensorView OwnedMatrices::scales() const {
  if (shape_.scale_numel == 0) {
    return {};
  }
  if (format_ == Format::kFp8PerRow) {
    return TensorView::Contiguous(scales_.data(), shape_.scale_dtype, {experts_, rows_});
  }
  return TensorView::Contiguous(scales_.data(), shape_.scale_dtype,
                                {experts_, shape_.scale_rows, shape_.scale_cols});
}

TensorView OwnedMatrices::global_scales() const {
  return HasGlobalScale(format_)
             ? TensorView::Contiguous(global_scales_.data(), DType::kFloat32, {experts_})
             : TensorView{};
}

TensorView OwnedMatrices::bias() const {
  return bias_.data() != nullptr
             ? TensorView::Contiguous(bias_.data(), DType::kBf16, {experts_, rows_})
             : TensorView{};
}

MatrixSet OwnedMatrices::View() const {
  MatrixSet set;
  set.values = codes();
  set.scales = scales();
  set.global_scales = global_scales();
  set.bias = bias();
  return set;
}

OwnedMatrices OwnedMatrices::Copy() const {
  OwnedMatrices copy;
  copy.format_ = format_;
  copy.shape_ = shape_;
  copy.experts_ = experts_;
  copy.rows_ = rows_;
  copy.cols_ = cols_;
  const auto copy_buffer = [](const Buffer& from, Buffer* to) {
    if (from.data() != nullptr) {
      *to = from.Copy();
    }
  };
  copy_buffer(codes_, &copy.codes_);
  copy_buffer(scales_, &copy.scales_);
  copy_buffer(global_scales_, &copy.global_scales_);
  copy_buffer(bias_, &copy.bias_);
  return copy;
}

int64_t OwnedLayer::bytes() const {
  return routed.gemm1.bytes() + routed.gemm2.bytes() + shared.gemm1.bytes() + shared.gemm2.bytes();
}

std::shared_ptr<OwnedLayer> OwnedLayer::Copy() const {
  auto copy = std::make_shared<OwnedLayer>();
  copy->routed = {routed.gemm1.Copy(), routed.gemm2.Copy(), routed.row_order};
  copy->shared = {shared.gemm1.Copy(), shared.gemm2.Copy(), shared.row_order};
  return copy;
}

int64_t LayerBytes(const MoeSpec& spec) {
  const auto group = [&](WeightFormat weights, int64_t experts) {
    const Format format = FormatOf(weights);
    return OwnedMatrices::Bytes(format, experts, spec.gemm1_rows(), spec.hidden_size) +
           OwnedMatrices::Bytes(format, experts, spec.hidden_size, spec.intermediate_size);
  };
  return group(spec.weights, spec.num_local_experts()) +
         group(spec.shared.weights, spec.shared.count);
}

WeightsDesc Describe(std::shared_ptr<const OwnedLayer> layer) {
  WeightsDesc desc;
  desc.routed.gemm1 = layer->routed.gemm1.View();
  desc.routed.gemm2 = layer->routed.gemm2.View();
  desc.routed.row_order = layer->routed.row_order;
  if (layer->shared.gemm1.experts() > 0) {
    desc.shared.gemm1 = layer->shared.gemm1.View();
    desc.shared.gemm2 = layer->shared.gemm2.View();
    desc.shared.row_order = layer->shared.row_order;
  }
  desc.owner = std::move(layer);
  return desc;
}

std::shared_ptr<OwnedLayer> BuildLayer(const MoeSpec& spec, const std::string& label,
                                       const MatrixSource& source, const MatrixObserver& observer) {
  auto layer = std::make_shared<OwnedLayer>();
  AllocateGroup(spec, false, &layer->routed);
  Progress progress(label, spec.num_local_experts() + spec.shared.count);
  BuildGroup({layer->routed, false}, source, observer, progress);
  if (spec.shared.count > 0) {
    AllocateGroup(spec, true, &layer->shared);
    BuildGroup({layer->shared, true}, source, observer, progress);
  }
  return layer;
}

std::shared_ptr<OwnedLayer> RandomLayer(const MoeSpec& spec, RowOrder row_order, bool biases,
                                        uint64_t seed) {
  const auto stddev = [](int64_t fan_in) { return 1.0 / std::sqrt(static_cast<double>(fan_in)); };
  const GaussianSource gemm1(stddev(spec.hidden_size));
  const GaussianSource gemm2(stddev(spec.intermediate_size));
  const auto stream = [&](const MatrixId& id) {
    const int64_t index = id.expert + (id.shared ? spec.num_local_experts() : 0);
    return static_cast<uint64_t>(index * 2 + (id.gemm2 ? 1 : 0));
  };
  const MatrixSource source = [&](const MatrixId& id, uint16_t* scratch) {
    const int64_t rows = id.gemm2 ? spec.hidden_size : spec.gemm1_rows();
    const int64_t cols = id.gemm2 ? spec.intermediate_size : spec.hidden_size;
    (id.gemm2 ? gemm2 : gemm1)
        .Fill(scratch, rows * cols, StreamSeed(seed, kWeightPurpose, stream(id)));
    return TensorView::Contiguous(scratch, DType::kBf16, {rows, cols});
  };
  auto layer = BuildLayer(spec, "making weights", source, {});
  layer->routed.row_order = row_order;
  layer->shared.row_order = row_order;
  if (biases) {
    const GaussianSource values(kBiasStddev);
    uint64_t item = 0;
    for (OwnedMatrices* matrices : {&layer->routed.gemm1, &layer->routed.gemm2}) {
      matrices->AllocateBias();
      values.Fill(matrices->bias().as<uint16_t>(), matrices->bias().numel(),
                  StreamSeed(seed, kBiasPurpose, item++));
    }
  }
  return layer;
}

}  // namespace hopyard::cli
