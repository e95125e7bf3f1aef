// SPDX-License-Identifier: Apache-2.0
// Each activation once, over any vector type with the operations of src/gemm/cpu/vec_*.h. The
// oracle (layer_ref) has its own, written from the formulas of docs/numerics.md. NaN inputs give
// NaN: clamps name the variable second, which Min and Max return when they cannot compare.
#pragma once

#include "hopyard/spec.h"

#include "core/host_device.h"

namespace hopyard::activation {

// e^x, relative error below 2e-7; arguments beyond the finite range are clamped to its ends.
template <class V>
HOPYARD_HOST_DEVICE V Exp(V x) {
  const V clamped = V::Min(V::Set(88.0F), V::Max(V::Set(-87.0F), x));
  const V n = V::Round(clamped * V::Set(1.44269504F));
  // ln 2 in two parts; n * high is exact for |n| < 2^9.
  V r = V::Fma(n, V::Set(-0.693359375F), clamped);
  r = V::Fma(n, V::Set(2.12194440e-4F), r);
  // Taylor to r^7; |r| <= ln(2) / 2, so the first omitted term is below 6e-9.
  V p = V::Set(1.0F / 5040.0F);
  p = V::Fma(p, r, V::Set(1.0F / 720.0F));
  p = V::Fma(p, r, V::Set(1.0F / 120.0F));
  p = V::Fma(p, r, V::Set(1.0F / 24.0F));
  p = V::Fma(p, r, V::Set(1.0F / 6.0F));
  p = V::Fma(p, r, V::Set(0.5F));
  p = V::Fma(p, r, V::Set(1.0F));
  p = V::Fma(p, r, V::Set(1.0F));
  return p * V::Exp2(n);
}

template <class V>
HOPYARD_HOST_DEVICE V Sigmoid(V x) {
  const V one = V::Set(1.0F);
  return one / (one + Exp(V::Zero() - x));
}

// Odd series below 1/4 (first omitted term 62 x^9 / 2835 < 3e-7 relative), exponentials above.
template <class V>
HOPYARD_HOST_DEVICE V Tanh(V x) {
  const V one = V::Set(1.0F);
  const V size = V::Abs(x);
  const V e = Exp(size * V::Set(-2.0F));
  const V large = V::CopySign((one - e) / (one + e), x);
  const V s = x * x;
  V p = V::Set(-17.0F / 315.0F);
  p = V::Fma(p, s, V::Set(2.0F / 15.0F));
  p = V::Fma(p, s, V::Set(-1.0F / 3.0F));
  const V small = V::Fma(x * s, p, x);
  return V::Less(size, V::Set(0.25F), small, large);
}

// Gaussian CDF 0.5 erfc(-x / sqrt 2), by a Chebyshev fit of erfc whose relative error is below
// 1.2e-7 everywhere (W. Press et al., Numerical Recipes, 6.2).
template <class V>
HOPYARD_HOST_DEVICE V Phi(V x) {
  const V z = V::Abs(x) * V::Set(0.70710678F);
  const V t = V::Set(1.0F) / V::Fma(z, V::Set(0.5F), V::Set(1.0F));
  constexpr float kCoefficients[] = {0.17087277F, -0.82215223F, 1.48851587F, -1.13520398F,
                                     0.27886807F, -0.18628806F, 0.09678418F, 0.37409196F,
                                     1.00002368F, -1.26551223F};
  V p = V::Set(kCoefficients[0]);
  for (int i = 1; i < 10; ++i) {
    p = V::Fma(p, t, V::Set(kCoefficients[i]));
  }
  const V tail = t * V::Set(0.5F) * Exp(V::Fma(V::Zero() - z, z, p));
  return V::Less(x, V::Zero(), tail, V::Set(1.0F) - tail);
}

struct Parameters {
  float alpha = 1.0F;
  float beta = 0.0F;
  float limit = 0.0F;
};

// act(gate, up) of the gated kinds (spec 4.6; `gate` is x1, `up` is x0).
template <class V>
HOPYARD_HOST_DEVICE V Gated(ActivationKind kind, const Parameters& p, V gate, V up) {
  const V limit = V::Set(p.limit);
  const V g = V::Min(limit, gate);
  const V u = V::Max(V::Zero() - limit, V::Min(limit, up));
  switch (kind) {
    case ActivationKind::kSwiGlu:
      return (u + V::Set(p.beta)) * (g * Sigmoid(V::Set(p.alpha) * g));
    case ActivationKind::kGeGlu:
      return up * (gate * Phi(gate));
    case ActivationKind::kGeGluTanh: {
      const V cube = gate * gate * gate;
      const V inner = V::Set(0.7978845608028654F) * V::Fma(V::Set(0.044715F), cube, gate);
      return up * (V::Set(0.5F) * gate * (V::Set(1.0F) + Tanh(inner)));
    }
    default: {  // kSiTu
      const V alpha = V::Set(p.alpha);
      const V beta = V::Set(p.beta);
      return beta * Tanh(u / beta) * (alpha * Tanh(g / alpha)) * Sigmoid(g);
    }
  }
}

template <class V>
HOPYARD_HOST_DEVICE V Plain(ActivationKind kind, V x) {
  switch (kind) {
    case ActivationKind::kRelu2: {
      const V positive = V::Max(V::Zero(), x);
      return positive * positive;
    }
    case ActivationKind::kSilu:
      return x * Sigmoid(x);
    case ActivationKind::kGelu:
      return x * Phi(x);
    default:  // kIdentity
      return x;
  }
}

}  // namespace hopyard::activation
