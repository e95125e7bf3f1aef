// SPDX-License-Identifier: Apache-2.0
// Weights that the command line tool makes: random ones of a preset, or a checkpoint's requantised.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "hopyard/quantize.h"
#include "hopyard/spec.h"
#include "hopyard/weights.h"

#include "cli/buffer.h"

namespace hopyard::cli {

[[nodiscard]] Format FormatOf(WeightFormat format);

// One family of matrices [experts, rows, cols] in one format, linear scales.
class OwnedMatrices {
 public:
  OwnedMatrices() = default;
  OwnedMatrices(Format format, int64_t experts, int64_t rows, int64_t cols);

  [[nodiscard]] static int64_t Bytes(Format format, int64_t experts, int64_t rows, int64_t cols);

  [[nodiscard]] int64_t experts() const { return experts_; }
  [[nodiscard]] int64_t rows() const { return rows_; }
  [[nodiscard]] int64_t cols() const { return cols_; }
  [[nodiscard]] int64_t bytes() const { return codes_.bytes() + scales_.bytes(); }
  [[nodiscard]] QuantizedView Expert(int64_t expert) const;
  // Quantises `source` [rows, cols] into one expert.
  void Set(int64_t expert, const TensorView& source);
  void AllocateBias();

  [[nodiscard]] TensorView codes() const;
  [[nodiscard]] TensorView scales() const;         // absent for formats without
  [[nodiscard]] TensorView global_scales() const;  // absent for formats without
  [[nodiscard]] TensorView bias() const;           // bf16 [experts, rows]; absent if not allocated
  [[nodiscard]] MatrixSet View() const;
  [[nodiscard]] OwnedMatrices Copy() const;

 private:
  Format format_ = Format::kBf16;
  FormatShape shape_;
  int64_t experts_ = 0;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  Buffer codes_;
  Buffer scales_;
  Buffer global_scales_;
  Buffer bias_;
};

struct OwnedExperts {
  OwnedMatrices gemm1;
  OwnedMatrices gemm2;
  RowOrder row_order = RowOrder::kGateUp;
};

// All weights of one layer.
struct OwnedLayer {
  OwnedExperts routed;
  OwnedExperts shared;  // zero experts when the spec has none

  [[nodiscard]] int64_t bytes() const;
  [[nodiscard]] std::shared_ptr<OwnedLayer> Copy() const;
};

[[nodiscard]] int64_t LayerBytes(const MoeSpec& spec);

// Views of `layer`, which they keep alive.
[[nodiscard]] WeightsDesc Describe(std::shared_ptr<const OwnedLayer> layer);

struct MatrixId {
  bool shared = false;
  bool gemm2 = false;  // else the fused GEMM1
  int64_t expert = 0;
};

// Where BF16 values come from: returns [rows, cols] in the layer's row order, either a view or
// `scratch` (rows * cols elements) filled.
using MatrixSource = std::function<TensorView(const MatrixId& id, uint16_t* scratch)>;
// Called after each matrix with its values and what became of them.
using MatrixObserver =
    std::function<void(const MatrixId& id, const TensorView& source, const QuantizedView& result)>;

// Weights of `spec` in spec.weights and spec.shared.weights, with a progress bar named `label`.
// `observer` may be empty.
[[nodiscard]] std::shared_ptr<OwnedLayer> BuildLayer(const MoeSpec& spec, const std::string& label,
                                                     const MatrixSource& source,
                                                     const MatrixObserver& observer);

// Random weights: N(0, 1 / fan-in), and biases N(0, 0.01) when asked for.
[[nodiscard]] std::shared_ptr<OwnedLayer> RandomLayer(const MoeSpec& spec, RowOrder row_order,
                                                      bool biases, uint64_t seed);

// The BF16 weights of a checkpoint layer in spec.weights (spec.shared.weights for shared experts).
[[nodiscard]] std::shared_ptr<OwnedLayer> RequantizedLayer(const MoeSpec& spec,
                                                           const WeightsDesc& source,
                                                           const MatrixObserver& observer);

}  // namespace hopyard::cli
