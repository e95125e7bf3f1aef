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
  // Optional [T, >= K] i32: ids to use instead of the selected ones (columns beyond K are ignored),
  // so that a backend's own choice between nearly equal scores is judged by Route's tests, not
  // here. Their weights are recomputed from the logits where there are any, else they are the given
  // ones.
  TensorView forced_ids;
  TensorView forced_weights;  // optional [T, >= K] f32, together with forced_ids
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

// The same in two passes over the same routing: `exact` and `plain` for tests that need both.
struct LayerRefPair {
  LayerRefResult exact;
  LayerRefResult plain;
};
LayerRefPair LayerRefBoth(const MoeSpec& spec, const Weights& weights, const MoeInputs& inputs,
                          int64_t output_width, const LayerRefOptions& options);

// Value of natural row `row` (gate and up as parts of their own, before any row map), column `col`.
double WeightValue(const MoeSpec& spec, const WeightsDesc& desc, int64_t expert, WeightPart part,
                   int64_t row, int64_t col);
// Bias of the same row; 0 where the weights have none.
double BiasValue(const MoeSpec& spec, const WeightsDesc& desc, int64_t expert, WeightPart part,
                 int64_t row);

}  // namespace hopyard::ref
