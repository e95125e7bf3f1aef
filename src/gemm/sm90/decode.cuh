// SPDX-License-Identifier: Apache-2.0
// Weight codes in shared memory -> the A registers of a matrix instruction. Lane l of a warp owns
// rows l / 4 and l / 4 + 8 of the warp's 16 and, of every 128 of K, the 32 contiguous codes
// 32 * (l % 4) .. + 31 (k_order.h). Values are exact in the operand's type but for MXINT4 (one
// rounding of code x scale to BF16), for what lies 14 octaves below a row's largest MXFP4 block
// (kMxFp4AsFp8), and for kNvFp4AsFp8, which rounds code x scale to e4m3.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "gemm/packed_order.h"
#include "gemm/sm90/config.h"

namespace hopyard::gemm::sm90 {

// Products are BF16 x 2 with one rounding; subnormal operands count (PTX ISA, mul.bf16x2).
__device__ __forceinline__ uint32_t MulBf16x2(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ uint32_t AddBf16x2(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
// (a & mask) | b.
__device__ __forceinline__ uint32_t AndOr(uint32_t a, uint32_t mask, uint32_t b) {
  return (a & mask) | b;
}

// (a & mask) ^ b.
__device__ __forceinline__ uint32_t AndXor(uint32_t a, uint32_t mask, uint32_t b) {
  return (a & mask) ^ b;
}

__device__ __forceinline__ uint32_t Twice(uint32_t bf16) {
  return bf16 | bf16 << 16;
}

// Two BF16 values with the same exponent.
constexpr uint32_t PowerBf16x2(int exponent) {
  const auto bits = static_cast<uint32_t>(exponent + 127) << 7;
  return bits | bits << 16;
}

inline constexpr uint32_t kNanBf16x2 = 0x7FC07FC0U;

// NVFP4 block scales are decoded 2^118 times too large: an e2m1 code's bits moved into a BF16 are
// 2^-126 of its value, and 2^126 x 448 would overflow. What is left of the two, 2^8, is the row's.
inline constexpr float kNvFp4RowFactor = 256.0F;

// Bytes of e2m1 magnitudes as e4m3, for scales 2^d with d from kFp8TableMin to 6, 8 a row. Below
// -8 the small ones round to nearest even; at -13 all are 0.
inline constexpr int kFp8TableMin = -13;
inline constexpr int kFp8TableRows = 6 - kFp8TableMin + 1;

// e4m3 code, ties to even, of a magnitude up to 384 in units of 2^-20.
constexpr uint8_t EncodeE4m3Units(int64_t units) {
  // The step of subnormals is 2^-9 = 2^11 units; codes 8 .. 15 of each octave continue them.
  int shift = 11;
  while ((units >> shift) >= 16) {
    ++shift;
  }
  int64_t kept = units >> shift;
  const int64_t rest = units - (kept << shift);
  const int64_t half = int64_t{1} << (shift - 1);
  kept += rest > half || (rest == half && kept % 2 == 1) ? 1 : 0;
  return static_cast<uint8_t>((shift - 11) * 8 + kept);
}

struct Fp8Table {
  uint8_t codes[kFp8TableRows][8];
};
constexpr Fp8Table MakeFp8Table() {
  constexpr int kTwice[8] = {0, 1, 2, 3, 4, 6, 8, 12};  // e2m1 magnitudes x 2
  Fp8Table table{};
  for (int row = 0; row < kFp8TableRows; ++row) {
    for (int i = 0; i < 8; ++i) {
      table.codes[row][i] = EncodeE4m3Units(int64_t{kTwice[i]} << (row + kFp8TableMin + 19));
    }
  }
  return table;
}

// What a lane's 32 codes of a row are multiplied by.
struct BlockFactor {
  uint32_t first;   // BF16 x 2 of codes 0 .. 15; FP8: table of magnitudes 0 .. 3
  uint32_t second;  // of codes 16 .. 31; magnitudes 4 .. 7
  // kNvFp4AsFp8: the table of codes 16 .. 31.
  uint32_t third = 0;
  uint32_t fourth = 0;
};

// e4m3 codes, NaN included, of two bytes -> FP16 x 2.
__device__ __forceinline__ uint32_t WidenE4m3Pair(uint32_t codes) {
  uint32_t halves = 0;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  return halves;
}
__device__ __forceinline__ uint32_t MulF16x2(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
// e2m1 magnitudes 2 * i and 2 * i + 1 x `scale` (FP16 x 2), to e4m3 with ties to even. Products of
// e2m1 and e4m3 numbers are exact in FP16.
__device__ __forceinline__ uint32_t ScaledPair(uint32_t magnitudes, uint32_t scale) {
  uint16_t codes = 0;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(codes) : "r"(MulF16x2(magnitudes, scale)));
  return codes;
}
// The table of magnitudes for a block's scale; where that is NaN all are.
__device__ __forceinline__ uint2 ScaledTable(uint32_t scale) {
  constexpr uint32_t kPairs[4] = {0x38000000U, 0x3E003C00U, 0x42004000U, 0x46004400U};  // FP16 x 2
  return {ScaledPair(kPairs[0], scale) | ScaledPair(kPairs[1], scale) << 16,
          ScaledPair(kPairs[2], scale) | ScaledPair(kPairs[3], scale) << 16};
}

// e4m3 code -> FP32, NaN included.
__device__ __forceinline__ float WidenE4m3(uint32_t code) {
  const uint32_t halves = WidenE4m3Pair(code & 0xFFU);
  float value = 0.0F;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(halves & 0xFFFFU)));
  return value;
}

// What `scale` says, the bits of this lane's 32 codes: a byte, or two of NVFP4 or one of two bytes.
// `row_exponent` and `table` (shared memory) are for FP8 products.
template <Family kFamily>
__device__ __forceinline__ BlockFactor PrepareScale(uint32_t scale, int row_exponent,
                                                    uint32_t table) {
  if constexpr (kFamily == Family::kMxFp4AsFp8) {
    int row = static_cast<int>(scale) - row_exponent - kFp8TableMin;
    row = row < 0 ? 0 : (row < kFp8TableRows ? row : kFp8TableRows - 1);
    BlockFactor factor;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(factor.first), "=r"(factor.second)
                 : "r"(table + 8 * static_cast<uint32_t>(row)));
    return factor;
  } else if constexpr (kFamily == Family::kNvFp4AsFp8) {
    // Relative to the row's power of two: 2^(127 - row_exponent) as FP16, whose bias is 15.
    const uint32_t power = static_cast<uint32_t>(127 + 15 - row_exponent) << 10;
    const uint32_t relative = MulF16x2(WidenE4m3Pair(scale), Twice(power));
    // Only blocks of zeros may have more than 60; infinity would make NaN of them.
    uint32_t both = 0;
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(both) : "r"(relative), "r"(Twice(0x5380U)));
    const uint2 low = ScaledTable(__byte_perm(both, 0, 0x1010));
    const uint2 high = ScaledTable(__byte_perm(both, 0, 0x3232));
    return {low.x, low.y, high.x, high.y};
  } else if constexpr (kFamily == Family::kNvFp4AsBf16) {
    const auto widened = [](uint32_t code) {
      return Twice(__float_as_uint(WidenE4m3(code) * 0x1p118F) >> 16);
    };
    return {widened(scale), widened(scale >> 8)};
  } else if constexpr (kFamily == Family::kMxInt4AsBf16) {
    return {Twice(scale), Twice(scale)};
  } else if constexpr (ScaleBytes(kFamily) == 4) {
    // e8m0: 2^(b - 127); 0 is subnormal and 255 NaN, both by the top mantissa bit.
    const uint32_t bits = scale << 7 | (scale == 0 || scale == 255 ? 0x40U : 0U);
    return {Twice(bits), Twice(bits)};
  } else {
    return {0, 0};
  }
}

