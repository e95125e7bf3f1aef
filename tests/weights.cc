// SPDX-License-Identifier: Apache-2.0
#include "tests/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/shape.h"
#include "formats/codes.h"

namespace hopyard::test {
namespace {

enum Stream : uint64_t { kGateStream, kUpStream, kDownStream, kGateBias, kUpBias, kDownBias };

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

// spec 5.2, by its table: where row i of a block goes.
int64_t MapRow(RowMap map, int64_t row) {
  static constexpr int kMap16[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  static constexpr int kMap32[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                     4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
  switch (map) {
    case RowMap::kNatural:
      return row;
    case RowMap::kShuffled128:
      return row / 32 * 32 + kMap32[row % 32];
    case RowMap::kShuffled64:
      return row / 16 * 16 + kMap16[row % 16];
  }
  return row;
}

int64_t SwizzleOffset(int64_t m, int64_t k, int64_t cols) {
  return (m / 128) * CeilDiv(cols, 4) * 512 + (k / 4) * 512 + (m % 32) * 16 + ((m % 128) / 32) * 4 +
         (k % 4);
}

// Rows of gate and up in fused order: entry i is (is gate, row).
std::vector<std::pair<bool, int64_t>> FusedOrder(RowOrder order, int64_t intermediate) {
  std::vector<std::pair<bool, int64_t>> rows;
  for (int64_t i = 0; i < 2 * intermediate; ++i) {
    switch (order) {
      case RowOrder::kUpGate:
        rows.emplace_back(i >= intermediate, i % intermediate);
        break;
      case RowOrder::kGateUp:
        rows.emplace_back(i < intermediate, i % intermediate);
        break;
      case RowOrder::kInterleavedGateUp:
        rows.emplace_back(i % 2 == 0, i / 2);
        break;
      case RowOrder::kInterleavedUpGate:
        rows.emplace_back(i % 2 == 1, i / 2);
        break;
    }
  }
  return rows;
}

// Gathers rows of gate and up; for formats whose scales never span rows.
CanonicalMatrix Fuse(const CanonicalMatrix& gate, const CanonicalMatrix& up,
                     const std::vector<std::pair<bool, int64_t>>& order) {
  CanonicalMatrix fused = gate;
  fused.rows = static_cast<int64_t>(order.size());
  fused.codes.clear();
  fused.scales.clear();
  const int64_t scale_row_bytes = gate.scale_cols * gate.scale_bytes;
  for (const auto& [is_gate, row] : order) {
    const CanonicalMatrix& part = is_gate ? gate : up;
    const auto codes = part.codes.begin() + row * part.row_bytes;
    fused.codes.insert(fused.codes.end(), codes, codes + part.row_bytes);
    const auto scales = part.scales.begin() + row * scale_row_bytes;
    fused.scales.insert(fused.scales.end(), scales, scales + scale_row_bytes);
  }
  fused.scale_rows = gate.scale_rows > 0 ? fused.rows : 0;
  return fused;
}

}  // namespace

std::vector<WeightLayout> KMajorLayouts(int64_t padding) {
  std::vector<WeightLayout> layouts;
  for (const RowOrder order : {RowOrder::kUpGate, RowOrder::kGateUp, RowOrder::kInterleavedGateUp,
                               RowOrder::kInterleavedUpGate}) {
    WeightLayout layout;
    layout.order = order;
    layouts.push_back(layout);
    layout.map = RowMap::kShuffled128;
    layout.scales = ScaleLayout::kSwizzled128x4;
    layout.bias_dtype = DType::kBf16;
    layouts.push_back(layout);
    layout.map = RowMap::kShuffled64;
    layout.scales = ScaleLayout::kLinear;
    layout.major = MajorOrder::kBlockKMajor;
    layouts.push_back(layout);
  }
  WeightLayout layout;
  layout.separate = true;
  layout.per_expert = true;
  layouts.push_back(layout);
  layout.map = RowMap::kShuffled128;
  layout.scales = ScaleLayout::kSwizzled128x4;
  layouts.push_back(layout);
  layout = {};
  layout.padding = padding;
  layouts.push_back(layout);
  layout.separate = true;
  layouts.push_back(layout);
  return layouts;
}

std::string ToString(const WeightLayout& layout) {
  static constexpr const char* kOrders[] = {"UpGate", "GateUp", "InterleavedGateUp",
                                            "InterleavedUpGate"};
  static constexpr const char* kMaps[] = {"", "_Shuffled128", "_Shuffled64"};
  static constexpr const char* kMajors[] = {"", "_MnMajor", "_BlockK"};
  std::string text = layout.separate ? "Apart" : kOrders[static_cast<int>(layout.order)];
  text += kMaps[static_cast<int>(layout.map)];
  text += kMajors[static_cast<int>(layout.major)];
  text += layout.scales == ScaleLayout::kSwizzled128x4 ? "_Swizzled" : "";
  text += layout.per_expert ? "_PerExpert" : "";
  text += layout.padding > 0 ? "_Padded" : "";
  return text;
}

float StaticHiddenScale(ActivationFormat format) {
  return format == ActivationFormat::kNvFp4 ? 3.6F / (448.0F * 6.0F) : 3.6F / 448.0F;
}

// SwiGLU of two numbers below 4 stays below 16.
float StaticIntermediateScale(ActivationFormat format) {
  return format == ActivationFormat::kNvFp4 ? 16.0F / (448.0F * 6.0F) : 16.0F / 448.0F;
}

namespace {

struct ValueRule {
  uint64_t seed = 0;
  int64_t expert = 0;
  bool integers = false;
  float deviation = 1.0F;
};

std::vector<float> RandomMatrix(const ValueRule& rule, Stream stream, int64_t rows, int64_t cols) {
  std::vector<float> values(Index(rows * cols));
  const uint64_t key = Hash(rule.seed, static_cast<uint64_t>(rule.expert), stream);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const uint64_t hash = Sequence(key, i);
    values[Index(i)] = rule.integers ? static_cast<float>(static_cast<int>(hash % 5) - 2)
                                     : Normal(hash) * rule.deviation;
  }
  return values;
}

// Biases are bf16 numbers, so that both bias dtypes hold the same values.
std::vector<float> RandomBias(const ValueRule& rule, Stream stream, int64_t rows) {
  std::vector<float> values =
      RandomMatrix({rule.seed, rule.expert, rule.integers, 0.5F}, stream, rows, 1);
  for (float& value : values) {
    value = formats::RoundToBf16(value);
  }
  return values;
}

std::vector<float> GatherRows(const std::vector<float>& gate, const std::vector<float>& up,
                              const std::vector<std::pair<bool, int64_t>>& order, int64_t cols) {
  std::vector<float> fused;
  fused.reserve(Index(static_cast<int64_t>(order.size()) * cols));
  for (const auto& [is_gate, row] : order) {
    const auto begin = (is_gate ? gate : up).begin() + row * cols;
    fused.insert(fused.end(), begin, begin + cols);
  }
  return fused;
}

std::vector<float> Slice(const std::vector<float>& values, int64_t begin, int64_t count) {
  return {values.begin() + begin, values.begin() + begin + count};
}

}  // namespace

CanonicalExpert LayerWeights::MakeExpert(int64_t logical, WeightFormat format) const {
  const MoeSpec& spec = source_.spec;
  const int64_t hidden = spec.hidden_size;
  const int64_t part = spec.intermediate_size;
  const int64_t whole = source_.shard_of > 0 ? source_.shard_of : part;
  const ValueRule rule{source_.seed, logical, source_.integers,
                       source_.gain / std::sqrt(static_cast<float>(hidden))};
  ValueRule down_rule = rule;
  down_rule.deviation = 2.0F * source_.gain / std::sqrt(static_cast<float>(whole));
  const std::vector<float> up = RandomMatrix(rule, kUpStream, whole, hidden);
  const std::vector<float> down = RandomMatrix(down_rule, kDownStream, hidden, whole);
  CanonicalExpert expert;
  const Window rows{source_.shard_begin, part, 0, hidden};
  expert.gemm2 =
      Crop(QuantizeMatrix(format, down, hidden, whole), {0, hidden, source_.shard_begin, part});
  expert.up_bias = Slice(RandomBias(rule, kUpBias, whole), source_.shard_begin, part);
  expert.gemm2_bias = source_.gemm2_bias ? RandomBias(rule, kDownBias, hidden)
                                         : std::vector<float>(Index(hidden), 0.0F);
  if (!IsGated(spec.activation.kind)) {
    expert.up = Crop(QuantizeMatrix(format, up, whole, hidden), rows);
    expert.gemm1 = expert.up;
    expert.gemm1_bias = expert.up_bias;
    return expert;
  }
  const std::vector<float> gate = RandomMatrix(rule, kGateStream, whole, hidden);
  const float global = GlobalFor(format, std::max(MaxMagnitude(up), MaxMagnitude(gate)));
  expert.gate = Crop(QuantizeMatrix(format, gate, whole, hidden, global), rows);
  expert.up = Crop(QuantizeMatrix(format, up, whole, hidden, global), rows);
  expert.gate_bias = Slice(RandomBias(rule, kGateBias, whole), source_.shard_begin, part);
  const auto order = FusedOrder(source_.layout.order, part);
  expert.gemm1_bias = GatherRows(expert.gate_bias, expert.up_bias, order, 1);
  if (format == WeightFormat::kFp8Block128) {
    const auto first = source_.shard_begin * hidden;
    expert.gemm1 = QuantizeMatrix(format,
                                  GatherRows(Slice(gate, first, part * hidden),
                                             Slice(up, first, part * hidden), order, hidden),
                                  2 * part, hidden);
  } else {
    expert.gemm1 = Fuse(expert.gate, expert.up, order);
  }
  return expert;
}

LayerWeights::LayerWeights(const WeightSource& source) : source_(source) {
  const MoeSpec& spec = source_.spec;
  const int64_t local = spec.num_local_experts();
  for (int64_t e = 0; e < local; ++e) {
    const int64_t logical =
        source_.experts.empty()
            ? e + (spec.local.kind == ExpertMap::Kind::kRange ? spec.local.offset : 0)
            : source_.experts[Index(e)];
    experts_.push_back(MakeExpert(logical, spec.weights));
  }
  for (int64_t j = 0; j < spec.shared.count; ++j) {
    experts_.push_back(MakeExpert(source_.shared_offset + j, spec.shared.weights));
  }
  FillGroup(0, local, &desc_.routed);
  if (spec.shared.count > 0) {
    FillGroup(local, spec.shared.count, &desc_.shared);
  }
}

void LayerWeights::FillGroup(int64_t first, int64_t count, ExpertMatrices* group) {
  const bool gated = IsGated(source_.spec.activation.kind);
  const bool apart = gated && source_.layout.separate;
  std::vector<const CanonicalMatrix*> gemm1;
  std::vector<const CanonicalMatrix*> gate;
  std::vector<const CanonicalMatrix*> up;
  std::vector<const CanonicalMatrix*> gemm2;
  std::vector<std::vector<float>> gemm1_bias;
  std::vector<std::vector<float>> gate_bias;
  std::vector<std::vector<float>> up_bias;
  std::vector<std::vector<float>> gemm2_bias;
  for (int64_t e = first; e < first + count; ++e) {
    const CanonicalExpert& expert = experts_[Index(e)];
    gemm1.push_back(&expert.gemm1);
    gate.push_back(&expert.gate);
    up.push_back(&expert.up);
    gemm2.push_back(&expert.gemm2);
    gemm1_bias.push_back(expert.gemm1_bias);
    gate_bias.push_back(expert.gate_bias);
    up_bias.push_back(expert.up_bias);
    gemm2_bias.push_back(expert.gemm2_bias);
  }
  group->row_order = source_.layout.order;
  if (apart) {
    group->gate = Store(gate, gate_bias);
    group->up = Store(up, up_bias);
  } else {
    group->gemm1 = Store(gemm1, gemm1_bias);
  }
  group->gemm2 = Store(gemm2, gemm2_bias);
  const ActivationFormat format = source_.spec.activations;
  if (format == ActivationFormat::kFp8PerTensor || format == ActivationFormat::kNvFp4) {
    group->gemm1_input_scale = arena_.Array(DType::kFloat32, {1});
    group->gemm1_input_scale.as<float>()[0] = StaticHiddenScale(format);
    // The second expert's intermediate has a scale of its own.
    group->gemm2_input_scale = arena_.Array(DType::kFloat32, {count});
    for (int64_t e = 0; e < count; ++e) {
      group->gemm2_input_scale.as<float>()[e] =
          StaticIntermediateScale(format) * (e % 2 == 1 ? 1.25F : 1.0F);
    }
  }
  if (source_.parameter_tensors) {
    AddParameters(group == &desc_.routed, count, group);
  }
}

void LayerWeights::AddParameters(bool routed, int64_t count, ExpertMatrices* group) {
  const Activation& activation = source_.spec.activation;
  const auto tensor = [&](const PerExpert& parameter) {
    const TensorView view = arena_.Array(DType::kFloat32, {count});
    for (int64_t e = 0; e < count; ++e) {
      view.as<float>()[e] = routed ? parameter.at(e) : parameter.all;
    }
    return view;
  };
  group->alpha = tensor(activation.alpha);
  group->beta = tensor(activation.beta);
  group->limit = tensor(activation.limit);
}

namespace {

// Writes one matrix's codes into an expert's memory.
void PlaceCodes(const CanonicalMatrix& matrix, const WeightLayout& layout, int64_t row_stride,
                uint8_t* out) {
  const int64_t unit = SizeOf(CodeType(matrix.format));
  const int64_t units = matrix.row_bytes / unit;
  const int64_t block = 128 / unit;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const int64_t stored = MapRow(layout.map, row);
    for (int64_t k = 0; k < units; ++k) {
      int64_t offset = stored * row_stride + k * unit;
      if (layout.major == MajorOrder::kMnMajor) {
        offset = (k * matrix.rows + stored) * unit;
      } else if (layout.major == MajorOrder::kBlockKMajor) {
        offset = (((k / block) * matrix.rows + stored) * block + k % block) * unit;
      }
      std::memcpy(out + offset, matrix.codes.data() + row * matrix.row_bytes + k * unit,
                  Index(unit));
    }
  }
}

void PlaceScales(const CanonicalMatrix& matrix, const WeightLayout& layout, uint8_t* out) {
  const bool blocked_rows = matrix.format == WeightFormat::kFp8Block128;
  for (int64_t row = 0; row < matrix.scale_rows; ++row) {
    const int64_t stored = blocked_rows ? row : MapRow(layout.map, row);
    for (int64_t c = 0; c < matrix.scale_cols; ++c) {
      const int64_t offset = layout.scales == ScaleLayout::kSwizzled128x4
                                 ? SwizzleOffset(stored, c, matrix.scale_cols)
                                 : stored * matrix.scale_cols + c;
      std::memcpy(out + offset * matrix.scale_bytes,
                  matrix.scales.data() + (row * matrix.scale_cols + c) * matrix.scale_bytes,
                  Index(matrix.scale_bytes));
    }
  }
}

// View of `count` experts whose memory starts `stride` elements apart; count 0: one expert alone.
TensorView ViewOf(void* data, DType dtype, const std::vector<int64_t>& shape,
                  const std::vector<int64_t>& strides) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  for (size_t d = 0; d < shape.size(); ++d) {
    view.shape.at(d) = shape[d];
    view.strides.at(d) = strides[d];
  }
  return view;
}

// Shape and strides (in elements) of one expert's array, and its size in bytes.
struct ArrayPlan {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  int64_t bytes = 0;
};

// Bytes from a row's begin to the next one's where rows lie K-major.
int64_t RowStride(const CanonicalMatrix& matrix, const WeightLayout& layout) {
  const int64_t unit = SizeOf(CodeType(matrix.format));
  return RoundUp(matrix.row_bytes + layout.padding / unit * unit, layout.row_alignment);
}

ArrayPlan PlanCodes(const CanonicalMatrix& matrix, const WeightLayout& layout) {
  ArrayPlan plan;
  plan.dtype = CodeType(matrix.format);
  const int64_t unit = SizeOf(plan.dtype);
  const int64_t units = matrix.row_bytes / unit;
  const int64_t block = 128 / unit;
  plan.bytes = matrix.row_bytes * matrix.rows;
  switch (layout.major) {
    case MajorOrder::kKMajor:
      plan.shape = {matrix.rows, units};
      plan.strides = {RowStride(matrix, layout) / unit, 1};
      plan.bytes = RowStride(matrix, layout) * matrix.rows;
      break;
    case MajorOrder::kMnMajor:
      plan.shape = {units, matrix.rows};
      plan.strides = {matrix.rows, 1};
      break;
    case MajorOrder::kBlockKMajor:
      plan.shape = {units / block, matrix.rows, block};
      plan.strides = {matrix.rows * block, block, 1};
      break;
  }
  return plan;
}

ArrayPlan PlanScales(const CanonicalMatrix& matrix, const WeightLayout& layout) {
  ArrayPlan plan;
  plan.dtype = ScaleType(matrix.format);
  plan.shape = {matrix.scale_rows, matrix.scale_cols};
  if (layout.scales == ScaleLayout::kSwizzled128x4) {
    plan.shape = {RoundUp(matrix.scale_rows, 128), RoundUp(matrix.scale_cols, 4)};
  }
  plan.strides = {plan.shape[1], 1};
  plan.bytes = plan.shape[0] * plan.shape[1] * matrix.scale_bytes;
  if (matrix.format == WeightFormat::kFp8PerChannel) {
    plan.shape = {matrix.scale_rows};
    plan.strides = {1};
  }
  return plan;
}

// Memory of all experts: one allocation with poison between experts, or one allocation each.
struct Stored {
  TensorView all;
  std::vector<TensorView> each;
  std::vector<uint8_t*> memory;
};

Stored Allocate(Arena* arena, const ArrayPlan& plan, int64_t experts, const WeightLayout& layout) {
  Stored stored;
  if (layout.per_expert) {
    for (int64_t e = 0; e < experts; ++e) {
      uint8_t* data = arena->Bytes(plan.bytes).data();
      stored.memory.push_back(data);
      stored.each.push_back(ViewOf(data, plan.dtype, plan.shape, plan.strides));
    }
    return stored;
  }
  const int64_t stride = plan.bytes + RoundUp(layout.padding, 8);
  uint8_t* data = arena->Bytes(stride * experts).data();
  for (int64_t e = 0; e < experts; ++e) {
    stored.memory.push_back(data + e * stride);
  }
  std::vector<int64_t> shape = plan.shape;
  std::vector<int64_t> strides = plan.strides;
  shape.insert(shape.begin(), experts);
  strides.insert(strides.begin(), stride / SizeOf(plan.dtype));
  stored.all = ViewOf(data, plan.dtype, shape, strides);
  return stored;
}

void PlaceBias(const std::vector<float>& bias, RowMap map, DType dtype, uint8_t* out) {
  for (int64_t row = 0; row < static_cast<int64_t>(bias.size()); ++row) {
    const int64_t stored = MapRow(map, row);
    if (dtype == DType::kBf16) {
      reinterpret_cast<uint16_t*>(out)[stored] = formats::EncodeBf16(bias[Index(row)]);
    } else {
      reinterpret_cast<float*>(out)[stored] = bias[Index(row)];
    }
  }
}

}  // namespace

