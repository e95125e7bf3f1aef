// SPDX-License-Identifier: Apache-2.0
// The arguments of one call. A layer's call is made for every layer of a model at every step, so
// its arguments cross one by one, in the order in which the caller named them; a form, made once
// for each such order, says which field each of them is. Other calls send maps of names.
//
// A number of live tokens that is a number, not a tensor, becomes a call with fewer rows: the host
// knows it, so nothing is read from a device, and rows beyond are not part of the call.
#pragma once

#include <string>
#include <vector>

#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>

#include "hopyard/hopyard.h"

#include "fields.h"

namespace hopyard::binding {

struct LayerCall {
  MoeInputs inputs;
  MoeOutputs outputs;
};

struct RouteCall {
  RouteInputs inputs;
  RouteOutputs outputs;
};

// What the first dimension of a tensor counts.
enum class Rows : uint8_t { kOther, kTokens, kSlots };

template <class Struct>
struct TensorField {
  const char* name;
  TensorView Struct::*view;
  Rows rows = Rows::kOther;
};

// Which argument of a layer's call is what.
class LayerFormObj : public tvm::ffi::Object {
 public:
  // `names` are those of fields of MoeInputs and MoeOutputs; an empty one stands for an argument
  // that Python reads itself. `routing` is what the names say of it.
  LayerFormObj(const tvm::ffi::Array<tvm::ffi::String>& names, const std::string& routing);

  // The call with these values: the hidden states, a new output or None, and the arguments that the
  // form was made for.
  [[nodiscard]] LayerCall Read(const MoeSpec& spec, tvm::ffi::PackedArgs values) const;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("hopyard.LayerForm", LayerFormObj, tvm::ffi::Object);

 private:
  struct Slot {
    const TensorField<MoeInputs>* input = nullptr;
    const TensorField<MoeOutputs>* output = nullptr;
    bool accumulate = false;
  };
  std::vector<Slot> slots_;
  RoutingInput routing_;
};

class LayerFormRef : public tvm::ffi::ObjectRef {
 public:
  LayerFormRef(const tvm::ffi::Array<tvm::ffi::String>& names, const std::string& routing)
      : tvm::ffi::ObjectRef(tvm::ffi::make_object<LayerFormObj>(names, routing)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(LayerFormRef, tvm::ffi::ObjectRef, LayerFormObj);
};

[[nodiscard]] RouteCall RouteCallOf(const Fields& inputs, const Fields& outputs);

}  // namespace hopyard::binding
