// SPDX-License-Identifier: Apache-2.0
#include "hopyard/tensor.h"

#include "core/error.h"

namespace hopyard {

std::string_view ToString(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "f32";
    case DType::kBf16:
      return "bf16";
    case DType::kFp16:
      return "f16";
    case DType::kE4m3:
      return "e4m3";
    case DType::kE8m0:
      return "e8m0";
    case DType::kUint8:
      return "u8";
    case DType::kInt8:
      return "i8";
    case DType::kInt16:
      return "i16";
    case DType::kInt32:
      return "i32";
    case DType::kInt64:
      return "i64";
    case DType::kFloat64:
      return "f64";
  }
  return "?";
}

TensorView TensorView::Contiguous(void* data, DType dtype, std::initializer_list<int64_t> shape,
                                  Device device) {
  HOPYARD_CHECK(shape.size() <= static_cast<size_t>(kMaxDims), kInvalidArgument)
      << "TensorView has " << shape.size() << " dimensions; at most " << kMaxDims << " allowed";
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.device = device;
  view.ndim = static_cast<int>(shape.size());
  int i = 0;
  for (const int64_t extent : shape) {
    view.shape.at(static_cast<size_t>(i++)) = extent;
  }
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    const auto at = static_cast<size_t>(d);
    view.strides.at(at) = stride;
    stride *= view.shape.at(at);
  }
  return view;
}

TensorView TensorView::Contiguous(const void* data, DType dtype,
                                  std::initializer_list<int64_t> shape, Device device) {
  return Contiguous(const_cast<void*>(data), dtype, shape, device);
}

int64_t TensorView::numel() const {
  int64_t count = 1;
  for (int d = 0; d < ndim; ++d) {
    count *= shape.at(static_cast<size_t>(d));
  }
  return count;
}

bool TensorView::is_contiguous() const {
  int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    const auto at = static_cast<size_t>(d);
    if (shape.at(at) != 1 && strides.at(at) != stride) {
      return false;
    }
    stride *= shape.at(at);
  }
  return true;
}

}  // namespace hopyard
