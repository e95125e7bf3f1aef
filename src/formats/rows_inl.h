// SPDX-License-Identifier: Apache-2.0
// Row operations over a vector type V, for the units of one instruction set each. V lives in the
// unit's anonymous namespace, which gives every instantiation internal linkage: code for a wide
// instruction set cannot be picked by the linker for the rest of the library. For the same reason
// nothing here may call an inline function of the standard library or of another header.
#pragma once

#include <cstdint>

#include "formats/row_kernels.h"
#include "formats/scales.h"

namespace hopyard::formats {

// V provides: kWidth; F, I, M (floats, 32-bit integers, lane mask); Load/Store of floats, bytes,
// 16-bit words and nibbles with a count of at most kWidth (missing lanes load as 0); arithmetic on
// F and I; comparisons to M and Select(m, a, b) = m ? a : b.
template <class V>
struct RowOps {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int64_t kWidth = V::kWidth;

  static constexpr int32_t kMagnitudeMask = 0x7FFFFFFF;
  static constexpr int32_t kInfinity = 0x7F800000;
  static constexpr int32_t kQuietNan = 0x7FC00000;
  static constexpr int32_t kE4m3MaxBits = 0x43E00000;       // 448
  static constexpr int32_t kE2m1MaxBits = 0x40C00000;       // 6
  static constexpr int32_t kFp16OverflowBits = 0x47800000;  // 65536

