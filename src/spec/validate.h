// SPDX-License-Identifier: Apache-2.0
// Every rule about arguments once; C++, Python and the CLI all pass through here.
#pragma once

#include <string>

#include "hopyard/forward.h"
#include "hopyard/spec.h"
#include "hopyard/weights.h"

namespace hopyard::spec {

// Throws Error{kInvalidArgument} for a spec that means nothing.
void ValidateSpec(const MoeSpec& spec);

// Empty, or the rule that makes a meaningful spec unsupported (by any backend), with the remedy.
[[nodiscard]] std::string UnsupportedReason(const MoeSpec& spec);

// Shapes, dtypes, layouts and per-expert counts against the spec.
void ValidateWeights(const MoeSpec& spec, const WeightsDesc& desc);

// One matrix as a slice of Weights::Update sees it: natural rows, K-major.
struct SliceTarget {
  int64_t rows = 0;
  int64_t cols = 0;
  WeightFormat format = WeightFormat::kBf16;
  int64_t row_origin = 0;  // of natural row 0, counted from the start of a scale block
  int64_t col_origin = 0;
  bool interleaved = false;  // the rows lie between those of another part
  int64_t rows_before = 0;   // of the other part, in the same stored matrix
  int64_t rows_after = 0;
  bool has_bias = false;
  DType bias_dtype = DType::kFloat32;
  const float* global_scale = nullptr;  // the stored one; null: none
};
// Everything that the slice writes, before anything is written.
void ValidateSlice(const WeightSlice& slice, const SliceTarget& target);

// One call: shapes against the spec and capacity, optional outputs, reserved modes.
void ValidateForward(const MoeSpec& spec, int64_t max_tokens, const MoeInputs& inputs,
                     const MoeOutputs& outputs);

// A tensor argument that must be a contiguous CPU array of one of `dtypes` with this shape; -1 in
// the shape is free.
struct TensorRule {
  const char* name = "";
  std::initializer_list<DType> dtypes;
  std::initializer_list<int64_t> shape;
};
void CheckTensor(const TensorView& tensor, const TensorRule& rule);
// The part of it that holds for any layout: a sane shape, host memory, not null, aligned elements.
void CheckMemory(const TensorView& tensor, const char* name);

[[nodiscard]] std::string ShapeString(const TensorView& tensor);  // "[2, 3]"

}  // namespace hopyard::spec