// Codes `pair` and `pair` + 4 of the 8 in `low` (packed 4-bit codes) or in `low` and `high` (8-bit
// codes), as BF16 x 2 before the scale.
template <Family kFamily>
__device__ __forceinline__ uint32_t SpreadPair(uint32_t low, uint32_t high, int pair) {
  constexpr uint32_t kSigns = 0x80008000U;
  if constexpr (kFamily == Family::kMxInt4AsBf16) {
    // 128 + (code + 8) as BF16, less 136.
    const uint32_t biased = ((low >> (4 * pair)) & 0x000F000FU) ^ 0x43084308U;
    return AddBf16x2(biased, 0xC308C308U);
  } else if constexpr (WeightRowBytes(kFamily) == 64) {
    // Exponent and mantissa bits go to bits 8 .. 6 of each half, the sign to bit 15: 2^-126 of the
    // value. A multiplication moves the code to both places; the units that shift are busier than
    // those that multiply.
    const uint32_t codes = (pair < 2 ? low : low >> 8) & 0x000F000FU << (4 * (pair % 2));
    return codes * (pair % 2 == 0 ? (1U << 12 | 1U << 6) : (1U << 8 | 1U << 2)) & 0x81C081C0U;
  } else {
    // Byte `pair` of both words to the top of each half; 4 bits down: 2^-120 of the value.
    const auto nibble = static_cast<uint32_t>(pair);
    const uint32_t selector = nibble | nibble << 4 | (4 + nibble) << 8 | (4 + nibble) << 12;
    const uint32_t codes = __byte_perm(low, high, selector);
    return AndOr(codes >> 4, 0x07F007F0U, codes & kSigns);
  }
}

