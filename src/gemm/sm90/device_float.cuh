// SPDX-License-Identifier: Apache-2.0
// The activations of gemm/activation.h on the device.
#pragma once

#include "gemm/activation.h"

namespace hopyard::gemm::sm90 {

// One float with the operations that gemm/activation.h asks for.
struct DeviceFloat {
  float v;

  static __device__ __forceinline__ DeviceFloat Zero() { return {0.0F}; }
  static __device__ __forceinline__ DeviceFloat Set(float x) { return {x}; }
  static __device__ __forceinline__ DeviceFloat Fma(DeviceFloat a, DeviceFloat b, DeviceFloat c) {
    return {__fmaf_rn(a.v, b.v, c.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator+(DeviceFloat a, DeviceFloat b) {
    return {__fadd_rn(a.v, b.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator-(DeviceFloat a, DeviceFloat b) {
    return {__fsub_rn(a.v, b.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator*(DeviceFloat a, DeviceFloat b) {
    return {__fmul_rn(a.v, b.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator/(DeviceFloat a, DeviceFloat b) {
    return {__fdiv_rn(a.v, b.v)};
  }
  // The second operand where they do not compare (NaN), as x86 does.
  static __device__ __forceinline__ DeviceFloat Min(DeviceFloat a, DeviceFloat b) {
    return a.v < b.v ? a : b;
  }
  static __device__ __forceinline__ DeviceFloat Max(DeviceFloat a, DeviceFloat b) {
    return a.v > b.v ? a : b;
  }
  static __device__ __forceinline__ DeviceFloat Abs(DeviceFloat a) { return {fabsf(a.v)}; }
  static __device__ __forceinline__ DeviceFloat CopySign(DeviceFloat a, DeviceFloat b) {
    return {copysignf(a.v, b.v)};
  }
  static __device__ __forceinline__ DeviceFloat Less(DeviceFloat a, DeviceFloat b, DeviceFloat x,
                                                     DeviceFloat y) {
    return a.v < b.v ? x : y;
  }
  static __device__ __forceinline__ DeviceFloat Round(DeviceFloat a) { return {rintf(a.v)}; }
  // 2^n for integral n in -126 .. 127.
  static __device__ __forceinline__ DeviceFloat Exp2(DeviceFloat n) {
    return {__int_as_float((__float2int_rn(n.v) + 127) << 23)};
  }
};

// activation::Gated's SwiGLU with the fast exponential and division (2 ulp), far inside the BF16
// rounding that follows. The minimum and maximum return NaN's other operand, so NaN is put back.
__device__ __forceinline__ float SwiGlu(const activation::Parameters& p, float gate, float up) {
  const float g = gate != gate ? gate : fminf(gate, p.limit);
  const float u = up != up ? up : fmaxf(-p.limit, fminf(up, p.limit));
  return (u + p.beta) * __fdividef(g, 1.0F + __expf(-p.alpha * g));
}

}  // namespace hopyard::gemm::sm90
