// SPDX-License-Identifier: Apache-2.0
// Oracle of the whole layer: double, scalar, obviously right, sharing nothing with the backends but
// the number formats (src/formats/codes.h, which have their own exhaustive tests).
#pragma once

#include <cstdint>
#include <vector>

#include "hopyard/forward.h"

namespace hopyard::ref {

struct LayerRefOptions {
  // false: exact arithmetic on the given quantised inputs and weights (the oracle).
  // true: the plain implementation of style-anchors 3.6b: FP32 loops, activations and intermediate
  // rounded to the layer's formats at the stage boundaries, GEMM2 rows rounded to bf16.
  bool plain = false;
  std::vector<int64_t> tokens;  // rows to compute; empty: all
};

struct LayerRefResult {
  std::vector<int64_t> tokens;          // the rows computed
  std::vector<int32_t> ids;             // [n, K + S] global ids, -1 = skipped
  std::vector<double> routing_weights;  // [n, K + S]
  std::vector<double> output;           // [n, W]
};

// `inputs` as Forward takes them. `output_width` is W (0: H).
LayerRefResult LayerRef(const MoeSpec& spec, const Weights& weights, const MoeInputs& inputs,
                        int64_t output_width, const LayerRefOptions& options);

// Value of natural row `row` (gate and up as parts of their own, before any row map), column `col`.
double WeightValue(const MoeSpec& spec, const WeightsDesc& desc, int64_t expert, WeightPart part,
                   int64_t row, int64_t col);

}  // namespace hopyard::ref
