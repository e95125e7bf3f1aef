// SPDX-License-Identifier: Apache-2.0
// Pieces of the layer oracle: where a weight lies, and the roundings of the plain implementation.
#pragma once

#include <cstdint>
#include <vector>

#include "hopyard/forward.h"

namespace hopyard::ref {

// One row of a weight matrix: natural row -> (matrix set, row in row order, stored row).
struct RowLocation {
  const MatrixSet* set = nullptr;
  WeightFormat format = WeightFormat::kBf16;
  int64_t expert = 0;   // index within the set
  int64_t ordered = 0;  // row in the set's row order, before the row map
  int64_t stored = 0;   // row in memory
  int64_t cols = 0;     // K
};

RowLocation LocateRow(const MoeSpec& spec, const WeightsDesc& desc, int64_t expert, WeightPart part,
                      int64_t row);
// Exact value of column `col` of that row.
double ValueAt(const RowLocation& row, int64_t col);
double BiasAt(const RowLocation& row);

// `view` is [1] or [experts] f32; absent gives 1.
float StaticScale(const TensorView& view, int64_t expert);

// Reads element `index` of a contiguous f32, bf16, i16, i32 or i64 array.
double ReadNumber(const TensorView& view, int64_t index);

// Roundings of the plain implementation, in place. `scale` is the static scale of kFp8PerTensor and
// the global multiplier of kNvFp4; the other formats ignore it.
void RoundHidden(ActivationFormat format, float scale, std::vector<float>* row);
void RoundIntermediate(ActivationFormat format, float scale, std::vector<float>* row);

// Row `token` of the hidden states as given: bf16 values or codes times their own scales. Static
// scales (kFp8PerTensor, kNvFp4) are left out; `needs_static` says that they are to be applied.
struct HiddenRow {
  std::vector<double> values;
  bool needs_static = false;
  bool quantised = false;
};
HiddenRow ReadHidden(const MoeSpec& spec, const MoeInputs& inputs, int64_t token);

// The routing of the given tokens: everything that depends on ids and weights.
struct SlotTable {
  std::vector<int64_t> tokens;
  std::vector<int32_t> ids;      // [n, K + S] global, -1 = skipped
  std::vector<double> weights;   // [n, K + S]
  std::vector<int64_t> experts;  // [n, K + S] index into the local experts, then shared; -1 = none
};

}  // namespace hopyard::ref