  template <class Fn>
  static void ForVectors(int64_t n, Fn fn) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      fn(i, kWidth);
    }
    if (i < n) {
      fn(i, n - i);
    }
  }

  static int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

  static I Magnitude(I bits) { return V::And(bits, V::SetI(kMagnitudeMask)); }
  static I Sign(I bits) { return V::AndNot(bits, V::SetI(kMagnitudeMask)); }

  // See codes.h: nearest grid value, ties to even, as exponent field and mantissa.
  template <int kMantissa, int kMinExponent>
  static I RoundToCode(I magnitude) {
    constexpr int kShift = 23 - kMantissa;
    constexpr int32_t kMinNormal = (127 + kMinExponent) << 23;
    constexpr int32_t kMagic = (127 + kMinExponent - kMantissa + 23) << 23;
    const I odd = V::And(V::template ShiftRight<kShift>(magnitude), V::SetI(1));
    const I rounded = V::AddI(V::AddI(magnitude, V::SetI((1 << (kShift - 1)) - 1)), odd);
    const I normal = V::SubI(V::template ShiftRight<kShift>(rounded),
                             V::SetI((126 + kMinExponent) << kMantissa));
    const F magic = V::AsF(V::SetI(kMagic));
    const I subnormal = V::SubI(V::AsI(V::Add(V::AsF(magnitude), magic)), V::SetI(kMagic));
    return V::SelectI(V::LessI(magnitude, V::SetI(kMinNormal)), subnormal, normal);
  }

  // The same as an FP32 magnitude.
  template <int kMantissa, int kMinExponent>
  static I RoundToValue(I magnitude) {
    constexpr int kShift = 23 - kMantissa;
    constexpr int32_t kMinNormal = (127 + kMinExponent) << 23;
    constexpr int32_t kMagic = (127 + kMinExponent - kMantissa + 23) << 23;
    const I odd = V::And(V::template ShiftRight<kShift>(magnitude), V::SetI(1));
    const I rounded = V::AddI(V::AddI(magnitude, V::SetI((1 << (kShift - 1)) - 1)), odd);
    const I normal = V::And(rounded, V::SetI(-(1 << kShift)));
    const F magic = V::AsF(V::SetI(kMagic));
    const I subnormal = V::AsI(V::Sub(V::Add(V::AsF(magnitude), magic), magic));
    return V::SelectI(V::LessI(magnitude, V::SetI(kMinNormal)), subnormal, normal);
  }

  static I E4m3Code(F value) {
    const I bits = V::AsI(value);
    const I magnitude = Magnitude(bits);
    const I code = RoundToCode<3, -6>(V::MinI(magnitude, V::SetI(kE4m3MaxBits)));
    const I signed_code = V::Or(code, V::template ShiftRight<24>(Sign(bits)));
    return V::SelectI(V::LessI(V::SetI(kInfinity), magnitude), V::SetI(0x7F), signed_code);
  }

  static F E4m3Rounded(F value) {
    const I bits = V::AsI(value);
    const I magnitude = Magnitude(bits);
    const I rounded = RoundToValue<3, -6>(V::MinI(magnitude, V::SetI(kE4m3MaxBits)));
    const I result = V::SelectI(V::LessI(V::SetI(kInfinity), magnitude), V::SetI(kQuietNan),
                                V::Or(rounded, Sign(bits)));
    return V::AsF(result);
  }

  static F E4m3Value(I code) {
    const I magnitude = V::And(code, V::SetI(0x7F));
    const I sign = V::template ShiftLeft<24>(V::SubI(code, magnitude));
    const I normal = V::AddI(V::template ShiftLeft<20>(magnitude), V::SetI(120 << 23));
    const I subnormal = V::AsI(V::Mul(V::ToF(magnitude), V::SetF(0x1p-9F)));
    const I number = V::SelectI(V::LessI(magnitude, V::SetI(8)), subnormal, normal);
    const I value = V::SelectI(V::LessI(V::SetI(0x7E), magnitude), V::SetI(kQuietNan), number);
    return V::AsF(V::Or(value, sign));
  }

  static I E2m1Code(F value) {
    const I bits = V::AsI(value);
    const I magnitude = Magnitude(bits);
    const I code = RoundToCode<1, 0>(V::MinI(magnitude, V::SetI(kE2m1MaxBits)));
    const I signed_code = V::Or(code, V::template ShiftRight<28>(Sign(bits)));
    return V::SelectI(V::LessI(V::SetI(kInfinity), magnitude), V::SetI(0), signed_code);
  }

  static F E2m1Rounded(F value) {
    const I bits = V::AsI(value);
    const I magnitude = Magnitude(bits);
    const I rounded = RoundToValue<1, 0>(V::MinI(magnitude, V::SetI(kE2m1MaxBits)));
    const I result =
        V::SelectI(V::LessI(V::SetI(kInfinity), magnitude), V::SetI(0), V::Or(rounded, Sign(bits)));
    return V::AsF(result);
  }

  static I Bf16Code(F value) {
    const I bits = V::AsI(value);
    const I high = V::template ShiftRight<16>(bits);
    const I odd = V::And(high, V::SetI(1));
    const I rounded = V::AddI(V::AddI(bits, V::SetI(0x7FFF)), odd);
    return V::SelectI(V::LessI(V::SetI(kInfinity), Magnitude(bits)), V::Or(high, V::SetI(0x40)),
                      V::template ShiftRight<16>(rounded));
  }

  static I Fp16Code(F value) {
    const I bits = V::AsI(value);
    const I magnitude = Magnitude(bits);
    const I code = RoundToCode<10, -14>(V::MinI(magnitude, V::SetI(kFp16OverflowBits)));
    const I payload = V::And(V::template ShiftRight<13>(magnitude), V::SetI(0x3FF));
    const I nan = V::Or(payload, V::SetI(0x7E00));
    return V::Or(V::SelectI(V::LessI(V::SetI(kInfinity), magnitude), nan, code),
                 V::template ShiftRight<16>(Sign(bits)));
  }

  static F Fp16Value(I code) {
    const I magnitude = V::And(code, V::SetI(0x7FFF));
    const I sign = V::template ShiftLeft<16>(V::SubI(code, magnitude));
    const I shifted = V::template ShiftLeft<13>(magnitude);
    const I normal = V::AddI(shifted, V::SetI(112 << 23));
    const I subnormal = V::AsI(V::Mul(V::ToF(magnitude), V::SetF(0x1p-24F)));
    const I number = V::SelectI(V::LessI(magnitude, V::SetI(0x400)), subnormal, normal);
    const I infinite = V::Or(shifted, V::SetI(kInfinity));
    const I special = V::SelectI(V::LessI(V::SetI(0x7C00), magnitude),
                                 V::Or(infinite, V::SetI(kQuietNan)), infinite);
    return V::AsF(V::Or(V::SelectI(V::LessI(V::SetI(0x7BFF), magnitude), special, number), sign));
  }

  static uint32_t MaxAbsBits(const float* in, int64_t n) {
    I result = V::SetI(0);
    ForVectors(n, [&](int64_t i, int64_t count) {
      result = V::MaxI(result, Magnitude(V::AsI(V::LoadF(in + i, count))));
    });
    return static_cast<uint32_t>(V::ReduceMaxI(result));
  }

  static void Bf16ToFloatRow(const uint16_t* in, float* out, int64_t n) {
    ForVectors(n, [&](int64_t i, int64_t count) {
      const I bits = V::template ShiftLeft<16>(V::LoadWords(in + i, count));
      V::StoreF(out + i, V::AsF(bits), count);
    });
  }

  static void FloatToBf16Row(const float* in, uint16_t* out, int64_t n) {
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreWords(out + i, Bf16Code(V::LoadF(in + i, count)), count);
    });
  }

  static void Fp16ToFloatRow(const uint16_t* in, float* out, int64_t n) {
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreF(out + i, Fp16Value(V::LoadWords(in + i, count)), count);
    });
  }

  static void FloatToFp16Row(const float* in, uint16_t* out, int64_t n) {
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreWords(out + i, Fp16Code(V::LoadF(in + i, count)), count);
    });
  }

  static void EncodeFp8Divide(const float* in, uint8_t* codes, int64_t n, float divisor) {
    const F d = V::SetF(divisor);
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreBytes(codes + i, E4m3Code(V::Div(V::LoadF(in + i, count), d)), count);
    });
  }

  static void EncodeFp8Multiply(const float* in, uint8_t* codes, int64_t n, float multiplier) {
    const F m = V::SetF(multiplier);
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreBytes(codes + i, E4m3Code(V::Mul(V::LoadF(in + i, count), m)), count);
    });
  }

  static void DecodeFp8(const uint8_t* codes, float* out, int64_t n, float scale) {
    const F s = V::SetF(scale);
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreF(out + i, V::Mul(E4m3Value(V::LoadBytes(codes + i, count)), s), count);
    });
  }

  static void EncodeE2m1(const float* in, uint8_t* codes, int64_t n, float factor) {
    if (factor == 0.0F) {
      ForVectors(
          n, [&](int64_t i, int64_t count) { V::StoreNibbles(codes + i / 2, V::SetI(0), count); });
      return;
    }
    const F f = V::SetF(factor);
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreNibbles(codes + i / 2, E2m1Code(V::Mul(V::LoadF(in + i, count), f)), count);
    });
  }

  static void EncodeMxFp8(const float* in, uint8_t* codes, uint8_t* scales, int64_t n) {
    for (int64_t i = 0; i < n; i += kMxBlock) {
      const int64_t length = Least(kMxBlock, n - i);
      const BlockScale scale = MxBlockScale(MaxAbsBits(in + i, length), 448.0F);
      scales[i / kMxBlock] = scale.code;
      if (scale.factor == 0.0F) {
        ForVectors(length, [&](int64_t j, int64_t count) {
          V::StoreBytes(codes + i + j, V::SetI(0), count);
        });
      } else {
        EncodeFp8Multiply(in + i, codes + i, length, scale.factor);
      }
    }
  }

  static void EncodeMxFp4(const float* in, uint8_t* codes, uint8_t* scales, int64_t n) {
    for (int64_t i = 0; i < n; i += kMxBlock) {
      const int64_t length = Least(kMxBlock, n - i);
      const BlockScale scale = MxBlockScale(MaxAbsBits(in + i, length), 6.0F);
      scales[i / kMxBlock] = scale.code;
      EncodeE2m1(in + i, codes + i / 2, length, scale.factor);
    }
  }

  static void EncodeNvFp4(const float* in, uint8_t* codes, uint8_t* scales, int64_t n, float g) {
    for (int64_t i = 0; i < n; i += kNvFp4Block) {
      const int64_t length = Least(kNvFp4Block, n - i);
      const BlockScale scale = NvFp4BlockScale(MaxAbsBits(in + i, length), g);
      scales[i / kNvFp4Block] = scale.code;
      EncodeE2m1(in + i, codes + i / 2, length, scale.factor);
    }
  }

  static void EncodeInt4(const float* in, uint8_t* codes, int64_t n, float divisor) {
    const F d = V::SetF(divisor);
    ForVectors(n, [&](int64_t i, int64_t count) {
      const F quotient = V::Div(V::LoadF(in + i, count), d);
      const F clamped = V::Max(V::Min(quotient, V::SetF(7.0F)), V::SetF(-8.0F));
      V::StoreNibbles(codes + i / 2, V::And(V::ToI(clamped), V::SetI(0xF)), count);
    });
  }

  static void EncodeMxInt4(const float* in, uint8_t* codes, uint16_t* scales, int64_t n) {
    for (int64_t i = 0; i < n; i += kMxBlock) {
      const int64_t length = Least(kMxBlock, n - i);
      if (MaxAbsBits(in + i, length) >= kNonFiniteBits) {
        scales[i / kMxBlock] = 0x7FC0;
        EncodeE2m1(in + i, codes + i / 2, length, 0.0F);
        continue;
      }
      const F first = V::SetF(in[i]);
      F max = first;
      F min = first;
      ForVectors(length, [&](int64_t j, int64_t count) {
        // Missing lanes repeat the first element.
        const F x = V::LoadOr(in + i + j, count, first);
        max = V::Max(max, x);
        min = V::Min(min, x);
      });
      const Int4Scale scale = Int4BlockScale(V::ReduceMax(max), V::ReduceMin(min));
      scales[i / kMxBlock] = scale.code;
      EncodeInt4(in + i, codes + i / 2, length, scale.divisor);
    }
  }

  static void DecodeMxFp8(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kMxBlock) {
      DecodeFp8(codes + i, out + i, Least(kMxBlock, n - i), MxScaleValue(scales[i / kMxBlock]));
    }
  }

  static void DecodeMxFp4(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kMxBlock) {
      const F s = V::SetF(MxScaleValue(scales[i / kMxBlock]));
      ForVectors(Least(kMxBlock, n - i), [&](int64_t j, int64_t count) {
        const F value = V::E2m1Value(V::LoadNibbles(codes + (i + j) / 2, count));
        V::StoreF(out + i + j, V::Mul(value, s), count);
      });
    }
  }

  static void DecodeNvFp4(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n,
                          float global_scale) {
    const F global = V::SetF(global_scale);
    for (int64_t i = 0; i < n; i += kNvFp4Block) {
      const F s = V::SetF(NvFp4ScaleValue(scales[i / kNvFp4Block]));
      ForVectors(Least(kNvFp4Block, n - i), [&](int64_t j, int64_t count) {
        const F value = V::E2m1Value(V::LoadNibbles(codes + (i + j) / 2, count));
        V::StoreF(out + i + j, V::Mul(V::Mul(value, s), global), count);
      });
    }
  }

  static void DecodeMxInt4(const uint8_t* codes, const uint16_t* scales, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kMxBlock) {
      const F s = V::SetF(Int4ScaleValue(scales[i / kMxBlock]));
      ForVectors(Least(kMxBlock, n - i), [&](int64_t j, int64_t count) {
        const I nibble = V::LoadNibbles(codes + (i + j) / 2, count);
        const I value = V::SubI(V::Xor(nibble, V::SetI(8)), V::SetI(8));
        V::StoreF(out + i + j, V::Mul(V::ToF(value), s), count);
      });
    }
  }

  static void RoundBf16Row(const float* in, float* out, int64_t n) {
    ForVectors(n, [&](int64_t i, int64_t count) {
      const I code = Bf16Code(V::LoadF(in + i, count));
      V::StoreF(out + i, V::AsF(V::template ShiftLeft<16>(code)), count);
    });
  }

  static void RoundFp8(const float* in, float* out, int64_t n, float divisor) {
    const F d = V::SetF(divisor);
    ForVectors(n, [&](int64_t i, int64_t count) {
      V::StoreF(out + i, V::Mul(E4m3Rounded(V::Div(V::LoadF(in + i, count), d)), d), count);
    });
  }

  static void Fill(float* out, int64_t n, float value) {
    ForVectors(n, [&](int64_t i, int64_t count) { V::StoreF(out + i, V::SetF(value), count); });
  }

  static void RoundMxFp8(const float* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kMxBlock) {
      const int64_t length = Least(kMxBlock, n - i);
      const BlockScale scale = MxBlockScale(MaxAbsBits(in + i, length), 448.0F);
      if (scale.factor == 0.0F) {
        Fill(out + i, length, 0.0F * scale.value);
        continue;
      }
      const F factor = V::SetF(scale.factor);
      const F value = V::SetF(scale.value);
      ForVectors(length, [&](int64_t j, int64_t count) {
        const F rounded = E4m3Rounded(V::Mul(V::LoadF(in + i + j, count), factor));
        V::StoreF(out + i + j, V::Mul(rounded, value), count);
      });
    }
  }

  static void RoundNvFp4(const float* in, float* out, int64_t n, float g, float global_scale) {
    const F global = V::SetF(global_scale);
    for (int64_t i = 0; i < n; i += kNvFp4Block) {
      const int64_t length = Least(kNvFp4Block, n - i);
      const BlockScale scale = NvFp4BlockScale(MaxAbsBits(in + i, length), g);
      if (scale.factor == 0.0F) {
        Fill(out + i, length, (0.0F * scale.value) * global_scale);
        continue;
      }
      const F factor = V::SetF(scale.factor);
      const F value = V::SetF(scale.value);
      ForVectors(length, [&](int64_t j, int64_t count) {
        const F rounded = E2m1Rounded(V::Mul(V::LoadF(in + i + j, count), factor));
        V::StoreF(out + i + j, V::Mul(V::Mul(rounded, value), global), count);
      });
    }
  }

  static constexpr RowKernels kKernels = {
      .max_abs_bits = MaxAbsBits,
      .bf16_to_float = Bf16ToFloatRow,
      .float_to_bf16 = FloatToBf16Row,
      .fp16_to_float = Fp16ToFloatRow,
      .float_to_fp16 = FloatToFp16Row,
      .encode_fp8_divide = EncodeFp8Divide,
      .encode_fp8_multiply = EncodeFp8Multiply,
      .decode_fp8 = DecodeFp8,
      .encode_mxfp8 = EncodeMxFp8,
      .encode_mxfp4 = EncodeMxFp4,
      .encode_nvfp4 = EncodeNvFp4,
      .encode_mxint4 = EncodeMxInt4,
      .decode_mxfp8 = DecodeMxFp8,
      .decode_mxfp4 = DecodeMxFp4,
      .decode_nvfp4 = DecodeNvFp4,
      .decode_mxint4 = DecodeMxInt4,
      .round_bf16 = RoundBf16Row,
      .round_fp8 = RoundFp8,
      .round_mxfp8 = RoundMxFp8,
      .round_nvfp4 = RoundNvFp4,
  };
};

}  // namespace hopyard::formats
