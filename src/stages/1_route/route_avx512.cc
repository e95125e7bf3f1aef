// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)

#include <immintrin.h>

#include "stages/1_route/route_inl.h"

namespace hopyard::route {
namespace {

struct Avx512Ops {
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;
  static constexpr int kLanes = 16;

  static F Set(float a) { return _mm512_set1_ps(a); }
  static I SetInt(int32_t a) { return _mm512_set1_epi32(a); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static I LoadInt(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void StoreInt(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static F LoadBf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return FromBits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F LoadFp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Sqrt(F a) { return _mm512_sqrt_ps(a); }
  static I Bits(F a) { return _mm512_castps_si512(a); }
  static F FromBits(I a) { return _mm512_castsi512_ps(a); }
  static M Less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M Equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M IsNan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static M GreaterInt(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static F Select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static I SelectInt(M m, I a, I b) { return _mm512_mask_blend_epi32(m, b, a); }
  static uint32_t MaskBits(M m) { return m; }
  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  static I Xor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I AddInt(I a, I b) { return _mm512_add_epi32(a, b); }
  static I SubInt(I a, I b) { return _mm512_sub_epi32(a, b); }
  template <int kShift>
  static I ShiftLeft(I a) {
    return _mm512_slli_epi32(a, kShift);
  }
  template <int kShift>
  static I ShiftRight(I a) {
    return _mm512_srai_epi32(a, kShift);
  }
};

}  // namespace

void RouteRowAvx512(const RowProblem& problem, int64_t token, Slots& slots) {
  RouteRow<Avx512Ops>(problem, token, slots);
}

}  // namespace hopyard::route

#endif
