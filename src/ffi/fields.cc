// SPDX-License-Identifier: Apache-2.0
#include "fields.h"

#include <utility>

namespace hopyard::binding {
namespace {

namespace ffi = tvm::ffi;

std::string DTypeName(DLDataType dtype) {
  static constexpr std::pair<int, const char*> kNames[] = {
      {kDLInt, "int"},
      {kDLUInt, "uint"},
      {kDLFloat, "float"},
      {kDLBfloat, "bfloat"},
      {kDLComplex, "complex"},
      {kDLBool, "bool"},
      {kDLFloat4_e2m1fn, "float4_e2m1fn"},
  };
  std::string name = "dlpack code " + std::to_string(dtype.code) + " of bits ";
  for (const auto& [code, text] : kNames) {
    if (dtype.code == code) {
      name = text;
    }
  }
  return name + std::to_string(dtype.bits);
}

std::optional<DType> DTypeOf(DLDataType dtype) {
  struct Row {
    int code;
    int bits;
    DType dtype;
    int lanes = 1;
  };
  static constexpr Row kRows[] = {
      {kDLFloat, 32, DType::kFloat32},
      {kDLFloat, 16, DType::kFp16},
      {kDLFloat, 64, DType::kFloat64},
      {kDLBfloat, 16, DType::kBf16},
      {kDLUInt, 16, DType::kBf16},
      {kDLUInt, 8, DType::kUint8},
      {kDLFloat8_e4m3fn, 8, DType::kE4m3},
      {kDLFloat8_e8m0fnu, 8, DType::kE8m0},
      {kDLInt, 8, DType::kInt8},
      {kDLInt, 16, DType::kInt16},
      {kDLInt, 32, DType::kInt32},
      {kDLInt, 64, DType::kInt64},
      {kDLFloat4_e2m1fn, 4, DType::kUint8, 2},
  };
  for (const Row& row : kRows) {
    if (dtype.code == row.code && dtype.bits == row.bits && dtype.lanes == row.lanes) {
      return row.dtype;
    }
  }
  return std::nullopt;
}

}  // namespace

TensorView ViewOf(const ffi::TensorView& tensor, std::string_view name) {
  const std::optional<DType> dtype = DTypeOf(tensor.dtype());
  if (!dtype) {
    ThrowInvalid(std::string(name) + " has dtype " + DTypeName(tensor.dtype()) +
                 ", wanted one of float32, float16, bfloat16 (or uint16 bits), float8_e4m3fn, "
                 "float8_e8m0fnu, uint8, int8, int16, int32, int64, float64");
  }
  if (tensor.ndim() > TensorView::kMaxDims) {
    ThrowInvalid(std::string(name) + " has " + std::to_string(tensor.ndim()) +
                 " dimensions, wanted at most " + std::to_string(TensorView::kMaxDims));
  }
  const DLDevice device = tensor.device();
  if (device.device_type != kDLCPU && device.device_type != kDLCUDA &&
      device.device_type != kDLCUDAHost) {
    ThrowInvalid(std::string(name) + " is on DLPack device type " +
                 std::to_string(device.device_type) + ", wanted the CPU or a CUDA GPU");
  }
  TensorView view;
  view.data = static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
  view.dtype = *dtype;
  view.ndim = tensor.ndim();
  // Strides of empty dimensions and of dimensions of size 1 mean nothing and differ between
  // frameworks: a contiguous tensor gets the strides that its shape says.
  const bool contiguous = tensor.IsContiguous();
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    const auto dim = static_cast<size_t>(i);
    view.shape[dim] = tensor.size(i);
    view.strides[dim] = contiguous ? stride : tensor.stride(i);
    stride *= view.shape[dim];
  }
  if (device.device_type == kDLCUDA) {
    view.device = {DeviceKind::kCuda, device.device_id};
  }
  return view;
}

TensorView BytesAs(TensorView view, DType dtype) {
  if (view.dtype == DType::kUint8) {
    view.dtype = dtype;
  }
  return view;
}

std::optional<ffi::Any> Fields::Find(const char* key) const {
  std::optional<ffi::Any> value = map_.Get(ffi::String(key));
  if (value && *value == nullptr) {
    return std::nullopt;
  }
  return value;
}

std::string Fields::Text(const char* key, const char* fallback) const {
  return Get<ffi::String>(key, ffi::String(fallback));
}

Fields Fields::Nested(const char* key) const {
  return Fields(Get<Dict>(key, Dict()), where_ + key + ".");
}

std::optional<int64_t> Fields::Number(const char* key) const {
  const std::optional<ffi::Any> value = Find(key);
  return value ? value->try_cast<int64_t>() : std::nullopt;
}

TensorView Fields::View(const char* key) const {
  const std::optional<ffi::Any> value = Find(key);
  if (!value) {
    return {};
  }
  const std::optional<ffi::Tensor> tensor = value->try_cast<ffi::Tensor>();
  if (!tensor) {
    ThrowInvalid(where_ + key + " is a " + value->GetTypeKey() + ", wanted a tensor");
  }
  return ViewOf(*tensor, where_ + key);
}

Fields::Tensors Fields::OneOrMany(const char* key) const {
  Tensors result;
  const std::optional<ffi::Any> value = Find(key);
  if (!value) {
    return result;
  }
  const std::optional<ffi::Array<ffi::Tensor>> list = value->try_cast<ffi::Array<ffi::Tensor>>();
  if (!list) {
    result.one = View(key);
    return result;
  }
  int index = 0;
  for (const ffi::Tensor& tensor : *list) {
    result.many.push_back(ViewOf(tensor, where_ + key + "[" + std::to_string(index) + "]"));
    ++index;
  }
  return result;
}

}  // namespace hopyard::binding
