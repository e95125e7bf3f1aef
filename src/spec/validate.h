// SPDX-License-Identifier: Apache-2.0
// Every rule about arguments once; C++, Python and the CLI all pass through here.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "hopyard/forward.h"
#include "hopyard/spec.h"
#include "hopyard/weights.h"

namespace hopyard::spec {

// A tensor argument that must be a contiguous array of one of `dtypes` with this shape; -1 in the
// shape is free.
struct TensorRule {
  const char* name = "";
  std::initializer_list<DType> dtypes;
  std::initializer_list<int64_t> shape;
};

// Where the tensors of a call must lie, and how the host reads values that it judges.
struct Place {
  Device device;                     // the plan's, or the weights'
  bool or_host = false;              // host memory will do, too
  const char* whose = "the plan's";  // device it is; for messages
  // Copies `bytes` of device memory to the host; null where the device is the CPU.
  void (*read)(void* to, const void* from, int64_t bytes) = nullptr;

  void CheckTensor(const TensorView& tensor, const TensorRule& rule) const;
  // The part of it that holds for any layout: a sane shape, the right memory, not null, aligned
  // elements.
  void CheckMemory(const TensorView& tensor, const char* name) const;
  // The `count` first elements of a contiguous f32 tensor that has been checked.
  [[nodiscard]] std::vector<float> Read(const TensorView& tensor, int64_t count) const;
};

// Throws Error{kInvalidArgument} for a spec that means nothing.
void ValidateSpec(const MoeSpec& spec);

// Empty, or the rule that makes a meaningful spec unsupported (by any backend), with the remedy.
[[nodiscard]] std::string UnsupportedReason(const MoeSpec& spec);

// Shapes, dtypes, layouts and per-expert counts against the spec.
void ValidateWeights(const MoeSpec& spec, const WeightsDesc& desc, const Place& place = {});

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
  bool has_global_scale = false;
  float global_scale = 0.0F;  // the stored one; only looked at where the slice has another
};
// Everything that the slice writes, before anything is written.
void ValidateSlice(const WeightSlice& slice, const SliceTarget& target, const Place& place = {});

// One call: shapes against the spec and capacity, optional outputs, reserved modes. Values are
// judged on the CPU only: a call on a GPU must not wait for them.
void ValidateForward(const MoeSpec& spec, int64_t max_tokens, const MoeInputs& inputs,
                     const MoeOutputs& outputs, const Place& place = {});

// Of CPU tensors.
void CheckTensor(const TensorView& tensor, const TensorRule& rule);

[[nodiscard]] std::string ShapeString(const TensorView& tensor);  // "[2, 3]"

}  // namespace hopyard::spec
