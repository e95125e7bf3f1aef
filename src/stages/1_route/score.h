// SPDX-License-Identifier: Apache-2.0
// The FP32 definition of routing (docs/routing.md): every step is one IEEE operation, rounded to
// nearest even, so that any backend that issues the same operations gets the same bits. The
// formulas are templates over `Ops`, a set of such operations on one float (ScalarOps) or on a
// vector of floats.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace hopyard::route {

// Partial sums of every sum over experts or slots: lane l takes terms l, l + 32, ...
inline constexpr int kSumLanes = 32;
inline constexpr float kSumEpsilon = 1e-20F;

// One float. On a GPU the intrinsics keep the compiler from contracting.
struct ScalarOps {
  using F = float;
  using I = int32_t;
  using M = bool;
  static constexpr int kLanes = 1;

#if defined(__CUDA_ARCH__)
  static HOPYARD_HOST_DEVICE float Add(float a, float b) {
    return __fadd_rn(a, b);
  }
  static HOPYARD_HOST_DEVICE float Sub(float a, float b) {
    return __fsub_rn(a, b);
  }
  static HOPYARD_HOST_DEVICE float Mul(float a, float b) {
    return __fmul_rn(a, b);
  }
  static HOPYARD_HOST_DEVICE float Div(float a, float b) {
    return __fdiv_rn(a, b);
  }
  static HOPYARD_HOST_DEVICE float Fma(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
  }
  static HOPYARD_HOST_DEVICE float Sqrt(float a) {
    return __fsqrt_rn(a);
  }
  static HOPYARD_HOST_DEVICE int32_t Bits(float a) {
    return __float_as_int(a);
  }
  static HOPYARD_HOST_DEVICE float FromBits(int32_t a) {
    return __int_as_float(a);
  }
#else
  static HOPYARD_HOST_DEVICE float Add(float a, float b) {
    return a + b;
  }
  static HOPYARD_HOST_DEVICE float Sub(float a, float b) {
    return a - b;
  }
  static HOPYARD_HOST_DEVICE float Mul(float a, float b) {
    return a * b;
  }
  static HOPYARD_HOST_DEVICE float Div(float a, float b) {
    return a / b;
  }
  static HOPYARD_HOST_DEVICE float Fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
  static HOPYARD_HOST_DEVICE float Sqrt(float a) {
    return __builtin_sqrtf(a);
  }
  static HOPYARD_HOST_DEVICE int32_t Bits(float a) {
    return __builtin_bit_cast(int32_t, a);
  }
  static HOPYARD_HOST_DEVICE float FromBits(int32_t a) {
    return __builtin_bit_cast(float, a);
  }
#endif
  static HOPYARD_HOST_DEVICE float Set(float a) {
    return a;
  }
  static HOPYARD_HOST_DEVICE int32_t SetInt(int32_t a) {
    return a;
  }
  static HOPYARD_HOST_DEVICE float Load(const float* p) {
    return *p;
  }
  static HOPYARD_HOST_DEVICE void Store(float* p, float a) {
    *p = a;
  }
  static HOPYARD_HOST_DEVICE int32_t LoadInt(const int32_t* p) {
    return *p;
  }
  static HOPYARD_HOST_DEVICE void StoreInt(int32_t* p, int32_t a) {
    *p = a;
  }
  static HOPYARD_HOST_DEVICE bool Less(float a, float b) {
    return a < b;
  }
  static HOPYARD_HOST_DEVICE bool Equal(float a, float b) {
    return a == b;
  }
  static HOPYARD_HOST_DEVICE bool IsNan(float a) {
    return a != a;
  }
  static HOPYARD_HOST_DEVICE float Select(bool m, float a, float b) {
    return m ? a : b;
  }
  static HOPYARD_HOST_DEVICE int32_t SelectInt(bool m, int32_t a, int32_t b) {
    return m ? a : b;
  }
  static HOPYARD_HOST_DEVICE uint32_t MaskBits(bool m) {
    return m ? 1U : 0U;
  }
  static HOPYARD_HOST_DEVICE bool GreaterInt(int32_t a, int32_t b) {
    return a > b;
  }
  static HOPYARD_HOST_DEVICE int32_t MaxInt(int32_t a, int32_t b) {
    return a > b ? a : b;
  }
  static HOPYARD_HOST_DEVICE int32_t MinInt(int32_t a, int32_t b) {
    return a < b ? a : b;
  }
  static HOPYARD_HOST_DEVICE int32_t And(int32_t a, int32_t b) {
    return a & b;
  }
  static HOPYARD_HOST_DEVICE int32_t Xor(int32_t a, int32_t b) {
    return a ^ b;
  }
  static HOPYARD_HOST_DEVICE int32_t AddInt(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
  static HOPYARD_HOST_DEVICE int32_t SubInt(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
  }
  template <int kShift>
  static HOPYARD_HOST_DEVICE int32_t ShiftLeft(int32_t a) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) << kShift);
  }
  template <int kShift>
  static HOPYARD_HOST_DEVICE int32_t ShiftRight(int32_t a) {  // copies of the sign come in
    return a >> kShift;
  }
};

