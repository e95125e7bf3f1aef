// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/layer_reader.h"

#include <algorithm>
#include <array>
#include <deque>
#include <initializer_list>
#include <utility>

#include <fmt/format.h>

#include "checkpoint/text.h"
#include "core/error.h"
#include "core/shape.h"
#include "formats/codes.h"

namespace hopyard::checkpoint {
namespace {

constexpr int64_t kBlock = 128;   // FP8 block scales
constexpr int64_t kMxBlock = 32;  // MXFP4

// Keeps a layer's views valid: the mapped files and converted scales.
struct LayerMemory {
  std::shared_ptr<const TensorStore> store;
  std::deque<std::vector<float>> buffers;
};

// Names of an expert's three linear layers as published.
struct ExpertNames {
  std::string_view gate;
  std::string_view up;
  std::string_view down;
};
constexpr std::array<ExpertNames, 2> kExpertNames = {
    {{"gate_proj", "up_proj", "down_proj"}, {"w1", "w3", "w2"}}};
constexpr std::array<std::string_view, 4> kPrefixes = {
    "model.layers.", "language_model.model.layers.", "model.language_model.layers.", "layers."};

// A matrix and its scales, absent for BF16.
struct Matrix {
  TensorView values;
  TensorView scales;
};

TensorView Reshaped(const TensorView& view, DType dtype, std::initializer_list<int64_t> shape) {
  return TensorView::Contiguous(view.data, dtype, shape, view.device);
}

// Sub-matrix of a 2-D view.
TensorView Slice(const TensorView& view, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  TensorView slice = view;
  auto* first = static_cast<uint8_t*>(view.data);
  slice.data = first + (row * view.strides[0] + col * view.strides[1]) * SizeOf(view.dtype);
  slice.shape = {rows, cols};
  return slice;
}

class LayerReader {
 public:
  LayerReader(const Family& family, std::shared_ptr<const TensorStore> store, int index);
  CheckpointLayer Read();

 private:
  using Dtypes = std::vector<DType>;

  void FindModule(int index);
  TensorView Get(const std::string& name, const Dtypes& dtypes, const std::vector<int64_t>& shape);
  WeightFormat FormatOf(const std::string& name) const;
  TensorView BlockScales(const std::string& name, const std::vector<int64_t>& shape);
  Matrix Linear(const std::string& name, std::vector<int64_t> shape, WeightFormat format);
  void ReadRouter(CheckpointLayer* layer);
  void ReadExperts(CheckpointLayer* layer);
  void ReadFused(CheckpointLayer* layer);
  void ReadMxFp4(CheckpointLayer* layer);
  void ReadPerExpert(const ExpertNames& names, CheckpointLayer* layer);
  void ReadShared(CheckpointLayer* layer);
  void SplitShared(const Matrix& whole, bool columns, int64_t count, MatrixSet* set);
  TensorView Packed(const TensorView& scales);

