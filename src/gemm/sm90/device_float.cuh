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

// The smaller or larger one, and NaN where either is.
__device__ __forceinline__ float MinOrNan(float a, float b) {
  float result = 0.0F;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float result = 0.0F;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
// 2^x and 1 / x to within 2 ulp; results below 2^-126 are zero.
__device__ __forceinline__ float FastExp2(float x) {
  float result = 0.0F;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float FastReciprocal(float x) {
  float result = 0.0F;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// activation::Gated's SwiGLU with the processor's exponential and reciprocal: a few units in the
// last place of FP32, far inside the BF16 rounding that follows. Ten instructions; it runs for
// every value of GEMM1's output.
struct SwiGlu {
  float limit;
  float beta;
  float exponent;  // -alpha / ln 2

  __device__ __forceinline__ explicit SwiGlu(const activation::Parameters& p)
      : limit(p.limit), beta(p.beta), exponent(-1.44269504F * p.alpha) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    const float g = MinOrNan(gate, limit);
    const float u = MaxOrNan(MinOrNan(up, limit), -limit);
    return (u + beta) * (g * FastReciprocal(1.0F + FastExp2(exponent * g)));
  }
};

}  // namespace hopyard::gemm::sm90
