// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <immintrin.h>

#include "gemm/cpu/gather_avx2.h"

namespace hopyard::gemm::cpu::avx2 {

// 16 lanes as two registers: lanes 0..7 and 8..15.
struct V {
  __m256 lo;
  __m256 hi;

  // 2 x 2 tiles of two registers each: 8 accumulators + 4 weights + 2 activations of 16.
  static constexpr int kRows = 2;
  static constexpr int kTokens = 2;
  static constexpr bool kGathers = true;
  static void Gather8(const uint8_t* source, const GatherArgs& args, uint16_t* out) {
    GatherBlock<V>(source, args, out);
  }

  static V Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static V Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static V Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void Store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }

  static __m256 WidenBf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static V LoadBf16(const void* codes) {
    const auto* p = static_cast<const __m128i*>(codes);
    return {WidenBf16(_mm_loadu_si128(p)), WidenBf16(_mm_loadu_si128(p + 1))};
  }
  // As in vec_avx512.h: through fp16 bits, exact for subnormals, NaN codes kept.
  static __m256 DecodeE4m3(__m128i w) {
    const __m128i magnitude = _mm_and_si128(w, _mm_set1_epi16(0x7F));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(w, _mm_set1_epi16(0x80)), 8);
    const __m128i half = _mm_or_si128(_mm_slli_epi16(magnitude, 7), sign);
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F));
    const __m128i fixed = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7E00)));
    return _mm256_mul_ps(_mm256_cvtph_ps(fixed), _mm256_set1_ps(256.0F));
  }
  static V LoadE4m3(const void* codes) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(codes));
    return {DecodeE4m3(_mm_cvtepu8_epi16(bytes)),
            DecodeE4m3(_mm_cvtepu8_epi16(_mm_srli_si128(bytes, 8)))};
  }
  // The 16 nibbles of 8 bytes as bytes, in order.
  static __m128i Nibbles(const void* codes) {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(codes));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return _mm_unpacklo_epi8(low, high);
  }
  static V Signed8(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static V LoadE2m1(const void* codes) {
    // Twice the magnitudes are integers; halving is exact. Zero loses its sign here, which no sum
    // can see: fma(+-0, x, acc) differs only when acc is -0, and accumulators start at +0.
    const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    const V v = Signed8(_mm_shuffle_epi8(twice, Nibbles(codes)));
    return v * Set(0.5F);
  }
  static V LoadInt4(const void* codes) {
    const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return Signed8(_mm_shuffle_epi8(table, Nibbles(codes)));
  }

  static V Fma(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  friend V operator+(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  friend V operator-(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  friend V operator*(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  friend V operator/(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static V Min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static V Max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static V Abs(V a) {
    const __m256 sign = _mm256_set1_ps(-0.0F);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
  }
  static V CopySign(V a, V b) {
    const __m256 sign = _mm256_set1_ps(-0.0F);
    return {_mm256_or_ps(a.lo, _mm256_and_ps(b.lo, sign)),
            _mm256_or_ps(a.hi, _mm256_and_ps(b.hi, sign))};
  }
  static V Less(V a, V b, V x, V y) {
    return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
  }
  static V Round(V a) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
  }
  static __m256 Exp2Half(__m256 n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  }
  static V Exp2(V n) { return {Exp2Half(n.lo), Exp2Half(n.hi)}; }
  [[nodiscard]] float Sum() const {
    const __m256 a = _mm256_add_ps(lo, hi);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
  }
};

}  // namespace hopyard::gemm::cpu::avx2