  const Family& family_;
  const TensorStore& store_;
  std::shared_ptr<LayerMemory> memory_;
  std::string module_;  // "model.layers.3.mlp"
  int64_t experts_;
  int64_t hidden_;
  int64_t width_;
};

LayerReader::LayerReader(const Family& family, std::shared_ptr<const TensorStore> store, int index)
    : family_(family),
      store_(*store),
      memory_(std::make_shared<LayerMemory>()),
      experts_(family.spec.num_experts),
      hidden_(family.spec.hidden_size),
      width_(family.spec.intermediate_size) {
  memory_->store = std::move(store);
  FindModule(index);
}

void LayerReader::FindModule(int index) {
  for (const std::string_view prefix : kPrefixes) {
    for (const std::string& module : family_.names.modules) {
      const std::string name = fmt::format("{}{}.{}", prefix, index, module);
      if (store_.Has(fmt::format("{}.{}.weight", name, family_.names.router))) {
        module_ = name;
        return;
      }
    }
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << Printable(store_.directory()) << ": layer " << index << " has no router: no tensor '"
      << fmt::format("{}{}.{}.{}.weight", kPrefixes.front(), index, family_.names.modules.front(),
                     family_.names.router)
      << "', nor under another known name; is it a " << family_.model_type << " checkpoint?";
}

// A tensor of one of these dtypes and of this shape.
TensorView LayerReader::Get(const std::string& name, const Dtypes& dtypes,
                            const std::vector<int64_t>& shape) {
  const TensorView view = store_.View(name);
  const std::string where =
      fmt::format("{}: tensor '{}'", Printable(store_.PathOf(name)), Printable(name));
  if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) {
    std::string wanted;
    for (const DType dtype : dtypes) {
      wanted += (wanted.empty() ? "" : " or ") + std::string(ToString(dtype));
    }
    HOPYARD_CHECK(false, kInvalidArgument)
        << where << " has dtype " << ToString(view.dtype) << "; " << wanted << " is wanted";
  }
  HOPYARD_CHECK(ShapeOf(view) == shape, kInvalidArgument)
      << where << " has shape " << ShapeText(ShapeOf(view)) << "; " << ShapeText(shape)
      << " is wanted (config.json: " << experts_ << " experts, hidden size " << hidden_
      << ", intermediate size " << width_ << ")";
  return view;
}

// The format of a weight by its stored dtype; FP8 must have been announced by config.json.
WeightFormat LayerReader::FormatOf(const std::string& name) const {
  const DType dtype = store_.View(name).dtype;
  if (dtype == DType::kBf16) {
    return WeightFormat::kBf16;
  }
  const std::string where =
      fmt::format("{}: tensor '{}'", Printable(store_.PathOf(name)), Printable(name));
  HOPYARD_CHECK(dtype == DType::kE4m3, kUnsupported)
      << where << " has dtype " << ToString(dtype)
      << "; weights in bf16 and e4m3 (128 x 128 blocks) are supported; save the model in bf16";
  HOPYARD_CHECK(family_.fp8_block, kInvalidArgument)
      << where << " is e4m3, but config.json has no quantization_config with quant_method 'fp8'";
  return WeightFormat::kFp8Block128;
}

// Scales are published in f32, bf16 or as powers of two; the layer reads f32.
TensorView LayerReader::BlockScales(const std::string& name, const std::vector<int64_t>& shape) {
  TensorView view = Get(name, {DType::kFloat32, DType::kBf16, DType::kE8m0}, shape);
  if (view.dtype == DType::kFloat32) {
    return view;
  }
  std::vector<float>& buffer = memory_->buffers.emplace_back();
  buffer.resize(static_cast<size_t>(view.numel()));
  for (size_t i = 0; i < buffer.size(); ++i) {
    buffer[i] = view.dtype == DType::kBf16 ? formats::DecodeBf16(view.as<const uint16_t>()[i])
                                           : formats::DecodeE8m0(view.as<const uint8_t>()[i]);
  }
  view.data = buffer.data();
  view.dtype = DType::kFloat32;
  return view;
}

// A matrix [.., rows, cols] of this format with its scales.
Matrix LayerReader::Linear(const std::string& name, std::vector<int64_t> shape,
                           WeightFormat format) {
  if (format == WeightFormat::kBf16) {
    return {Get(name, {DType::kBf16}, shape), {}};
  }
  Matrix matrix;
  matrix.values = Get(name, {DType::kE4m3}, shape);
  const size_t rank = shape.size();
  shape[rank - 2] = CeilDiv(shape[rank - 2], kBlock);
  shape[rank - 1] = CeilDiv(shape[rank - 1], kBlock);
  matrix.scales = BlockScales(name + "_scale_inv", shape);
  return matrix;
}

void LayerReader::ReadRouter(CheckpointLayer* layer) {
  const std::string router = fmt::format("{}.{}", module_, family_.names.router);
  const Dtypes floats = {DType::kFloat32, DType::kBf16};
  layer->router_weight = Get(router + ".weight", floats, {experts_, hidden_});
  if (family_.router_bias) {
    layer->router_bias = Get(router + ".bias", floats, {experts_});
  }
  if (family_.selection_bias) {
    layer->routing_bias = Get(router + ".e_score_correction_bias", floats, {experts_});
  }
}

void AppendMatrix(const Matrix& matrix, MatrixSet* set) {
  set->values_per_expert.push_back(matrix.values);
  if (matrix.scales.defined()) {
    set->scales_per_expert.push_back(matrix.scales);
  }
}

void LayerReader::ReadPerExpert(const ExpertNames& names, CheckpointLayer* layer) {
  const auto name = [&](int64_t expert, std::string_view part) {
    return fmt::format("{}.experts.{}.{}.weight", module_, expert, part);
  };
  const std::string extra = name(experts_, names.gate);
  HOPYARD_CHECK(!store_.Has(extra), kInvalidArgument)
      << Printable(store_.PathOf(extra)) << ": has tensor '" << extra
      << "', but config.json says that there are " << experts_ << " experts";
  const WeightFormat format = FormatOf(name(0, names.gate));
  layer->spec.weights = format;
  ExpertMatrices& routed = layer->weights.routed;
  for (int64_t e = 0; e < experts_; ++e) {
    AppendMatrix(Linear(name(e, names.gate), {width_, hidden_}, format), &routed.gate);
    AppendMatrix(Linear(name(e, names.up), {width_, hidden_}, format), &routed.up);
    AppendMatrix(Linear(name(e, names.down), {hidden_, width_}, format), &routed.gemm2);
  }
}

void SetMatrix(const Matrix& matrix, MatrixSet* set) {
  set->values = matrix.values;
  set->scales = matrix.scales;
}

void LayerReader::ReadFused(CheckpointLayer* layer) {
  const std::string gate_up = module_ + ".experts.gate_up_proj";
  const std::string down = module_ + ".experts.down_proj";
  ExpertMatrices& routed = layer->weights.routed;
  if (family_.experts_are_mn_major) {
    const WeightFormat format = FormatOf(gate_up);
    HOPYARD_CHECK(format == WeightFormat::kBf16, kUnsupported)
        << Printable(store_.PathOf(gate_up)) << ": tensor '" << gate_up
        << "' has dtype e4m3; fused experts of " << family_.model_type << " are supported in bf16";
    routed.gemm1.values = Get(gate_up, {DType::kBf16}, {experts_, hidden_, 2 * width_});
    routed.gemm2.values = Get(down, {DType::kBf16}, {experts_, width_, hidden_});
    routed.gemm1.major = MajorOrder::kMnMajor;
    routed.gemm2.major = MajorOrder::kMnMajor;
    layer->spec.weights = format;
    return;
  }
  layer->spec.weights = FormatOf(gate_up);
  SetMatrix(Linear(gate_up, {experts_, 2 * width_, hidden_}, layer->spec.weights), &routed.gemm1);
  SetMatrix(Linear(down, {experts_, hidden_, width_}, layer->spec.weights), &routed.gemm2);
}

void LayerReader::ReadMxFp4(CheckpointLayer* layer) {
  HOPYARD_CHECK(family_.mxfp4, kInvalidArgument)
      << Printable(store_.directory()) << ": '" << module_
      << ".experts' is stored as MXFP4 blocks, but config.json has no quantization_config with "
         "quant_method 'mxfp4'";
  HOPYARD_CHECK(hidden_ % kMxBlock == 0 && width_ % kMxBlock == 0, kInvalidArgument)
      << Printable(store_.directory()) << ": config.json: hidden size " << hidden_
      << " and intermediate size " << width_ << "; MXFP4 blocks want multiples of " << kMxBlock;
  const auto read = [&](std::string_view part, int64_t rows, int64_t cols, MatrixSet* set) {
    const std::string name = fmt::format("{}.experts.{}", module_, part);
    const int64_t blocks = cols / kMxBlock;
    const TensorView codes =
        Get(name + "_blocks", {DType::kUint8}, {experts_, rows, blocks, kMxBlock / 2});
    const TensorView scales =
        Get(name + "_scales", {DType::kUint8, DType::kE8m0}, {experts_, rows, blocks});
    set->values = Reshaped(codes, DType::kUint8, {experts_, rows, cols / 2});
    set->scales = Reshaped(scales, DType::kE8m0, {experts_, rows, blocks});
  };
  read("gate_up_proj", 2 * width_, hidden_, &layer->weights.routed.gemm1);
  read("down_proj", hidden_, width_, &layer->weights.routed.gemm2);
  layer->spec.weights = WeightFormat::kMxFp4;
}

void LayerReader::ReadExperts(CheckpointLayer* layer) {
  const std::string fused = module_ + ".experts.gate_up_proj";
  const std::string blocks = fused + "_blocks";
  const auto* names =
      std::find_if(kExpertNames.begin(), kExpertNames.end(), [&](const ExpertNames& candidate) {
        return store_.Has(fmt::format("{}.experts.0.{}.weight", module_, candidate.gate));
      });
  const bool separate = names != kExpertNames.end();
  const int forms = static_cast<int>(separate) + static_cast<int>(store_.Has(fused)) +
                    static_cast<int>(store_.Has(blocks));
  HOPYARD_CHECK(forms > 0, kInvalidArgument)
      << Printable(store_.directory()) << ": has no experts of '" << module_ << "': neither '"
      << module_ << ".experts.0.gate_proj.weight' (or w1) nor '" << fused << "' nor '" << blocks
      << "'";
  HOPYARD_CHECK(forms == 1, kInvalidArgument)
      << Printable(store_.directory()) << ": has the experts of '" << module_
      << "' in more than one form (separate, fused, MXFP4 blocks)";
  layer->weights.routed.row_order = family_.row_order;
  if (separate) {
    HOPYARD_CHECK(!family_.expert_bias, kUnsupported)
        << Printable(store_.directory()) << ": '" << module_
        << "' has separate experts; fused ones are supported for " << family_.model_type;
    ReadPerExpert(*names, layer);
  } else if (store_.Has(blocks)) {
    ReadMxFp4(layer);
  } else {
    ReadFused(layer);
  }
  if (family_.expert_bias) {
    const Dtypes floats = {DType::kFloat32, DType::kBf16};
    ExpertMatrices& routed = layer->weights.routed;
    routed.gemm1.bias = Get(fused + "_bias", floats, {experts_, 2 * width_});
    routed.gemm2.bias = Get(module_ + ".experts.down_proj_bias", floats, {experts_, hidden_});
  }
}

// Scales with no gaps between their rows.
TensorView LayerReader::Packed(const TensorView& scales) {
  std::vector<float>& buffer = memory_->buffers.emplace_back();
  buffer.reserve(static_cast<size_t>(scales.numel()));
  for (int64_t row = 0; row < scales.shape[0]; ++row) {
    for (int64_t col = 0; col < scales.shape[1]; ++col) {
      buffer.push_back(scales.as<const float>()[row * scales.strides[0] + col * scales.strides[1]]);
    }
  }
  return Reshaped({buffer.data()}, DType::kFloat32, {scales.shape[0], scales.shape[1]});
}

// `whole` serves `count` shared experts at once: its rows (its columns for the down projection)
// are cut into one slice per expert. Values stay views of the file.
void LayerReader::SplitShared(const Matrix& whole, bool columns, int64_t count, MatrixSet* set) {
  const int64_t rows = whole.values.shape[0] / (columns ? 1 : count);
  const int64_t cols = whole.values.shape[1] / (columns ? count : 1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = columns ? 0 : i * rows;
    const int64_t col = columns ? i * cols : 0;
    Matrix part{Slice(whole.values, row, col, rows, cols), {}};
    if (whole.scales.defined()) {
      const TensorView scales = Slice(whole.scales, row / kBlock, col / kBlock,
                                      CeilDiv(rows, kBlock), CeilDiv(cols, kBlock));
      part.scales = scales.is_contiguous() ? scales : Packed(scales);
    }
    AppendMatrix(part, set);
  }
}

void LayerReader::ReadShared(CheckpointLayer* layer) {
  const int64_t count = layer->spec.shared.count;
  if (count == 0) {
    return;
  }
  const std::string shared = fmt::format("{}.{}.", module_, family_.names.shared);
  const WeightFormat format = FormatOf(shared + "gate_proj.weight");
  HOPYARD_CHECK(format == WeightFormat::kBf16 || count == 1 || width_ % kBlock == 0, kUnsupported)
      << Printable(store_.directory()) << ": '" << shared << "*' holds " << count
      << " FP8 experts of width " << width_ << "; a multiple of " << kBlock
      << " is wanted, so that no scale block spans two experts";
  layer->spec.shared.weights = format;
  ExpertMatrices& matrices = layer->weights.shared;
  const int64_t all = count * width_;
  SplitShared(Linear(shared + "gate_proj.weight", {all, hidden_}, format), false, count,
              &matrices.gate);
  SplitShared(Linear(shared + "up_proj.weight", {all, hidden_}, format), false, count,
              &matrices.up);
  SplitShared(Linear(shared + "down_proj.weight", {hidden_, all}, format), true, count,
              &matrices.gemm2);
}

CheckpointLayer LayerReader::Read() {
  CheckpointLayer layer;
  layer.name = module_;
  layer.spec = family_.spec;
  ReadRouter(&layer);
  ReadExperts(&layer);
  ReadShared(&layer);
  layer.spec.activations = layer.spec.weights == WeightFormat::kFp8Block128
                               ? ActivationFormat::kFp8Block128
                               : ActivationFormat::kBf16;
  layer.weights.read_only = true;
  layer.weights.owner = memory_;
  return layer;
}

}  // namespace

CheckpointLayer ReadLayer(const Family& family, const std::shared_ptr<const TensorStore>& store,
                          int index) {
  return LayerReader(family, store, index).Read();
}

}  // namespace hopyard::checkpoint
