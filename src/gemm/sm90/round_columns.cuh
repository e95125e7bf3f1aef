// SPDX-License-Identifier: Apache-2.0
// Rows to a GEMM's operand, 8 consecutive columns a lane: a warp covers 256, half a warp a group of
// 128, 4 lanes a block of 32 and 2 lanes a block of 16. Values become codes of the format (two
// words of e4m3, one of nibbles), codes become elements, and lanes of a group exchange words where
// the order along K scatters a lane's columns. Used by the pass that rounds rows and by GEMM1
// itself.
#pragma once

#include <cstdint>

#include "device/sm90/numbers.cuh"
#include "device/sm90/warp.cuh"
#include "formats/codes.h"
#include "formats/scale_rules.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

inline constexpr int kLaneCols = 8;

// 8 columns: BF16 pairs, or e4m3 codes in the first two words, or nibbles in the first.
struct LaneWords {
  uint32_t w[4] = {};
};

// x / divisor for many x of 8 significant bits. The reciprocal is rounded once; one step with the
// remainder then gives the rounded quotient, or its neighbour where the true one lies within 2^-22
// last places of their midpoint, and there no e4m3 code changes (tried on the host: every BF16 x
// with every block scale, and with random divisors). Divisors near the ends of the exponent range
// take the division.
struct Divider {
  float divisor = 1.0F;
  float reciprocal = 1.0F;
  bool stepwise = false;

  __device__ __forceinline__ static Divider Of(float divisor) {
    return {divisor, __frcp_rn(divisor), divisor >= 0x1p-90F && divisor <= 0x1p100F};
  }
  // Precondition: stepwise.
  __device__ __forceinline__ float Step(float x) const {
    const float quotient = __fmul_rn(x, reciprocal);
    // Signed so that a zero quotient keeps its sign.
    const float excess = __fmaf_rn(divisor, quotient, -x);
    const float better = __fmaf_rn(-reciprocal, excess, quotient);
    // Infinity and NaN have no remainder.
    return fabsf(quotient) < 0x1p20F ? better : quotient;
  }
};

// What all blocks of a row share.
struct RowScale {
  float g = 1.0F;        // kNvFp4
  float divisor = 1.0F;  // kFp8PerTensor, kFp8PerRow
};

__device__ __forceinline__ float ValueAt(const LaneWords& values, int i) {
  const uint32_t word = values.w[i / 2];
  return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xFFFF0000U);
}

// Largest magnitude of this lane's values as FP32 bits: BF16 patterns order like the numbers.
__device__ __forceinline__ uint32_t LaneMaxAbsBits(const LaneWords& values) {
  constexpr uint32_t kMagnitudes = 0x7FFF7FFFU;
  const uint32_t pair = __vmaxu2(__vmaxu2(values.w[0] & kMagnitudes, values.w[1] & kMagnitudes),
                                 __vmaxu2(values.w[2] & kMagnitudes, values.w[3] & kMagnitudes));
  return max(pair & 0xFFFF0000U, pair << 16);
}

// Largest over groups of kLanes lanes; every lane takes part.
template <int kLanes>
__device__ __forceinline__ uint32_t GroupMax(uint32_t value) {
#pragma unroll
  for (int width = 1; width < kLanes; width *= 2) {
    value = max(value, __shfl_xor_sync(hopyard::sm90::kAllLanes, value, width));
  }
  return value;
}

// ---- values to codes

// e4m3 codes of scaled(value).
template <class Scaled>
__device__ __forceinline__ LaneWords EncodeColumns(const LaneWords& values, Scaled scaled) {
  LaneWords codes;
#pragma unroll
  for (int i = 0; i < kLaneCols; i += 2) {
    const uint32_t pair =
        hopyard::sm90::EncodeE4m3Pair(scaled(ValueAt(values, i)), scaled(ValueAt(values, i + 1)));
    codes.w[i / 4] |= pair << (8 * (i % 4));
  }
  return codes;
}

