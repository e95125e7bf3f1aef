// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)

#include <immintrin.h>

#include "stages/1_route/route_inl.h"

namespace hopyard::route {
namespace {

struct Avx2Ops {
  using F = __m256;
  using I = __m256i;
  using M = __m256;  // all ones or all zeros per lane
  static constexpr int kLanes = 8;

  static F Set(float a) { return _mm256_set1_ps(a); }
  static I SetInt(int32_t a) { return _mm256_set1_epi32(a); }
  static F Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static I LoadInt(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void StoreInt(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static F LoadBf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return FromBits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F LoadFp16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Sqrt(F a) { return _mm256_sqrt_ps(a); }
  static I Bits(F a) { return _mm256_castps_si256(a); }
  static F FromBits(I a) { return _mm256_castsi256_ps(a); }
  static M Less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static M Equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static M IsNan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static M GreaterInt(I a, I b) { return FromBits(_mm256_cmpgt_epi32(a, b)); }
  static F Select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static I SelectInt(M m, I a, I b) { return Bits(Select(m, FromBits(a), FromBits(b))); }
  static uint32_t MaskBits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I Xor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I AddInt(I a, I b) { return _mm256_add_epi32(a, b); }
  static I SubInt(I a, I b) { return _mm256_sub_epi32(a, b); }
  template <int kShift>
  static I ShiftLeft(I a) {
    return _mm256_slli_epi32(a, kShift);
  }
  template <int kShift>
  static I ShiftRight(I a) {
    return _mm256_srai_epi32(a, kShift);
  }
};

}  // namespace

void RouteRowAvx2(const RowProblem& problem, int64_t token, Slots& slots) {
  RouteRow<Avx2Ops>(problem, token, slots);
}

}  // namespace hopyard::route

#endif
