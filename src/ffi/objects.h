// SPDX-License-Identifier: Apache-2.0
// The objects that Python holds, and the conversion of the API's values to and from maps.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include <tvm/ffi/object.h>

#include "hopyard/hopyard.h"

#include "fields.h"

namespace hopyard::binding {

class PlanObj : public tvm::ffi::Object {
 public:
  explicit PlanObj(Plan value);

  Plan plan;
  int64_t workspace_bytes;  // read by Python, which owns the workspace
  int64_t tokens_per_chunk;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("hopyard.Plan", PlanObj, tvm::ffi::Object);
};

class PlanRef : public tvm::ffi::ObjectRef {
 public:
  explicit PlanRef(Plan plan)
      : tvm::ffi::ObjectRef(tvm::ffi::make_object<PlanObj>(std::move(plan))) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(PlanRef, tvm::ffi::ObjectRef, PlanObj);
};

class WeightsObj : public tvm::ffi::Object {
 public:
  explicit WeightsObj(Weights value);

  Weights weights;
  int64_t bytes_per_expert;
  int64_t device;  // number of the GPU, -1 on the CPU

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("hopyard.Weights", WeightsObj, tvm::ffi::Object);
};

class WeightsRef : public tvm::ffi::ObjectRef {
 public:
  explicit WeightsRef(Weights weights)
      : tvm::ffi::ObjectRef(tvm::ffi::make_object<WeightsObj>(std::move(weights))) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(WeightsRef, tvm::ffi::ObjectRef, WeightsObj);
};

class TuningTableObj : public tvm::ffi::Object {
 public:
  explicit TuningTableObj(TuningTable value)
      : table(std::make_shared<const TuningTable>(std::move(value))) {}

  std::shared_ptr<const TuningTable> table;  // plans share it

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("hopyard.TuningTable", TuningTableObj, tvm::ffi::Object);
};

class TuningTableRef : public tvm::ffi::ObjectRef {
 public:
  explicit TuningTableRef(TuningTable table)
      : tvm::ffi::ObjectRef(tvm::ffi::make_object<TuningTableObj>(std::move(table))) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(TuningTableRef, tvm::ffi::ObjectRef,
                                                TuningTableObj);
};

class CheckpointObj : public tvm::ffi::Object {
 public:
  explicit CheckpointObj(Checkpoint value);

  Checkpoint checkpoint;
  tvm::ffi::String model_type;
  tvm::ffi::Array<int64_t> moe_layers;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("hopyard.Checkpoint", CheckpointObj, tvm::ffi::Object);
};

class CheckpointRef : public tvm::ffi::ObjectRef {
 public:
  explicit CheckpointRef(Checkpoint checkpoint)
      : tvm::ffi::ObjectRef(tvm::ffi::make_object<CheckpointObj>(std::move(checkpoint))) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(CheckpointRef, tvm::ffi::ObjectRef, CheckpointObj);
};

[[nodiscard]] RoutingRule RuleOf(const Fields& fields);
[[nodiscard]] MoeSpec SpecOf(const Fields& fields);
[[nodiscard]] Dict ToDict(const MoeSpec& spec);
[[nodiscard]] PlanOptions PlanOptionsOf(const Fields& fields);
[[nodiscard]] Dict DictOf(const WeightOrders& orders);
[[nodiscard]] Format FormatOf(const std::string& name);
[[nodiscard]] ScaleLayout ScaleLayoutOf(const std::string& name);
// Views of the caller's tensors, which desc.owner keeps alive.
[[nodiscard]] WeightsDesc WeightsDescOf(const MoeSpec& spec, const Dict& map);
[[nodiscard]] WeightSlice SliceOf(const MoeSpec& spec, const Fields& fields);
// Zeroed memory of the library's own; `dtype` as tvm-ffi spells it: "float32", "bfloat16", "uint8".
[[nodiscard]] tvm::ffi::Tensor NewTensor(const tvm::ffi::Array<int64_t>& shape,
                                         const std::string& dtype, Device device);
// A new FP32 tensor of an f32, bf16 or f16 view with one or two dimensions.
[[nodiscard]] tvm::ffi::Tensor ToFloatTensor(const TensorView& view);

}  // namespace hopyard::binding
