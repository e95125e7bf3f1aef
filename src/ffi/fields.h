// SPDX-License-Identifier: Apache-2.0
// Reads the maps that the Python package sends: name -> number, string, tensor or map.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include "hopyard/tensor.h"

#include "errors.h"

namespace hopyard::binding {

using Dict = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

// A view of a DLPack tensor. 16-bit unsigned integers stand for bf16 bits, as NumPy has no bf16.
// Error{kInvalidArgument} names the tensor for other dtypes and more than TensorView::kMaxDims.
TensorView ViewOf(const tvm::ffi::TensorView& tensor, std::string_view name);

// Bytes sent as uint8 where the format says what they are (NumPy has neither e4m3 nor e8m0).
[[nodiscard]] TensorView BytesAs(TensorView view, DType dtype);

// GPU `index`, or the CPU for a negative one.
[[nodiscard]] constexpr Device DeviceOf(int index) {
  return index < 0 ? Device{} : Device{DeviceKind::kCuda, index};
}
// The handle that Python sends as a number.
[[nodiscard]] inline Stream StreamOf(int64_t handle) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): handles cross the border as integers.
  return {reinterpret_cast<void*>(handle)};
}

class Fields {
 public:
  // `where` prefixes the names of fields in messages: "gemm1.", or nothing.
  explicit Fields(Dict map, std::string where = "")
      : map_(std::move(map)), where_(std::move(where)) {}

  // The value, or `fallback` where the field is missing or None.
  template <class T>
  [[nodiscard]] T Get(const char* key, T fallback) const {
    const std::optional<tvm::ffi::Any> value = Find(key);
    if (!value) {
      return fallback;
    }
    std::optional<T> converted = value->try_cast<T>();
    if (!converted) {
      ThrowInvalid(where_ + key + " has type " + value->GetTypeKey());
    }
    return *std::move(converted);
  }
  [[nodiscard]] std::string Text(const char* key, const char* fallback) const;
  // The number, where the field holds one.
  [[nodiscard]] std::optional<int64_t> Number(const char* key) const;
  // Fields of a nested map; empty where it is missing.
  [[nodiscard]] Fields Nested(const char* key) const;
  // A view of the tensor, or an absent view.
  [[nodiscard]] TensorView View(const char* key) const;
  // Every tensor of a field that holds one tensor or a list of them.
  struct Tensors {
    TensorView one;
    std::vector<TensorView> many;
  };
  [[nodiscard]] Tensors OneOrMany(const char* key) const;
  [[nodiscard]] bool empty() const { return map_.empty(); }

 private:
  [[nodiscard]] std::optional<tvm::ffi::Any> Find(const char* key) const;

  Dict map_;
  std::string where_;
};

}  // namespace hopyard::binding