__device__ __forceinline__ LaneWords DivideToCodes(const LaneWords& values,
                                                   const Divider& divider) {
  if (divider.stepwise) {
    return EncodeColumns(values, [&](float x) { return divider.Step(x); });
  }
  return EncodeColumns(values, [&](float x) { return __fdiv_rn(x, divider.divisor); });
}

__device__ __forceinline__ LaneWords MultiplyToNibbles(const LaneWords& values, float factor) {
  LaneWords codes;
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) {
    const uint32_t code = formats::EncodeE2m1(__fmul_rn(ValueAt(values, i), factor));
    codes.w[0] |= code << (4 * i);
  }
  return codes;
}

// Codes of the lane's values; in `scale` what its block's values are multiplied with in the output,
// in `divisor` the e4m3 scale of its 128 (kFp8Block1x128). Every lane of the warp takes part.
template <Format kFormat>
__device__ __forceinline__ LaneWords RoundColumns(const LaneWords& values, const RowScale& row,
                                                  float& scale, float& divisor) {
  const uint32_t lane_max = LaneMaxAbsBits(values);
  formats::BlockScale block;
  LaneWords codes;
  divisor = row.divisor;
  if constexpr (kFormat == Format::kFp8PerTensor) {
    codes = DivideToCodes(values, Divider::Of(divisor));
  } else if constexpr (kFormat == Format::kFp8PerRow || kFormat == Format::kFp8Block1x128) {
    if constexpr (kFormat == Format::kFp8Block1x128) {
      divisor = formats::rules::Fp8BlockDivisor(GroupMax<16>(lane_max));
    }
    if (divisor == divisor) {
      codes = DivideToCodes(values, Divider::Of(divisor));
    }
  } else if constexpr (kFormat == Format::kMxFp8) {
    block = formats::rules::MxBlockScale(GroupMax<4>(lane_max), formats::kE4m3Max);
    if (block.factor != 0.0F) {
      codes = EncodeColumns(values, [&](float x) { return __fmul_rn(x, block.factor); });
    }
    scale = block.value;
  } else if constexpr (kFormat == Format::kNvFp4) {
    block = formats::rules::NvFp4BlockScale(GroupMax<2>(lane_max), row.g);
    if (block.factor != 0.0F) {
      codes = MultiplyToNibbles(values, block.factor);
    }
    scale = block.value;
  } else {
    codes = values;
  }
  return codes;
}

// Scales that hold for a whole row, from the static one of the format.
template <Format kFormat>
__device__ __forceinline__ RowScale StaticRowScale(float scale) {
  RowScale row;
  if constexpr (kFormat == Format::kFp8PerTensor) {
    row.divisor = scale;
  } else if constexpr (kFormat == Format::kNvFp4) {
    // No positive multiplier, no numbers.
    row.g = scale > 0.0F ? formats::rules::NvFp4MultiplierOf(scale) : formats::rules::ScaleNan();
  }
  return row;
}

// ---- codes to elements

template <Format kFormat>
__device__ __forceinline__ LaneWords CodesToBf16(const LaneWords& codes, float scale) {
  LaneWords values;
#pragma unroll
  for (int i = 0; i < kLaneCols; i += 2) {
    float2 pair;
    if constexpr (kFormat == Format::kNvFp4) {
      const uint32_t nibbles = codes.w[0] >> (4 * i);
      pair.x = formats::DecodeE2m1(static_cast<uint8_t>(nibbles & 0xFU));
      pair.y = formats::DecodeE2m1(static_cast<uint8_t>((nibbles >> 4) & 0xFU));
    } else {
      pair = hopyard::sm90::DecodeE4m3Pair(codes.w[i / 4] >> (8 * (i % 4)));
    }
    if constexpr (kFormat == Format::kNvFp4 || kFormat == Format::kMxFp8) {
      pair.x = __fmul_rn(pair.x, scale);
      pair.y = __fmul_rn(pair.y, scale);
    }
    values.w[i / 2] = hopyard::sm90::NarrowBf16Pair(pair.x, pair.y);
  }
  return values;
}

