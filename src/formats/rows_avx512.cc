// SPDX-License-Identifier: Apache-2.0
#include "formats/rows_inl.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's avx512fintrin.h initialises its "undefined" vectors with themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace hopyard::formats {
namespace {

struct Vector512 {
  static constexpr int64_t kWidth = 16;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static M Lanes(int64_t count) { return static_cast<M>((1U << count) - 1U); }
  static __mmask8 Bytes(int64_t count) { return static_cast<__mmask8>((1U << count) - 1U); }

  static F SetF(float value) { return _mm512_set1_ps(value); }
  static I SetI(int32_t value) { return _mm512_set1_epi32(value); }
  static I AsI(F value) { return _mm512_castps_si512(value); }
  static F AsF(I value) { return _mm512_castsi512_ps(value); }

  static F LoadF(const float* p, int64_t count) {
    return count == kWidth ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(Lanes(count), p);
  }
  static F LoadOr(const float* p, int64_t count, F other) {
    return _mm512_mask_loadu_ps(other, Lanes(count), p);
  }
  static void StoreF(float* p, F value, int64_t count) {
    if (count == kWidth) {
      _mm512_storeu_ps(p, value);
    } else {
      _mm512_mask_storeu_ps(p, Lanes(count), value);
    }
  }
  static I LoadBytes(const uint8_t* p, int64_t count) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(Lanes(count), p));
  }
  static void StoreBytes(uint8_t* p, I value, int64_t count) {
    _mm512_mask_cvtepi32_storeu_epi8(p, Lanes(count), value);
  }
  static I LoadWords(const uint16_t* p, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(Lanes(count), p));
  }
  static void StoreWords(uint16_t* p, I value, int64_t count) {
    if (count == kWidth) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(value));
    } else {
      _mm512_mask_cvtepi32_storeu_epi16(p, Lanes(count), value);
    }
  }
  // A byte fills a 64-bit lane: its low nibble is the even element's 32 bits, the high one the
  // odd's.
  static I LoadNibbles(const uint8_t* p, int64_t count) {
    const I wide = _mm512_cvtepu8_epi64(_mm_maskz_loadu_epi8(Lanes(count / 2), p));
    return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi64(wide, 28)), SetI(0xF));
  }
  static void StoreNibbles(uint8_t* p, I value, int64_t count) {
    const I merged = _mm512_or_si512(value, _mm512_srli_epi64(value, 28));
    _mm512_mask_cvtepi64_storeu_epi8(p, Bytes(count / 2), merged);
  }
  static F E2m1Value(I nibble) {
    const F table = _mm512_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F, -0.0F, -0.5F,
                                   -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F);
    return _mm512_permutexvar_ps(nibble, table);
  }

  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F ToF(I a) { return _mm512_cvtepi32_ps(a); }
  static I ToI(F a) { return _mm512_cvtps_epi32(a); }

  static I AddI(I a, I b) { return _mm512_add_epi32(a, b); }
  static I SubI(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I MinI(I a, I b) { return _mm512_min_epi32(a, b); }
  static I MaxI(I a, I b) { return _mm512_max_epi32(a, b); }
  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  static I AndNot(I a, I b) { return _mm512_andnot_si512(b, a); }  // a & ~b
  static I Or(I a, I b) { return _mm512_or_si512(a, b); }
  static I Xor(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int kBits>
  static I ShiftLeft(I a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I ShiftRight(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static M LessI(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
  static I SelectI(M mask, I a, I b) { return _mm512_mask_blend_epi32(mask, b, a); }

  static int32_t ReduceMaxI(I a) { return _mm512_reduce_max_epi32(a); }
  static float ReduceMax(F a) { return _mm512_reduce_max_ps(a); }
  static float ReduceMin(F a) { return _mm512_reduce_min_ps(a); }
};

}  // namespace

const RowKernels* Avx512RowKernels() {
  return &RowOps<Vector512>::kKernels;
}

}  // namespace hopyard::formats

#else

namespace hopyard::formats {

const RowKernels* Avx512RowKernels() {
  return nullptr;
}

}  // namespace hopyard::formats

#endif
