// SPDX-License-Identifier: Apache-2.0
// The 16-lane vector in portable C++: the definition that the other vectors equal bit for bit.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats/codes.h"

namespace hopyard::gemm::cpu::scalar {

struct V {
  float lane[16];

  // Register tile: rows x tokens.
  static constexpr int kRows = 4;
  static constexpr int kTokens = 1;
  static constexpr bool kGathers = false;

  template <class Fn>
  static V Map(Fn&& fn) {
    V v;
    for (int i = 0; i < 16; ++i) {
      v.lane[i] = fn(i);
    }
    return v;
  }
  static V Zero() {
    return Map([](int) { return 0.0F; });
  }
  static V Set(float x) {
    return Map([x](int) { return x; });
  }
  static V Load(const float* p) {
    V v;
    std::memcpy(v.lane, p, sizeof(v.lane));
    return v;
  }
  void Store(float* p) const { std::memcpy(p, lane, sizeof(lane)); }

  static V LoadBf16(const void* codes) {
    uint16_t bits[16];
    std::memcpy(bits, codes, sizeof(bits));
    return Map([&](int i) { return formats::DecodeBf16(bits[i]); });
  }
  static V LoadE4m3(const void* codes) {
    const auto* bytes = static_cast<const uint8_t*>(codes);
    return Map([&](int i) { return formats::DecodeE4m3(bytes[i]); });
  }
  static V LoadE2m1(const void* codes) {
    const auto* bytes = static_cast<const uint8_t*>(codes);
    return Map([&](int i) {
      return formats::DecodeE2m1(static_cast<uint8_t>((bytes[i / 2] >> (4 * (i % 2))) & 15));
    });
  }
  static V LoadInt4(const void* codes) {
    const auto* bytes = static_cast<const uint8_t*>(codes);
    return Map([&](int i) {
      return formats::DecodeInt4(static_cast<uint8_t>((bytes[i / 2] >> (4 * (i % 2))) & 15));
    });
  }

  static V Fma(const V& a, const V& b, const V& c) {
    return Map([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  friend V operator+(const V& a, const V& b) {
    return Map([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  friend V operator-(const V& a, const V& b) {
    return Map([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  friend V operator*(const V& a, const V& b) {
    return Map([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  friend V operator/(const V& a, const V& b) {
    return Map([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  // The second operand where they do not compare (NaN), as x86 does.
  static V Min(const V& a, const V& b) {
    return Map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static V Max(const V& a, const V& b) {
    return Map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static V Abs(const V& a) {
    return Map([&](int i) { return std::fabs(a.lane[i]); });
  }
  // Magnitude of a (>= 0) with the sign of b.
  static V CopySign(const V& a, const V& b) {
    return Map([&](int i) { return std::copysign(a.lane[i], b.lane[i]); });
  }
  // a < b ? x : y
  static V Less(const V& a, const V& b, const V& x, const V& y) {
    return Map([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static V Round(const V& a) {
    return Map([&](int i) { return std::nearbyintf(a.lane[i]); });
  }
  // 2^n for integral n in -126 .. 127.
  static V Exp2(const V& n) {
    return Map([&](int i) {
      const float value = n.lane[i];
      const int32_t exponent =
          value >= -126.0F && value <= 127.0F ? static_cast<int32_t>(value) : 0;
      return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
    });
  }
  [[nodiscard]] float Sum() const {
    float s[16];
    std::memcpy(s, lane, sizeof(s));
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        s[i] += s[i + half];
      }
    }
    return s[0];
  }
};

}  // namespace hopyard::gemm::cpu::scalar