// Zeroes the columns from the `left`th on: a block's NaN scale must not reach them.
template <int kBytes>
__device__ __forceinline__ void ClearColumns(int64_t left, LaneWords& words) {
  if (left >= kLaneCols) {
    return;
  }
  constexpr int kPerWord = 4 / kBytes;
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) {
    const uint32_t element = (kBytes == 2 ? 0xFFFFU : 0xFFU) << (8 * kBytes * (i % kPerWord));
    words.w[i / kPerWord] &= i < left ? ~0U : ~element;
  }
}

// ---- writing

template <class T>
__device__ __forceinline__ void StoreWords(uint8_t* to, const T& words) {
  *static_cast<T*>(static_cast<void*>(to)) = words;
}

// Lanes 4 apart hold the quarters q of a group: element t of lane q becomes element q of lane t.
__device__ __forceinline__ void TransposeQuarters(uint32_t (&u)[4]) {
  const int q = hopyard::sm90::LaneId() / 4 % 4;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (q & bit) != 0;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int low = bit == 1 ? 2 * pair : pair;
      const int high = low + bit;
      const uint32_t got =
          __shfl_xor_sync(hopyard::sm90::kAllLanes, upper ? u[low] : u[high], 4 * bit);
      u[low] = upper ? got : u[low];
      u[high] = upper ? u[high] : got;
    }
  }
}

// `group` is the first byte of the row's group of 128; every lane of the warp calls, those with
// `live` write.
__device__ __forceinline__ void StoreBf16Group(uint8_t* group, KOrder order, const LaneWords& v,
                                               bool live) {
  const int q = hopyard::sm90::LaneId() / 4 % 4;
  const int j = hopyard::sm90::LaneId() % 4;
  if (order == KOrder::kBf16Decoded) {
    // Elements e and e + 4 side by side; the four quarters' pairs follow each other.
    uint32_t u[4] = {__byte_perm(v.w[0], v.w[2], 0x5410), __byte_perm(v.w[0], v.w[2], 0x7632),
                     __byte_perm(v.w[1], v.w[3], 0x5410), __byte_perm(v.w[1], v.w[3], 0x7632)};
    TransposeQuarters(u);
    if (live) {
      StoreWords(group + 64 * j + 16 * q, make_uint4(u[0], u[1], u[2], u[3]));
    }
  } else if (live) {
    StoreWords(group + 64 * j + 8 * q, make_uint2(v.w[0], v.w[1]));
    StoreWords(group + 64 * j + 32 + 8 * q, make_uint2(v.w[2], v.w[3]));
  }
}

__device__ __forceinline__ void StoreE4m3Group(uint8_t* group, KOrder order, const LaneWords& v,
                                               bool live) {
  const int q = hopyard::sm90::LaneId() / 4 % 4;
  const int j = hopyard::sm90::LaneId() % 4;
  if (order == KOrder::kFp8Decoded) {
    // Two quarters' words of the same half side by side: one 8-byte store a lane.
    const bool odd = q % 2 == 1;
    const uint32_t got = __shfl_xor_sync(hopyard::sm90::kAllLanes, odd ? v.w[0] : v.w[1], 4);
    if (live) {
      StoreWords(group + 32 * j + (odd ? 16 : 0) + 8 * (q / 2),
                 odd ? make_uint2(got, v.w[1]) : make_uint2(v.w[0], got));
    }
  } else if (live) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t pair = __byte_perm(v.w[0], v.w[1], 0x0040 + 0x11 * e);
      StoreWords(group + 32 * j + 8 * e + 2 * q, static_cast<uint16_t>(pair));
    }
  }
}

}  // namespace hopyard::gemm::sm90
