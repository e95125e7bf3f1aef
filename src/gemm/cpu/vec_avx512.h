// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <immintrin.h>

#include "gemm/cpu/gather_avx2.h"

namespace hopyard::gemm::cpu::avx512 {

struct V {
  __m512 v;

  // 24 accumulators + 4 weights + 1 activation + the decode constants fill the 32 registers.
  static constexpr int kRows = 4;
  static constexpr int kTokens = 6;
  static constexpr bool kGathers = true;
  static void Gather8(const uint8_t* source, const GatherArgs& args, uint16_t* out) {
    GatherBlock<V>(source, args, out);
  }

  static V Zero() { return {_mm512_setzero_ps()}; }
  static V Set(float x) { return {_mm512_set1_ps(x)}; }
  static V Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void Store(float* p) const { _mm512_storeu_ps(p, v); }

  static V LoadBf16(const void* codes) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(codes)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  // e4m3 -> fp16 bits with the exponent 8 too small (subnormals included), -> f32, * 2^8: exact.
  // The two NaN codes are masked out of the product.
  static V LoadE4m3(const void* codes) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(codes));
    const __mmask16 number =
        _mm_cmpneq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    // Sign-extended, so that the sign lands on bit 15 together with a copy on bit 14, cleared.
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xBF80)));
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000));
    return {_mm512_mask_mul_ps(nan, number, _mm512_cvtph_ps(half), _mm512_set1_ps(256.0F))};
  }
  // Nibble i of the 8 bytes to lane i; the permutes look at the low 4 bits of an index only.
  static __m512i Nibbles(const void* codes) {
    const auto* words = static_cast<const char*>(codes);
    int32_t low = 0;
    int32_t high = 0;
    __builtin_memcpy(&low, words, 4);
    __builtin_memcpy(&high, words + 4, 4);
    const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xFF00, high);
    const __m512i shifts =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return _mm512_srlv_epi32(both, shifts);
  }
  static V LoadE2m1(const void* codes) {
    const __m512 table = _mm512_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F, -0.0F,
                                        -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F);
    return {_mm512_permutexvar_ps(Nibbles(codes), table)};
  }
  static V LoadInt4(const void* codes) {
    const __m512 table = _mm512_setr_ps(0.0F, 1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F, 7.0F, -8.0F,
                                        -7.0F, -6.0F, -5.0F, -4.0F, -3.0F, -2.0F, -1.0F);
    return {_mm512_permutexvar_ps(Nibbles(codes), table)};
  }

  static V Fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
  static V Min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
  static V Max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
  static V Abs(V a) { return {_mm512_abs_ps(a.v)}; }
  static V CopySign(V a, V b) {
    return {_mm512_or_ps(a.v, _mm512_and_ps(b.v, _mm512_set1_ps(-0.0F)))};
  }
  static V Less(V a, V b, V x, V y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
  static V Round(V a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static V Exp2(V n) {
    const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
  }
  [[nodiscard]] float Sum() const {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
  }
};

}  // namespace hopyard::gemm::cpu::avx512