// exp(x), at most 1 ulp off (0.88 over all floats, and monotone), subnormal results included;
// exp(-inf) = 0, overflow gives inf, NaN stays NaN. x = n ln2 + r, |r| <= ln2 / 2 (Cody-Waite in
// two FMA steps, the rounding of the second put back), exp(r) = 1 + (r + r^2 q(r)) with a minimax q
// (relative error 8e-9), then times 2^n in two halves, of which only the last can round.
template <class Ops>
HOPYARD_HOST_DEVICE typename Ops::F ExpF32(typename Ops::F x) {
  using F = typename Ops::F;
  using I = typename Ops::I;
  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits.
  const F magic = Ops::Set(12582912.0F);
  // exp(-105) rounds to 0 and exp(90) to inf; beyond them n would not fit the exponent trick.
  F v = Ops::Select(Ops::Less(x, Ops::Set(-105.0F)), Ops::Set(-105.0F), x);
  v = Ops::Select(Ops::Less(Ops::Set(90.0F), v), Ops::Set(90.0F), v);
  const F shifted = Ops::Fma(v, Ops::Set(1.44269502F), magic);
  const F n = Ops::Sub(shifted, magic);
  const F exact = Ops::Fma(n, Ops::Set(-0.693147182F), v);
  const F ln2_low = Ops::Set(1.90465421e-09F);
  const F r = Ops::Fma(n, ln2_low, exact);
  const F rounding = Ops::Fma(n, ln2_low, Ops::Sub(exact, r));
  F q = Ops::Set(0.00138070504F);
  q = Ops::Fma(q, r, Ops::Set(0.00836796872F));
  q = Ops::Fma(q, r, Ops::Set(0.0416682251F));
  q = Ops::Fma(q, r, Ops::Set(0.166665226F));
  q = Ops::Fma(q, r, Ops::Set(0.49999994F));
  const F p = Ops::Add(Ops::Set(1.0F), Ops::Add(r, Ops::Fma(q, Ops::Mul(r, r), rounding)));
  const I exponent = Ops::SubInt(Ops::Bits(shifted), Ops::Bits(magic));
  const I half = Ops::template ShiftRight<1>(exponent);
  const I rest = Ops::SubInt(exponent, half);
  const I bias = Ops::SetInt(127);
  const F scale_half = Ops::FromBits(Ops::template ShiftLeft<23>(Ops::AddInt(half, bias)));
  const F scale_rest = Ops::FromBits(Ops::template ShiftLeft<23>(Ops::AddInt(rest, bias)));
  return Ops::Mul(Ops::Mul(p, scale_half), scale_rest);
}

// log(1 + u) for 0 <= u <= 1, at most 1.14 ulp off (over all floats); NaN stays NaN. With s = u /
// (2 + u): log(1 + u) = 2 atanh(s) = u - s (u - s^2 l(s^2)), l minimax.
template <class Ops>
HOPYARD_HOST_DEVICE typename Ops::F Log1pF32(typename Ops::F u) {
  using F = typename Ops::F;
  const F s = Ops::Div(u, Ops::Add(Ops::Set(2.0F), u));
  const F w = Ops::Mul(s, s);
  F l = Ops::Set(0.273187548F);
  l = Ops::Fma(l, w, Ops::Set(0.28159219F));
  l = Ops::Fma(l, w, Ops::Set(0.400104344F));
  l = Ops::Fma(l, w, Ops::Set(0.666666508F));
  const F correction = Ops::Sub(u, Ops::Mul(w, l));
  return Ops::Fma(Ops::Sub(Ops::Set(0.0F), s), correction, u);
}