MatrixSet LayerWeights::Store(const std::vector<const CanonicalMatrix*>& matrices,
                              const std::vector<std::vector<float>>& biases) {
  const CanonicalMatrix& first = *matrices.front();
  const auto experts = static_cast<int64_t>(matrices.size());
  WeightLayout layout = source_.layout;
  const int64_t scale_block = ScaleBlockCols(first.format);
  if (scale_block == 0 || first.format == WeightFormat::kFp8Block128) {
    layout.scales = ScaleLayout::kLinear;
  }
  MatrixSet set;
  set.major = layout.major;
  set.scale_layout = layout.scales;
  set.row_map = layout.map;
  set.row_origin = first.row_origin;
  set.col_origin = first.col_origin;
  const Stored values = Allocate(&arena_, PlanCodes(first, layout), experts, layout);
  set.values = values.all;
  set.values_per_expert = values.each;
  for (int64_t e = 0; e < experts; ++e) {
    PlaceCodes(*matrices[Index(e)], layout, RowStride(first, layout), values.memory[Index(e)]);
  }
  if (first.scale_rows > 0) {
    const Stored scales = Allocate(&arena_, PlanScales(first, layout), experts, layout);
    set.scales = scales.all;
    set.scales_per_expert = scales.each;
    for (int64_t e = 0; e < experts; ++e) {
      PlaceScales(*matrices[Index(e)], layout, scales.memory[Index(e)]);
    }
  }
  if (HasGlobalScale(first.format)) {
    set.global_scales = arena_.Array(DType::kFloat32, {experts});
    for (int64_t e = 0; e < experts; ++e) {
      set.global_scales.as<float>()[e] = matrices[Index(e)]->global;
    }
  }
  if (source_.bias) {
    const auto rows = static_cast<int64_t>(biases.front().size());
    const ArrayPlan plan{layout.bias_dtype, {rows}, {1}, rows * SizeOf(layout.bias_dtype)};
    WeightLayout dense = layout;
    dense.padding = 0;  // biases are contiguous
    const Stored bias = Allocate(&arena_, plan, experts, dense);
    set.bias = bias.all;
    set.bias_per_expert = bias.each;
    for (int64_t e = 0; e < experts; ++e) {
      PlaceBias(biases[Index(e)], layout.map, layout.bias_dtype, bias.memory[Index(e)]);
    }
  }
  return set;
}

}  // namespace hopyard::test