template <Family kFamily>
__device__ __forceinline__ uint32_t ScalePair(uint32_t pair, uint32_t scale) {
  if constexpr (kFamily == Family::kMxFp4AsBf16) {
    return MulBf16x2(MulBf16x2(pair, PowerBf16x2(126)), scale);
  } else if constexpr (kFamily == Family::kMxFp8AsBf16) {
    return MulBf16x2(MulBf16x2(pair, PowerBf16x2(120)), scale);
  } else if constexpr (kFamily == Family::kFp8AsBf16) {
    return MulBf16x2(pair, PowerBf16x2(120));
  } else {
    return MulBf16x2(pair, scale);
  }
}

// Bit 7 of every byte that holds an e4m3 NaN, beside bits that mean nothing.
__device__ __forceinline__ uint32_t NanMarks(uint32_t codes) {
  return (codes & 0x7F7F7F7FU) + 0x01010101U;
}

__device__ __forceinline__ uint4 LoadWords(uint32_t shared) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(shared));
  return words;
}

// Instructions of a stage, K / 16 or K / 32.
template <Family kFamily>
inline constexpr int kSteps = BlockK(kFamily) / (IsFp8Math(kFamily) ? 32 : 16);

// Where in a tile this lane's 32 codes of its first row are, as one value: the compiler would keep
// its parts.
template <Family kFamily, bool kPacked>
__device__ __forceinline__ uint32_t PlaceOfCodes() {
  const uint32_t thread = threadIdx.x % 128;
  const uint32_t row = thread / 32 * 16 + thread % 32 / 4;
  const uint32_t quarter = thread % 4;
  uint32_t place = row * WeightRowBytes(kFamily) + quarter * (WeightRowBytes(kFamily) / 4);
  if constexpr (kPacked) {
    place = quarter / 2 * static_cast<uint32_t>(kPackedHalfBytes) +
            static_cast<uint32_t>(PackedRowInHalf(row, quarter / 2)) + quarter % 2 * 16;
  }
  asm volatile("mov.u32 %0, %0;" : "+r"(place));
  return place;
}
// Bytes from there to its second row, 8 further.
template <Family kFamily, bool kPacked>
constexpr uint32_t kToSecondRow = 8 * (kPacked ? static_cast<uint32_t>(kPackedHalfRowBytes)
                                               : uint32_t{WeightRowBytes(kFamily)});

// This lane's 32 codes of row `h` = 0 or 1, which begin at `at` in shared memory, into
// a[step][2 * i + h].
template <Family kFamily>
__device__ __forceinline__ void DecodeRow(uint32_t at, int h, const BlockFactor& scale,
                                          uint32_t (&a)[kSteps<kFamily>][4]) {
  if constexpr (WeightRowBytes(kFamily) == 128) {
    // Odd rows read their second half first, so that the lanes of a quad group meet no bank twice.
    const uint32_t odd = threadIdx.x / 4 % 2 * 16;
    const uint4 one = LoadWords(at + odd);
    const uint4 other = LoadWords(at + (odd ^ 16U));
    const uint4 low = odd != 0 ? other : one;
    const uint4 high = odd != 0 ? one : other;
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t marks = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      marks |= NanMarks(words[2 * j]) | NanMarks(words[2 * j + 1]);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        a[2 * j + pair / 2][2 * (pair % 2) + h] = ScalePair<kFamily>(
            SpreadPair<kFamily>(words[2 * j], words[2 * j + 1], pair), scale.first);
      }
    }
    // A NaN code comes out as 480. It spoils the row's sum with every token, wherever it stands in
    // K: one for all of the lane's codes does.
    uint32_t& last = a[kSteps<kFamily> - 1][2 + h];
    last = (marks & 0x80808080U) != 0 ? kNanBf16x2 : last;
    asm volatile("" : "+r"(last));  // here, not behind the fence of the products (C7519)
  } else {
    const uint4 codes = LoadWords(at);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (IsFp8Math(kFamily)) {
        // Four magnitudes by table, the sign of each from bit 3 of its nibble.
        const bool other = kFamily == Family::kNvFp4AsFp8 && j >= 2;
        const uint32_t low = other ? scale.third : scale.first;
        const uint32_t high = other ? scale.fourth : scale.second;
        const uint32_t selector = words[j] & 0x77777777U;
        const uint32_t even = words[j] << 4;
        a[j][h] = AndXor(__byte_perm(even, words[j], 0x5140), 0x80808080U,
                         __byte_perm(low, high, selector));
        a[j][2 + h] = AndXor(__byte_perm(even, words[j], 0x7362), 0x80808080U,
                             __byte_perm(low, high, selector >> 16));
      } else {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          a[2 * j + pair / 2][2 * (pair % 2) + h] = ScalePair<kFamily>(
              SpreadPair<kFamily>(words[j], 0, pair), j < 2 ? scale.first : scale.second);
        }
      }
    }
  }
}

}  // namespace hopyard::gemm::sm90
