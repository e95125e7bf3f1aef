// SPDX-License-Identifier: Apache-2.0
#include "tests/refit.h"

#include <algorithm>
#include <utility>

namespace hopyard::test {
namespace {

// Cuts a matrix into windows whose edges lie on scale blocks.
std::vector<Window> CutUp(const CanonicalMatrix& matrix, uint64_t seed) {
  const int64_t row_step = matrix.format == WeightFormat::kFp8Block128
                               ? 128
                               : 1 + static_cast<int64_t>(Hash(seed, 1) % 40);
  const int64_t block = std::max<int64_t>(ScaleBlockCols(matrix.format), 2);
  int64_t col_step = block * (1 + static_cast<int64_t>(Hash(seed, 2) % 3));
  if (matrix.format == WeightFormat::kFp8PerChannel) {
    col_step = matrix.cols;  // a channel's scale is of its whole row
  }
  std::vector<Window> windows;
  for (int64_t row = 0; row < matrix.rows; row += row_step) {
    for (int64_t col = 0; col < matrix.cols; col += col_step) {
      windows.push_back(
          {row, std::min(row_step, matrix.rows - row), col, std::min(col_step, matrix.cols - col)});
    }
  }
  return windows;
}

}  // namespace

WeightSlice SliceOf(const CanonicalMatrix& matrix, const Window& window) {
  WeightSlice slice;
  slice.row_begin = window.row_begin;
  slice.col_begin = window.col_begin;
  const int64_t unit = SizeOf(CodeType(matrix.format));
  const int64_t per_byte = CodesPerByte(matrix.format);
  const int64_t first = window.row_begin * matrix.row_bytes + window.col_begin * unit / per_byte;
  slice.values = TensorView::Contiguous(matrix.codes.data() + first, CodeType(matrix.format),
                                        {window.rows, window.cols / per_byte});
  slice.values.strides[0] = matrix.row_bytes / unit;
  if (matrix.scale_rows == 0) {
    return slice;
  }
  const bool blocked = matrix.format == WeightFormat::kFp8Block128;
  const int64_t block = ScaleBlockCols(matrix.format);
  const int64_t row = blocked ? window.row_begin / 128 : window.row_begin;
  const int64_t rows = blocked ? (window.row_begin + window.rows + 127) / 128 - row : window.rows;
  const int64_t col = block > 0 ? window.col_begin / block : 0;
  const auto* scales = matrix.scales.data() + (row * matrix.scale_cols + col) * matrix.scale_bytes;
  if (block == 0) {
    slice.scales = TensorView::Contiguous(scales, ScaleType(matrix.format), {rows});
    return slice;
  }
  const int64_t cols = (window.col_begin + window.cols + block - 1) / block - col;
  slice.scales = TensorView::Contiguous(scales, ScaleType(matrix.format), {rows, cols});
  slice.scales.strides[0] = matrix.scale_cols;
  return slice;
}

void Refit::Add(int64_t expert, WeightPart part, const CanonicalMatrix& matrix,
                const std::vector<float>& bias) {
  for (const Window& window : CutUp(matrix, Hash(seed_, updates_.size()))) {
    Pending update;
    update.slice = SliceOf(matrix, window);
    update.slice.expert = expert;
    update.slice.part = part;
    update.global = matrix.global;
    if (window.col_begin == 0 && !bias.empty()) {
      update.bias.assign(bias.begin() + window.row_begin,
                         bias.begin() + window.row_begin + window.rows);
    }
    updates_.push_back(std::move(update));
  }
}

void Refit::AddGlobal(int64_t expert, WeightPart part, float global) {
  Pending update;
  update.slice.expert = expert;
  update.slice.part = part;
  update.global = global;
  globals_.push_back(std::move(update));
}

void Refit::AddParts(const LayerWeights& fresh, int64_t experts, bool separate) {
  for (int64_t e = 0; e < experts; ++e) {
    const CanonicalExpert& expert = fresh.expert(e);
    if (separate) {
      AddGlobal(e, WeightPart::kGate, expert.gate.global);
      AddGlobal(e, WeightPart::kUp, expert.up.global);
    } else {
      AddGlobal(e, WeightPart::kGemm1, expert.gemm1.global);
    }
    AddGlobal(e, WeightPart::kGemm2, expert.gemm2.global);
    Add(e, WeightPart::kGate, expert.gate, expert.gate_bias);
    Add(e, WeightPart::kUp, expert.up, expert.up_bias);
    Add(e, WeightPart::kGemm2, expert.gemm2, expert.gemm2_bias);
  }
}

void Refit::AddFused(const LayerWeights& fresh, int64_t experts) {
  for (int64_t e = 0; e < experts; ++e) {
    const CanonicalExpert& expert = fresh.expert(e);
    AddGlobal(e, WeightPart::kGemm1, expert.gemm1.global);
    AddGlobal(e, WeightPart::kGemm2, expert.gemm2.global);
    Add(e, WeightPart::kGemm1, expert.gemm1, expert.gemm1_bias);
    Add(e, WeightPart::kGemm2, expert.gemm2, expert.gemm2_bias);
  }
}

void Refit::Apply(bool has_global, const std::function<void(const WeightSlice&)>& write) {
  for (Pending& update : globals_) {
    if (has_global) {
      update.slice.global_scale = TensorView::Contiguous(&update.global, DType::kFloat32, {1});
      write(update.slice);
    }
  }
  for (size_t i = updates_.size(); i > 1; --i) {
    std::swap(updates_[i - 1], updates_[Hash(seed_, i, 3) % i]);
  }
  for (Pending& update : updates_) {
    if (!update.bias.empty()) {
      update.slice.bias = TensorView::Contiguous(update.bias.data(), DType::kFloat32,
                                                 {static_cast<int64_t>(update.bias.size())});
    }
    if (has_global) {
      update.slice.global_scale = TensorView::Contiguous(&update.global, DType::kFloat32, {1});
    }
    write(update.slice);
  }
}

std::vector<UpdateCase> UpdateCases() {
  std::vector<UpdateCase> cases;
  for (const WeightFormat format :
       {WeightFormat::kBf16, WeightFormat::kFp8Block128, WeightFormat::kFp8PerTensor,
        WeightFormat::kFp8PerChannel, WeightFormat::kMxFp8, WeightFormat::kNvFp4,
        WeightFormat::kMxFp4, WeightFormat::kMxInt4}) {
    const bool blocked = format == WeightFormat::kFp8Block128;
    const RowOrder interleaved = blocked ? RowOrder::kUpGate : RowOrder::kInterleavedUpGate;
    WeightLayout layout;
    cases.push_back({format, layout});
    layout.order = interleaved;
    layout.map = RowMap::kShuffled128;
    layout.scales = ScaleLayout::kSwizzled128x4;
    layout.major = MajorOrder::kBlockKMajor;
    cases.push_back({format, layout});
    layout = {};
    layout.separate = true;
    layout.per_expert = true;
    layout.map = RowMap::kShuffled64;
    cases.push_back({format, layout});
    layout = {};
    layout.padding = 16;
    layout.order = blocked ? RowOrder::kGateUp : RowOrder::kInterleavedGateUp;
    cases.push_back({format, layout});
    if (format == WeightFormat::kBf16) {
      layout = {};
      layout.major = MajorOrder::kMnMajor;
      cases.push_back({format, layout});
    }
  }
  return cases;
}

std::string ToString(const UpdateCase& update) {
  return std::string(ToString(update.format)) + "_" + ToString(update.layout);
}

}  // namespace hopyard::test