// -|z|
template <class Ops>
HOPYARD_HOST_DEVICE typename Ops::F NegAbs(typename Ops::F z) {
  return Ops::FromBits(Ops::Xor(Ops::And(Ops::Bits(z), Ops::SetInt(0x7FFFFFFF)),
                                Ops::SetInt(static_cast<int>(1U << 31))));
}

template <class Ops>
HOPYARD_HOST_DEVICE typename Ops::F Sigmoid(typename Ops::F z) {
  using F = typename Ops::F;
  const F one = Ops::Set(1.0F);
  const F e = ExpF32<Ops>(NegAbs<Ops>(z));
  const F numerator = Ops::Select(Ops::Less(z, Ops::Set(0.0F)), e, one);
  return Ops::Div(numerator, Ops::Add(one, e));
}

// sqrt(log(1 + exp(z))). Below -20 it is exp(z / 2) to FP32 precision; there the long way would
// lose what exp(z) loses to underflow.
template <class Ops>
HOPYARD_HOST_DEVICE typename Ops::F SqrtSoftplus(typename Ops::F z) {
  using F = typename Ops::F;
  const F zero = Ops::Set(0.0F);
  const auto tiny = Ops::Less(z, Ops::Set(-20.0F));
  const F e = ExpF32<Ops>(Ops::Select(tiny, Ops::Mul(z, Ops::Set(0.5F)), NegAbs<Ops>(z)));
  const F positive = Ops::Select(Ops::Less(zero, z), z, zero);
  return Ops::Select(tiny, e, Ops::Sqrt(Ops::Add(positive, Log1pF32<Ops>(e))));
}

// exp(z - max) with the rounding error of the difference put back, so that logits one ulp apart
// keep their order. z == max gives 1 whatever max is (also +inf and -inf); NaN gives 0.
template <class Ops>
HOPYARD_HOST_DEVICE typename Ops::F SoftmaxTerm(typename Ops::F z, typename Ops::F max) {
  using F = typename Ops::F;
  const F hi = Ops::Sub(z, max);
  // TwoSum of z and -max.
  const F virtual_max = Ops::Sub(z, hi);
  const F virtual_z = Ops::Add(hi, virtual_max);
  const F lo = Ops::Add(Ops::Sub(z, virtual_z), Ops::Sub(virtual_max, max));
  const F e = ExpF32<Ops>(hi);
  F term = Ops::Fma(e, lo, e);
  // exp underflows to 0 below -104; there hi may be -inf and lo NaN.
  term = Ops::Select(Ops::Less(hi, Ops::Set(-104.0F)), Ops::Set(0.0F), term);
  term = Ops::Select(Ops::Equal(z, max), Ops::Set(1.0F), term);
  return Ops::Select(Ops::IsNan(z), Ops::Set(0.0F), term);
}

// Signed integer that orders like the float: -inf < ... < -0 < +0 < ... < +inf; NaN is smallest.
template <class Ops>
HOPYARD_HOST_DEVICE typename Ops::I OrderKey(typename Ops::F score) {
  using I = typename Ops::I;
  const I bits = Ops::Bits(score);
  const I key =
      Ops::Xor(bits, Ops::And(Ops::template ShiftRight<31>(bits), Ops::SetInt(0x7FFFFFFF)));
  return Ops::SelectInt(Ops::IsNan(score), Ops::SetInt(static_cast<int>(1U << 31)), key);
}

// Inverse of OrderKey (a NaN comes back as one).
HOPYARD_HOST_DEVICE float FromOrderKey(int32_t key) {
  return ScalarOps::FromBits(key ^ ((key >> 31) & 0x7FFFFFFF));
}

// The halving tree over the partial sums: 16, 8, 4, 2, 1.
HOPYARD_HOST_DEVICE float ReduceLanes(float* lanes) {
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] = ScalarOps::Add(lanes[i], lanes[i + width]);
    }
  }
  return lanes[0];
}

}  // namespace hopyard::route
