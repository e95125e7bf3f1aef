// SPDX-License-Identifier: Apache-2.0
// 16 columns x 8 k of 2-byte elements, transposed in AVX2 registers. A template on the vector type,
// so that each instruction set's translation unit has its own.
#pragma once

#include <cstdint>

#include <immintrin.h>

#include "gemm/cpu/dot.h"

namespace hopyard::gemm::cpu {

// 16 elements of one k. With step 2 the 32 elements around them are read, none beyond the last.
template <class V>
inline __m256i LoadColumns(const uint8_t* source, int step, int offset) {
  const auto load = [](const uint8_t* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(static_cast<const void*>(p)));
  };
  if (step == 1) {
    return load(source);
  }
  const uint8_t* even = source - offset * int64_t{sizeof(uint16_t)};
  __m256i low = load(even);
  __m256i high = load(even + sizeof(__m256i));
  if (offset == 0) {
    low = _mm256_slli_epi32(low, 16);
    high = _mm256_slli_epi32(high, 16);
  }
  low = _mm256_srli_epi32(low, 16);
  high = _mm256_srli_epi32(high, 16);
  // Packing works per 128-bit lane; the permutation restores the order.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
}

template <class V>
inline void GatherBlock(const uint8_t* source, const GatherArgs& args, uint16_t* out) {
  __m256i a[8];
  __m256i b[8];
  for (int64_t i = 0; i < 8; ++i) {
    a[i] = LoadColumns<V>(source + i * args.stride, args.step, args.offset);
  }
  // Three rounds of interleaving; the low lane holds columns 0..7, the high lane 8..15.
  for (int64_t i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  for (int64_t half = 0; half < 8; half += 4) {
    for (int64_t i = 0; i < 2; ++i) {
      a[half + 2 * i] = _mm256_unpacklo_epi32(b[half + i], b[half + 2 + i]);
      a[half + 2 * i + 1] = _mm256_unpackhi_epi32(b[half + i], b[half + 2 + i]);
    }
  }
  for (int64_t i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_epi64(a[i], a[i + 4]);
    b[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 4]);
  }
  const auto store = [&](int64_t column, __m128i values) {
    _mm_storeu_si128(static_cast<__m128i*>(static_cast<void*>(out + column * args.pitch)), values);
  };
  for (int64_t i = 0; i < 8; ++i) {
    store(i, _mm256_castsi256_si128(b[i]));
    store(i + 8, _mm256_extracti128_si256(b[i], 1));
  }
}

}  // namespace hopyard::gemm::cpu
