// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string_view>

namespace hopyard {

// Element types of tensors that cross the API. Packed 4-bit formats travel as kUint8, two values a
// byte, low nibble = even index. kE8m0 is the MX scale byte: 2^(b - 127), 255 = NaN.
enum class DType : uint8_t {
  kFloat32,
  kBf16,
  kFp16,
  kE4m3,
  kE8m0,
  kUint8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kFloat64,
};

[[nodiscard]] constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kE4m3:
    case DType::kE8m0:
    case DType::kUint8:
    case DType::kInt8:
      return 1;
    case DType::kBf16:
    case DType::kFp16:
    case DType::kInt16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

[[nodiscard]] std::string_view ToString(DType dtype);  // "bf16", "e4m3", ...

enum class DeviceKind : uint8_t { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};

// Where work for a GPU is enqueued.
struct Stream {
  void* handle = nullptr;  // cudaStream_t; ignored on CPUs
};

// A non-owning description of a strided array, like a DLPack tensor. `strides` are in elements.
// A default-constructed view is "absent"; optional arguments are passed that way.
struct TensorView {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};
  Device device{};

  // Row-major contiguous view; at most kMaxDims sizes.
  static TensorView Contiguous(void* data, DType dtype, std::initializer_list<int64_t> shape,
                               Device device = {});
  // The same over memory that will only be read.
  static TensorView Contiguous(const void* data, DType dtype, std::initializer_list<int64_t> shape,
                               Device device = {});

  [[nodiscard]] bool defined() const { return data != nullptr || ndim > 0; }
  [[nodiscard]] int64_t numel() const;
  [[nodiscard]] bool is_contiguous() const;
  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace hopyard
