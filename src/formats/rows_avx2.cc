// SPDX-License-Identifier: Apache-2.0
#include "formats/rows_inl.h"

#if defined(__AVX2__)
#include <cstring>

#include <immintrin.h>

namespace hopyard::formats {
namespace {

struct Vector256 {
  static constexpr int64_t kWidth = 8;
  using F = __m256;
  using I = __m256i;
  using M = __m256i;

  static F SetF(float value) { return _mm256_set1_ps(value); }
  static I SetI(int32_t value) { return _mm256_set1_epi32(value); }
  static I AsI(F value) { return _mm256_castps_si256(value); }
  static F AsF(I value) { return _mm256_castsi256_ps(value); }

  static I Lanes(int64_t count) {
    return LessI(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), SetI(static_cast<int32_t>(count)));
  }
  static F LoadF(const float* p, int64_t count) {
    return count == kWidth ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, Lanes(count));
  }
  static F LoadOr(const float* p, int64_t count, F other) {
    return _mm256_blendv_ps(other, LoadF(p, count), AsF(Lanes(count)));
  }
  static void StoreF(float* p, F value, int64_t count) {
    if (count == kWidth) {
      _mm256_storeu_ps(p, value);
    } else {
      _mm256_maskstore_ps(p, Lanes(count), value);
    }
  }
  static I LoadBytes(const uint8_t* p, int64_t count) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, p, static_cast<size_t>(count));
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
  }
  // Lanes hold at most 16 significant bits.
  static __m128i ToWords(I value) {
    return _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  }
  static void StoreBytes(uint8_t* p, I value, int64_t count) {
    const __m128i words = ToWords(value);
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    std::memcpy(p, &bytes, static_cast<size_t>(count));
  }
  static I LoadWords(const uint16_t* p, int64_t count) {
    __m128i words = _mm_setzero_si128();
    std::memcpy(&words, p, static_cast<size_t>(count) * sizeof(uint16_t));
    return _mm256_cvtepu16_epi32(words);
  }
  static void StoreWords(uint16_t* p, I value, int64_t count) {
    const __m128i words = ToWords(value);
    std::memcpy(p, &words, static_cast<size_t>(count) * sizeof(uint16_t));
  }
  // A byte fills a 64-bit lane: its low nibble is the even element's 32 bits, the high one the
  // odd's.
  static I LoadNibbles(const uint8_t* p, int64_t count) {
    uint32_t bytes = 0;
    std::memcpy(&bytes, p, static_cast<size_t>(count / 2));
    const I wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(static_cast<int32_t>(bytes)));
    return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi64(wide, 28)), SetI(0xF));
  }
  static void StoreNibbles(uint8_t* p, I value, int64_t count) {
    const I merged = _mm256_or_si256(value, _mm256_srli_epi64(value, 28));
    // Byte 0 of each 64-bit lane, two per half.
    const I gathered = _mm256_shuffle_epi8(
        merged, _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                 -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m128i both =
        _mm_or_si128(_mm256_castsi256_si128(gathered), _mm256_extracti128_si256(gathered, 1));
    const int32_t bytes = _mm_cvtsi128_si32(both);
    std::memcpy(p, &bytes, static_cast<size_t>(count / 2));
  }
  static F E2m1Value(I nibble) {
    const F table = _mm256_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F);
    const I sign = ShiftLeft<28>(And(nibble, SetI(8)));
    // The permutation looks at the low three bits of an index only.
    return AsF(Or(AsI(_mm256_permutevar8x32_ps(table, nibble)), sign));
  }

  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F ToF(I a) { return _mm256_cvtepi32_ps(a); }
  static I ToI(F a) { return _mm256_cvtps_epi32(a); }

  static I AddI(I a, I b) { return _mm256_add_epi32(a, b); }
  static I SubI(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I MinI(I a, I b) { return _mm256_min_epi32(a, b); }
  static I MaxI(I a, I b) { return _mm256_max_epi32(a, b); }
  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I AndNot(I a, I b) { return _mm256_andnot_si256(b, a); }  // a & ~b
  static I Or(I a, I b) { return _mm256_or_si256(a, b); }
  static I Xor(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int kBits>
  static I ShiftLeft(I a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I ShiftRight(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static M LessI(I a, I b) { return _mm256_cmpgt_epi32(b, a); }
  static I SelectI(M mask, I a, I b) { return _mm256_blendv_epi8(b, a, mask); }

  static int32_t ReduceMaxI(I a) {
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
  }
  static float ReduceMax(F a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 0x55)));
  }
  static float ReduceMin(F a) {
    const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(two, _mm_shuffle_ps(two, two, 0x55)));
  }
};

}  // namespace

const RowKernels* Avx2RowKernels() {
  return &RowOps<Vector256>::kKernels;
}

}  // namespace hopyard::formats

#else

namespace hopyard::formats {

const RowKernels* Avx2RowKernels() {
  return nullptr;
}

}  // namespace hopyard::formats

#endif
