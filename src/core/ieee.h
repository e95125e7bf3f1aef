// SPDX-License-Identifier: Apache-2.0
// Single FP32 operations, rounded to nearest even, that no compiler contracts or replaces: the
// steps of definitions that host and device follow bit for bit.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace hopyard::ieee {

#if defined(__CUDA_ARCH__)
HOPYARD_HOST_DEVICE float Add(float a, float b) {
  return __fadd_rn(a, b);
}
HOPYARD_HOST_DEVICE float Mul(float a, float b) {
  return __fmul_rn(a, b);
}
HOPYARD_HOST_DEVICE float Div(float a, float b) {
  return __fdiv_rn(a, b);
}
HOPYARD_HOST_DEVICE uint32_t Bits(float a) {
  return __float_as_uint(a);
}
HOPYARD_HOST_DEVICE float FromBits(uint32_t a) {
  return __uint_as_float(a);
}
#else
HOPYARD_HOST_DEVICE float Add(float a, float b) {
  return a + b;
}
HOPYARD_HOST_DEVICE float Mul(float a, float b) {
  return a * b;
}
HOPYARD_HOST_DEVICE float Div(float a, float b) {
  return a / b;
}
HOPYARD_HOST_DEVICE uint32_t Bits(float a) {
  return __builtin_bit_cast(uint32_t, a);
}
HOPYARD_HOST_DEVICE float FromBits(uint32_t a) {
  return __builtin_bit_cast(float, a);
}
#endif
HOPYARD_HOST_DEVICE bool IsNan(float a) {
  return a != a;
}
HOPYARD_HOST_DEVICE float Min(float a, float b) {
  return b < a ? b : a;
}
HOPYARD_HOST_DEVICE float Max(float a, float b) {
  return a < b ? b : a;
}

}  // namespace hopyard::ieee
