// SPDX-License-Identifier: Apache-2.0
// Checkpoint weights in BF16 -> any other format.
#include <algorithm>
#include <cstring>

#include "cli/owned_layer.h"
#include "core/error.h"
#include "core/parallel.h"

namespace hopyard::cli {
namespace {

constexpr int64_t kTransposeBlock = 64;

struct Extent {
  int64_t rows;
  int64_t cols;
};

// The stored 2-D matrix of one expert.
TensorView StoredMatrix(const MatrixSet& set, int64_t expert) {
  if (!set.values_per_expert.empty()) {
    return set.values_per_expert.at(static_cast<size_t>(expert));
  }
  TensorView view;
  view.dtype = set.values.dtype;
  view.ndim = 2;
  view.shape = {set.values.shape[1], set.values.shape[2]};
  view.strides = {set.values.strides[1], set.values.strides[2]};
  view.data = set.values.as<char>() + expert * set.values.strides[0] * SizeOf(view.dtype);
  return view;
}

// out [rows, cols] = stored [cols, rows] transposed.
void Transpose(const TensorView& stored, const Extent& extent, uint16_t* out) {
  const auto* in = stored.as<const uint16_t>();
  const int64_t blocks = (extent.rows + kTransposeBlock - 1) / kTransposeBlock;
  ParallelFor(0, blocks, 1, MaxThreads(), [&](int64_t block, int /*thread*/) {
    const int64_t begin = block * kTransposeBlock;
    const int64_t end = std::min(begin + kTransposeBlock, extent.rows);
    for (int64_t col = 0; col < extent.cols; ++col) {
      for (int64_t row = begin; row < end; ++row) {
        out[row * extent.cols + col] = in[col * stored.strides[0] + row * stored.strides[1]];
      }
    }
  });
}

// A K-major [rows, cols] view of one stored matrix; `scratch` is used where it must be moved.
TensorView NaturalMatrix(const MatrixSet& set, int64_t expert, const Extent& extent,
                         uint16_t* scratch) {
  const TensorView stored = StoredMatrix(set, expert);
  const bool transposed = set.major == MajorOrder::kMnMajor;
  const Extent wanted = transposed ? Extent{extent.cols, extent.rows} : extent;
  HOPYARD_CHECK(stored.dtype == DType::kBf16, kUnsupported)
      << "the layer's weights are " << ToString(stored.dtype)
      << "; only bf16 layers can be requantised. Leave --weights out to use them as they are";
  HOPYARD_CHECK(set.row_map == RowMap::kNatural && set.major != MajorOrder::kBlockKMajor,
                kUnsupported)
      << "the layer's weights are stored shuffled or in blocks; wanted the checkpoint's own layout";
  HOPYARD_CHECK(
      stored.ndim == 2 && stored.shape[0] == wanted.rows && stored.shape[1] == wanted.cols,
      kInvalidArgument)
      << "an expert matrix is [" << stored.shape[0] << ", " << stored.shape[1] << "]; wanted ["
      << wanted.rows << ", " << wanted.cols << "]";
  if (transposed) {
    Transpose(stored, extent, scratch);
    return TensorView::Contiguous(scratch, DType::kBf16, {extent.rows, extent.cols});
  }
  return stored;
}

// Copies `rows` of `source` into scratch.
void CopyRows(const TensorView& source, const Extent& extent, uint16_t* out) {
  const size_t row_bytes = static_cast<size_t>(extent.cols) * sizeof(uint16_t);
  for (int64_t row = 0; row < extent.rows; ++row) {
    std::memmove(out + row * extent.cols, source.as<uint16_t>() + row * source.strides[0],
                 row_bytes);
  }
}

TensorView SourceMatrix(const MoeSpec& spec, const ExpertMatrices& matrices, const MatrixId& id,
                        uint16_t* scratch) {
  if (id.gemm2) {
    return NaturalMatrix(matrices.gemm2, id.expert, {spec.hidden_size, spec.intermediate_size},
                         scratch);
  }
  const Extent fused{spec.gemm1_rows(), spec.hidden_size};
  if (matrices.gemm1.defined()) {
    return NaturalMatrix(matrices.gemm1, id.expert, fused, scratch);
  }
  const Extent half{spec.intermediate_size, spec.hidden_size};
  uint16_t* up_scratch = scratch + half.rows * half.cols;
  CopyRows(NaturalMatrix(matrices.gate, id.expert, half, scratch), half, scratch);
  CopyRows(NaturalMatrix(matrices.up, id.expert, half, up_scratch), half, up_scratch);
  return TensorView::Contiguous(scratch, DType::kBf16, {fused.rows, fused.cols});
}

}  // namespace

std::shared_ptr<OwnedLayer> RequantizedLayer(const MoeSpec& spec, const WeightsDesc& source,
                                             const MatrixObserver& observer) {
  const MatrixSource stored = [&](const MatrixId& id, uint16_t* scratch) {
    return SourceMatrix(spec, id.shared ? source.shared : source.routed, id, scratch);
  };
  auto layer = BuildLayer(spec, "quantising", stored, observer);
  // Separate gate and up matrices were fused gate first.
  const auto order = [](const ExpertMatrices& matrices) {
    return matrices.gemm1.defined() ? matrices.row_order : RowOrder::kGateUp;
  };
  layer->routed.row_order = order(source.routed);
  layer->shared.row_order = order(source.shared);
  return layer;
}

}  // namespace hopyard::cli
