// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "core/error.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "stages/layer_ref.h"
#include "stages/layer_ref_parts.h"

namespace hopyard::ref {
namespace {

constexpr int64_t kBlockKBytes = 128;

// A view of one expert's array: base pointer and the dimensions after the expert's.
struct ExpertArray {
  const uint8_t* base = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  const int64_t* strides = nullptr;

  [[nodiscard]] const uint8_t* At(int64_t offset) const { return base + offset * SizeOf(dtype); }
};

ExpertArray Select(const TensorView& stacked, const std::vector<TensorView>& per_expert,
                   int64_t expert) {
  if (!per_expert.empty()) {
    const TensorView& view = per_expert[static_cast<size_t>(expert)];
    return {view.as<const uint8_t>(), view.dtype, view.ndim, view.strides.data()};
  }
  const uint8_t* base =
      stacked.as<const uint8_t>() + expert * stacked.strides[0] * SizeOf(stacked.dtype);
  return {base, stacked.dtype, stacked.ndim - 1, stacked.strides.data() + 1};
}

// FlashInfer's shuffle: row `old` of a block of 32 (16) goes to row (old % 4) * 8 + old / 4
// ((old % 2) * 8 + old / 2).
int64_t StoredRow(RowMap map, int64_t row) {
  if (map == RowMap::kNatural) {
    return row;
  }
  const int64_t block = map == RowMap::kShuffled128 ? 32 : 16;
  const int64_t ways = block / 8;
  const int64_t old = row % block;
  return row - old + (old % ways) * 8 + old / ways;
}

bool IsPacked4(WeightFormat format) {
  return format == WeightFormat::kNvFp4 || format == WeightFormat::kMxFp4 ||
         format == WeightFormat::kMxInt4;
}

int64_t ScaleBlockCols(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFp8Block128:
      return 128;
    case WeightFormat::kMxFp8:
    case WeightFormat::kMxFp4:
    case WeightFormat::kMxInt4:
      return 32;
    case WeightFormat::kNvFp4:
      return 16;
    case WeightFormat::kBf16:
    case WeightFormat::kFp8PerTensor:
    case WeightFormat::kFp8PerChannel:
      return 0;
  }
  return 0;
}

const uint8_t* CodeAddress(const RowLocation& row, int64_t col) {
  const MatrixSet& set = *row.set;
  const ExpertArray array = Select(set.values, set.values_per_expert, row.expert);
  const int64_t unit = IsPacked4(row.format) ? col / 2 : col;
  switch (set.major) {
    case MajorOrder::kKMajor:
      return array.At(row.stored * array.strides[0] + unit * array.strides[1]);
    case MajorOrder::kMnMajor:
      return array.At(unit * array.strides[0] + row.stored * array.strides[1]);
    case MajorOrder::kBlockKMajor: {
      const int64_t block = kBlockKBytes / SizeOf(array.dtype);
      return array.At((unit / block) * array.strides[0] + row.stored * array.strides[1] +
                      (unit % block) * array.strides[2]);
    }
  }
  return nullptr;
}

double CodeValue(const RowLocation& row, int64_t col) {
  const uint8_t* address = CodeAddress(row, col);
  const auto nibble = static_cast<uint8_t>((*address >> ((col & 1) * 4)) & 0xF);
  switch (row.format) {
    case WeightFormat::kBf16:
      return formats::DecodeBf16(*reinterpret_cast<const uint16_t*>(address));
    case WeightFormat::kFp8Block128:
    case WeightFormat::kFp8PerTensor:
    case WeightFormat::kFp8PerChannel:
    case WeightFormat::kMxFp8:
      return formats::DecodeE4m3(*address);
    case WeightFormat::kNvFp4:
    case WeightFormat::kMxFp4:
      return formats::DecodeE2m1(nibble);
    case WeightFormat::kMxInt4:
      return formats::DecodeInt4(nibble);
  }
  return 0.0;
}

// Offset of scale (m, c) of an [M, cols] matrix in the 128x4 layout of spec 4.4.
int64_t Swizzle128x4(int64_t m, int64_t c, int64_t cols) {
  const int64_t tile = (m / 128) * CeilDiv(cols, 4) + c / 4;
  return tile * 512 + (m % 32) * 16 + ((m % 128) / 32) * 4 + c % 4;
}

// The block scale of (row, col), as the number it stands for; `cols` scale columns per row.
double BlockScale(const RowLocation& row, int64_t scale_row, int64_t scale_col, int64_t cols) {
  const MatrixSet& set = *row.set;
  const ExpertArray array = Select(set.scales, set.scales_per_expert, row.expert);
  int64_t offset = scale_row * cols + scale_col;
  if (set.scale_layout == ScaleLayout::kSwizzled128x4) {
    offset = Swizzle128x4(scale_row, scale_col, cols);
  } else if (array.ndim == 2) {
    offset = scale_row * array.strides[0] + scale_col * array.strides[1];
  } else if (array.ndim == 1 && cols == 1) {
    offset = scale_row * array.strides[0];
  }
  const uint8_t* address = array.At(offset);
  switch (row.format) {
    case WeightFormat::kFp8Block128:
    case WeightFormat::kFp8PerChannel:
      return *reinterpret_cast<const float*>(address);
    case WeightFormat::kMxFp8:
    case WeightFormat::kMxFp4:
      return formats::DecodeE8m0(*address);
    case WeightFormat::kNvFp4:
      return formats::DecodeE4m3(*address);
    case WeightFormat::kMxInt4:
      return formats::DecodeBf16(*reinterpret_cast<const uint16_t*>(address));
    case WeightFormat::kBf16:
    case WeightFormat::kFp8PerTensor:
      return 1.0;
  }
  return 1.0;
}

double ScaleValue(const RowLocation& row, int64_t col) {
  const MatrixSet& set = *row.set;
  if (row.format == WeightFormat::kFp8PerChannel) {
    return BlockScale(row, row.stored, 0, 1);
  }
  const int64_t block = ScaleBlockCols(row.format);
  if (block == 0) {
    return 1.0;
  }
  const bool per_row_block = row.format == WeightFormat::kFp8Block128;
  const int64_t scale_row = per_row_block ? (set.row_origin + row.ordered) / 128 : row.stored;
  const int64_t cols = CeilDiv(set.col_origin + row.cols, block);
  return BlockScale(row, scale_row, (set.col_origin + col) / block, cols);
}

int64_t FusedRow(RowOrder order, bool gate, int64_t row, int64_t intermediate) {
  switch (order) {
    case RowOrder::kUpGate:
      return gate ? intermediate + row : row;
    case RowOrder::kGateUp:
      return gate ? row : intermediate + row;
    case RowOrder::kInterleavedGateUp:
      return 2 * row + (gate ? 0 : 1);
    case RowOrder::kInterleavedUpGate:
      return 2 * row + (gate ? 1 : 0);
  }
  return row;
}

// Inverse of FusedRow for matrices kept apart: which part a fused row belongs to.
bool FusedRowIsGate(RowOrder order, int64_t row, int64_t intermediate) {
  switch (order) {
    case RowOrder::kUpGate:
      return row >= intermediate;
    case RowOrder::kGateUp:
      return row < intermediate;
    case RowOrder::kInterleavedGateUp:
      return row % 2 == 0;
    case RowOrder::kInterleavedUpGate:
      return row % 2 == 1;
  }
  return false;
}

int64_t PartRow(RowOrder order, int64_t row, int64_t intermediate) {
  const bool interleaved =
      order == RowOrder::kInterleavedGateUp || order == RowOrder::kInterleavedUpGate;
  return interleaved ? row / 2 : row % intermediate;
}

}  // namespace

