// SPDX-License-Identifier: Apache-2.0
// The definition of every row operation, one element at a time.
#include <algorithm>
#include <bit>
#include <cmath>

#include "formats/codes.h"
#include "formats/row_kernels.h"
#include "formats/scales.h"

namespace hopyard::formats {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

uint32_t MaxAbsBits(const float* in, int64_t n) {
  uint32_t result = 0;
  for (int64_t i = 0; i < n; ++i) {
    result = std::max(result, std::bit_cast<uint32_t>(in[i]) & 0x7FFFFFFFU);
  }
  return result;
}

// Calls fn(block, begin, length) for the blocks of a row, the last one possibly partial.
template <class Fn>
void ForBlocks(int64_t n, int64_t block, Fn fn) {
  for (int64_t begin = 0; begin < n; begin += block) {
    fn(begin / block, begin, std::min(block, n - begin));
  }
}

void PutNibble(uint8_t* codes, int64_t i, uint32_t nibble) {
  uint8_t& byte = codes[i / 2];
  byte = static_cast<uint8_t>(i % 2 == 0 ? nibble : (byte | (nibble << 4)));
}

uint8_t GetNibble(const uint8_t* codes, int64_t i) {
  return static_cast<uint8_t>(i % 2 == 0 ? codes[i / 2] & 0xFU : codes[i / 2] >> 4);
}

void Bf16ToFloatRow(const uint16_t* in, float* out, int64_t n) {
  std::transform(in, in + n, out, DecodeBf16);
}

void FloatToBf16Row(const float* in, uint16_t* out, int64_t n) {
  std::transform(in, in + n, out, EncodeBf16);
}

void Fp16ToFloatRow(const uint16_t* in, float* out, int64_t n) {
  std::transform(in, in + n, out, DecodeFp16);
}

void FloatToFp16Row(const float* in, uint16_t* out, int64_t n) {
  std::transform(in, in + n, out, EncodeFp16);
}

void EncodeFp8Divide(const float* in, uint8_t* codes, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = EncodeE4m3(in[i] / divisor);
  }
}

void EncodeFp8Multiply(const float* in, uint8_t* codes, int64_t n, float multiplier) {
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = EncodeE4m3(in[i] * multiplier);
  }
}

void DecodeFp8(const uint8_t* codes, float* out, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = DecodeE4m3(codes[i]) * scale;
  }
}

void EncodeMxFp8(const float* in, uint8_t* codes, uint8_t* scales, int64_t n) {
  ForBlocks(n, kMxBlock, [&](int64_t block, int64_t begin, int64_t length) {
    const BlockScale scale = MxBlockScale(MaxAbsBits(in + begin, length), kE4m3Max);
    scales[block] = scale.code;
    for (int64_t i = begin; i < begin + length; ++i) {
      codes[i] = scale.factor == 0.0F ? uint8_t{0} : EncodeE4m3(in[i] * scale.factor);
    }
  });
}

void EncodeE2m1Block(const float* in, uint8_t* codes, int64_t length, float factor) {
  for (int64_t i = 0; i < length; ++i) {
    PutNibble(codes, i, factor == 0.0F ? 0U : EncodeE2m1(in[i] * factor));
  }
}

void EncodeMxFp4(const float* in, uint8_t* codes, uint8_t* scales, int64_t n) {
  ForBlocks(n, kMxBlock, [&](int64_t block, int64_t begin, int64_t length) {
    const BlockScale scale = MxBlockScale(MaxAbsBits(in + begin, length), kE2m1Max);
    scales[block] = scale.code;
    EncodeE2m1Block(in + begin, codes + begin / 2, length, scale.factor);
  });
}

void EncodeNvFp4(const float* in, uint8_t* codes, uint8_t* scales, int64_t n, float g) {
  ForBlocks(n, kNvFp4Block, [&](int64_t block, int64_t begin, int64_t length) {
    const BlockScale scale = NvFp4BlockScale(MaxAbsBits(in + begin, length), g);
    scales[block] = scale.code;
    EncodeE2m1Block(in + begin, codes + begin / 2, length, scale.factor);
  });
}

void EncodeMxInt4(const float* in, uint8_t* codes, uint16_t* scales, int64_t n) {
  ForBlocks(n, kMxBlock, [&](int64_t block, int64_t begin, int64_t length) {
    const bool finite = MaxAbsBits(in + begin, length) < kNonFiniteBits;
    const auto [min, max] = std::minmax_element(in + begin, in + begin + length);
    const Int4Scale scale = finite ? Int4BlockScale(*max, *min) : Int4Scale{EncodeBf16(kNan), 1.0F};
    scales[block] = scale.code;
    for (int64_t i = begin; i < begin + length; ++i) {
      const float q =
          finite ? std::clamp(std::nearbyint(in[i] / scale.divisor), -8.0F, 7.0F) : 0.0F;
      PutNibble(codes, i, static_cast<uint32_t>(static_cast<int32_t>(q)) & 0xFU);
    }
  });
}

void DecodeMxFp8(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = DecodeE4m3(codes[i]) * DecodeE8m0(scales[i / kMxBlock]);
  }
}

void DecodeMxFp4(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = DecodeE2m1(GetNibble(codes, i)) * DecodeE8m0(scales[i / kMxBlock]);
  }
}

void DecodeNvFp4(const uint8_t* codes, const uint8_t* scales, float* out, int64_t n,
                 float global_scale) {
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = DecodeE2m1(GetNibble(codes, i)) * DecodeE4m3(scales[i / kNvFp4Block]);
    out[i] = scaled * global_scale;
  }
}

void DecodeMxInt4(const uint8_t* codes, const uint16_t* scales, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = DecodeInt4(GetNibble(codes, i)) * DecodeBf16(scales[i / kMxBlock]);
  }
}

void RoundBf16Row(const float* in, float* out, int64_t n) {
  std::transform(in, in + n, out, RoundToBf16);
}

void RoundFp8(const float* in, float* out, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = DecodeE4m3(EncodeE4m3(in[i] / divisor)) * divisor;
  }
}

void RoundMxFp8(const float* in, float* out, int64_t n) {
  ForBlocks(n, kMxBlock, [&](int64_t /*block*/, int64_t begin, int64_t length) {
    const BlockScale scale = MxBlockScale(MaxAbsBits(in + begin, length), kE4m3Max);
    for (int64_t i = begin; i < begin + length; ++i) {
      const uint8_t code = scale.factor == 0.0F ? uint8_t{0} : EncodeE4m3(in[i] * scale.factor);
      out[i] = DecodeE4m3(code) * scale.value;
    }
  });
}

void RoundNvFp4(const float* in, float* out, int64_t n, float g, float global_scale) {
  ForBlocks(n, kNvFp4Block, [&](int64_t /*block*/, int64_t begin, int64_t length) {
    const BlockScale scale = NvFp4BlockScale(MaxAbsBits(in + begin, length), g);
    for (int64_t i = begin; i < begin + length; ++i) {
      const uint8_t code = scale.factor == 0.0F ? uint8_t{0} : EncodeE2m1(in[i] * scale.factor);
      out[i] = (DecodeE2m1(code) * scale.value) * global_scale;
    }
  });
}

}  // namespace

const RowKernels* ScalarRowKernels() {
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
  return &kKernels;
}

}  // namespace hopyard::formats