RowLocation LocateRow(const MoeSpec& spec, const WeightsDesc& desc, int64_t expert, WeightPart part,
                      int64_t row) {
  const int64_t routed = spec.num_local_experts();
  const bool shared = expert >= routed;
  const ExpertMatrices& matrices = shared ? desc.shared : desc.routed;
  RowLocation location;
  location.format = shared ? spec.shared.weights : spec.weights;
  location.expert = shared ? expert - routed : expert;
  location.ordered = row;
  location.cols = part == WeightPart::kGemm2 ? spec.intermediate_size : spec.hidden_size;
  const bool gated = IsGated(spec.activation.kind);
  const int64_t intermediate = spec.intermediate_size;
  if (part == WeightPart::kGemm2) {
    location.set = &matrices.gemm2;
  } else if (matrices.gemm1.defined()) {
    location.set = &matrices.gemm1;
    if (gated && part != WeightPart::kGemm1) {
      location.ordered = FusedRow(matrices.row_order, part == WeightPart::kGate, row, intermediate);
    }
  } else {
    bool gate = part == WeightPart::kGate;
    if (gated && part == WeightPart::kGemm1) {
      gate = FusedRowIsGate(matrices.row_order, row, intermediate);
      location.ordered = PartRow(matrices.row_order, row, intermediate);
    }
    location.set = gate && gated ? &matrices.gate : &matrices.up;
  }
  HOPYARD_INTERNAL(location.set->defined()) << "no matrix for the requested part";
  location.stored = StoredRow(location.set->row_map, location.ordered);
  return location;
}

double ValueAt(const RowLocation& row, int64_t col) {
  const bool has_global =
      row.format == WeightFormat::kFp8PerTensor || row.format == WeightFormat::kNvFp4;
  const double global =
      has_global ? static_cast<double>(StaticScale(row.set->global_scales, row.expert)) : 1.0;
  return CodeValue(row, col) * ScaleValue(row, col) * global;
}

double BiasAt(const RowLocation& row) {
  const MatrixSet& set = *row.set;
  if (!set.bias.defined() && set.bias_per_expert.empty()) {
    return 0.0;
  }
  const ExpertArray array = Select(set.bias, set.bias_per_expert, row.expert);
  const uint8_t* address = array.At(row.stored * array.strides[0]);
  return array.dtype == DType::kBf16
             ? formats::DecodeBf16(*reinterpret_cast<const uint16_t*>(address))
             : *reinterpret_cast<const float*>(address);
}

float StaticScale(const TensorView& view, int64_t expert) {
  if (!view.defined()) {
    return 1.0F;
  }
  const int64_t index = view.numel() == 1 ? 0 : expert;
  return view.as<const float>()[index * (view.ndim > 0 ? view.strides[0] : 1)];
}

double WeightValue(const MoeSpec& spec, const WeightsDesc& desc, int64_t expert, WeightPart part,
                   int64_t row, int64_t col) {
  return ValueAt(LocateRow(spec, desc, expert, part, row), col);
}

double BiasValue(const MoeSpec& spec, const WeightsDesc& desc, int64_t expert, WeightPart part,
                 int64_t row) {
  return BiasAt(LocateRow(spec, desc, expert, part, row));
}

}  // namespace hopyard::ref
