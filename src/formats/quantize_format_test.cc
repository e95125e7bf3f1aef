// SPDX-License-Identifier: Apache-2.0
// Quantize and Dequantize of every format: cases worked out by hand from the formats' published
// rules, a slow definition that searches the code tables, zeros, tiny, huge and non-finite data.
#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/quantize.h"

#include "formats/row_kernels.h"

namespace hopyard::formats {
namespace {

using testing::Each;
using testing::ElementsAreArray;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A matrix of floats, quantised.
struct Packed {
  Packed(Format f, int64_t r, int64_t c, ScaleLayout layout = ScaleLayout::kLinear)
      : format(f), rows(r), cols(c), shape(ShapeOf(f, r, c, layout)) {
    codes.resize(static_cast<size_t>(r * shape.code_cols * SizeOf(shape.code_dtype)), 0xEE);
    scales.resize(static_cast<size_t>(shape.scale_numel * SizeOf(shape.scale_dtype)), 0xEE);
    view.format = f;
    view.scale_layout = layout;
    view.codes = TensorView::Contiguous(codes.data(), shape.code_dtype, {r, shape.code_cols});
    if (shape.scale_numel > 0) {
      view.scales = TensorView::Contiguous(scales.data(), shape.scale_dtype, {shape.scale_numel});
    }
  }

  template <class T>
  [[nodiscard]] T Scale(int64_t i) const {
    T value{};
    std::memcpy(&value, scales.data() + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }

  [[nodiscard]] uint8_t Nibble(int64_t i) const {
    return static_cast<uint8_t>((codes[static_cast<size_t>(i / 2)] >> (i % 2 * 4)) & 0xF);
  }

  Format format;
  int64_t rows;
  int64_t cols;
  FormatShape shape;
  std::vector<uint8_t> codes;
  std::vector<uint8_t> scales;
  QuantizedView view;
};

class QuantizeFormatTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > BestIsa()) {
      GTEST_SKIP() << "this machine runs at most " << ToString(BestIsa());
    }
    kernels_ = &KernelsFor(GetParam());
  }

  // Quantises one matrix of floats; `given` is the global scale passed in.
  Packed Run(Format format, int64_t rows, const std::vector<float>& x, float given = 0.0F) {
    const auto cols = static_cast<int64_t>(x.size()) / rows;
    Packed packed(format, rows, cols);
    packed.view.global_scale = given;
    packed.view.global_scale = QuantizeWith(
        *kernels_, TensorView::Contiguous(x.data(), DType::kFloat32, {rows, cols}), packed.view);
    return packed;
  }

  std::vector<float> Decode(const Packed& packed) {
    std::vector<float> out(static_cast<size_t>(packed.rows * packed.cols));
    DequantizeWith(*kernels_, packed.view,
                   TensorView::Contiguous(out.data(), DType::kFloat32, {packed.rows, packed.cols}));
    return out;
  }

  const RowKernels* kernels_ = nullptr;
};

std::vector<float> Padded(std::vector<float> values, size_t n) {
  values.resize(n, 0.0F);
  return values;
}

TEST_P(QuantizeFormatTest, MxFp4ByHand) {
  // amax 6 -> 6/6 = 1 = 2^0, byte 127. Ties: .25 -> 0, .75 -> 1, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
  const Packed packed =
      Run(Format::kMxFp4, 1, Padded({6, -6, 0.25, 0.75, -2.5, 3.5, 5, -0.5, 1.5, -0.2F}, 32));
  EXPECT_EQ(packed.scales[0], 127);
  EXPECT_EQ(packed.codes[0], 0xF7);  // low nibble first: 6 is 7, -6 is 15
  EXPECT_EQ(packed.codes[1], 0x20);
  EXPECT_EQ(packed.codes[2], 0x6C);
  EXPECT_EQ(packed.codes[3], 0x96);
  EXPECT_EQ(packed.codes[4], 0x83);  // -0.2 keeps its sign on a zero
  EXPECT_THAT(Decode(packed),
              ElementsAreArray(Padded({6, -6, 0, 1, -2, 4, 4, -0.5, 1.5, -0.0F}, 32)));
}

TEST_P(QuantizeFormatTest, MxFp4ScaleRoundsUp) {
  const std::vector<std::pair<float, int>> cases = {
      {6.0F, 127},
      {std::nextafter(6.0F, 9.0F), 128},
      {5.9F, 127},
      {3.0F, 126},
      {3.01F, 127},
      {12.0F, 128},
      {1e-8F, 98},  // 1e-8/6 = 1.67e-9, between 2^-30 and 2^-29
      {6.0F * 0x1p-127F, 0},
      {FLT_MAX, 253},
      {1e-45F, 0}};
  for (const auto& [amax, byte] : cases) {
    EXPECT_EQ(Run(Format::kMxFp4, 1, Padded({0, -amax}, 32)).scales[0], byte) << amax;
  }
}

TEST_P(QuantizeFormatTest, MxFp8ByHand) {
  // amax 448 -> byte 127; the next block has amax 449 -> rounded up, 128: values are halved.
  std::vector<float> x = Padded({448, -448, 1, 17, 0x1p-10F, -0x1.8p-9F, 0.3F}, 32);
  x.push_back(449);
  x.push_back(-1);
  const Packed packed = Run(Format::kMxFp8, 1, Padded(x, 64));
  EXPECT_EQ(packed.scales[0], 127);
  EXPECT_EQ(packed.scales[1], 128);
  // 17 lies between 16 and 18: even mantissa is 16 (0x58). 2^-10 is half the smallest: 0. 1.5 *
  // 2^-9 lies between 1 and 2 steps: 2. 0.3 = 1.2 * 2^-2: 1.25 * 2^-2 is 0x2A.
  const std::vector<uint8_t> wanted = {0x7E, 0xFE, 0x38, 0x58, 0x00, 0x82, 0x2A};
  EXPECT_THAT(std::vector<uint8_t>(packed.codes.begin(), packed.codes.begin() + 7),
              ElementsAreArray(wanted));
  EXPECT_EQ(packed.codes[32], 0x76);  // 224.5 -> 224 = 1.75 * 2^7
  EXPECT_EQ(packed.codes[33], 0xB0);  // -0.5
  EXPECT_EQ(Decode(packed)[32], 448.0F);
  EXPECT_EQ(Decode(packed)[33], -1.0F);
}

TEST_P(QuantizeFormatTest, NvFp4ByHand) {
  // amax of the tensor 2688 = 448 * 6 -> g = 1. Block 0: sf = 2688/6 = 448. Block 1: amax 6 ->
  // sf 1.
  std::vector<float> x = Padded({2688, -448, 224, -112}, 16);
  for (const float v : {6.0F, -3.0F, 2.5F, 0.25F, 0.3F, -5.0F}) {
    x.push_back(v);
  }
  const Packed packed = Run(Format::kNvFp4, 1, Padded(x, 32));
  EXPECT_EQ(packed.view.global_scale, 1.0F);
  EXPECT_EQ(packed.scales[0], 0x7E);
  EXPECT_EQ(packed.scales[1], 0x38);
  EXPECT_EQ(packed.codes[0], 0xA7);   // 6, -1
  EXPECT_EQ(packed.codes[1], 0x81);   // 0.5; -0.25 ties to -0
  EXPECT_EQ(packed.codes[8], 0xD7);   // 6, -3
  EXPECT_EQ(packed.codes[9], 0x04);   // 2.5 -> 2, 0.25 -> 0
  EXPECT_EQ(packed.codes[10], 0xE1);  // 0.3 -> 0.5, -5 -> -4
  const std::vector<float> out = Decode(packed);
  EXPECT_EQ(out[0], 2688.0F);
  EXPECT_EQ(out[1], -448.0F);
  EXPECT_EQ(out[17], -3.0F);
}

TEST_P(QuantizeFormatTest, NvFp4TakesAGivenGlobalScale) {
  // m = 1/4: g = 4; amax 3 -> sf = 4 * 3 / 6 = 2; step = 2 / 4 = 0.5: codes of 3 and 1 are 6 and 2.
  const Packed packed = Run(Format::kNvFp4, 1, Padded({3, 1}, 16), 0.25F);
  EXPECT_EQ(packed.view.global_scale, 0.25F);
  EXPECT_EQ(packed.scales[0], 0x40);
  EXPECT_EQ(packed.codes[0], 0x47);
  EXPECT_EQ(Decode(packed)[0], 3.0F);
  // Far too small a scale saturates, it does not wrap or turn to NaN.
  const Packed saturated = Run(Format::kNvFp4, 1, Padded({1e6F, -1e6F}, 16), 1e-6F);
  EXPECT_EQ(saturated.scales[0], 0x7E);
  EXPECT_EQ(saturated.codes[0], 0xF7);
}

TEST_P(QuantizeFormatTest, NvFp4BlockScaleOfZeroGivesZeros) {
  // amax 2688, g = 1: a block of 0.001 has sf = 0.000167, below half of 2^-9.
  std::vector<float> x = Padded({2688}, 16);
  x.resize(32, -0.001F);
  const Packed packed = Run(Format::kNvFp4, 1, x);
  EXPECT_EQ(packed.scales[1], 0);
  EXPECT_THAT(std::vector<uint8_t>(packed.codes.begin() + 8, packed.codes.end()), Each(0));
  EXPECT_EQ(Decode(packed)[20], 0.0F);
}

TEST_P(QuantizeFormatTest, NvFp4ClampsItsFactors) {
  // amax 2^-135: g = FLT_MAX, g * amax / 6 = 0.0013 -> sf = 2^-9, 1 / (sf / g) = 2^137 -> FLT_MAX,
  // 2^-135 * FLT_MAX = 2^-7 -> 0. A zero must not meet an infinity on the way.
  const Packed packed = Run(Format::kNvFp4, 1, Padded({0x1p-135F, -0.0F}, 16));
  EXPECT_EQ(packed.scales[0], 0x01);
  EXPECT_EQ(packed.codes[0], 0x80);
  EXPECT_EQ(packed.view.global_scale, 1.0F / FLT_MAX);
}

TEST_P(QuantizeFormatTest, MxInt4ByHand) {
  // max 7 -> 7 * 8 / 7 = 8 > 4 = -min; s = 1. Ties to even: 2.5 -> 2, 3.5 -> 4, -0.5 -> 0.
  const Packed one = Run(Format::kMxInt4, 1, Padded({7, -4, 2.5, 3.5, -0.5, -1.5, 6.6F}, 32));
  EXPECT_EQ(one.Scale<uint16_t>(0), 0x3F80);
  const std::vector<int> wanted = {7, -4, 2, 4, 0, -2, 7};
  for (size_t i = 0; i < wanted.size(); ++i) {
    EXPECT_EQ(one.Nibble(static_cast<int64_t>(i)), wanted[i] & 0xF) << i;
  }
  // min dominates: a = 16, s = 2: -16 -> -8, 7 -> 3.5 -> 4.
  const Packed two = Run(Format::kMxInt4, 1, Padded({-16, 7}, 32));
  EXPECT_EQ(two.Scale<uint16_t>(0), 0x4000);
  EXPECT_EQ(two.codes[0], 0x48);
  EXPECT_EQ(Decode(two)[0], -16.0F);
  EXPECT_EQ(Decode(two)[1], 8.0F);
  // All negative: the maximum is negative too and must not matter.
  EXPECT_EQ(Run(Format::kMxInt4, 1, std::vector<float>(32, -8.0F)).codes[0], 0x88);
}

TEST_P(QuantizeFormatTest, MxInt4DividesByTheUnroundedScale) {
  // s = 1.00390625 (1 + 2^-8) ties to even in bf16: stored 1. 3.51 / s = 3.4964 -> 3, 3.51 / 1
  // -> 4.
  const Packed packed = Run(Format::kMxInt4, 1, Padded({-8.0F * 1.00390625F, 3.51F}, 32));
  EXPECT_EQ(packed.Scale<uint16_t>(0), 0x3F80);
  EXPECT_EQ(packed.codes[0], 0x38);
}

TEST_P(QuantizeFormatTest, Fp8BlocksByHand) {
  // 1x128: amax 896 -> s = 2, amax 44.8 -> s = 0.1; the third block is partial.
  std::vector<float> x = Padded({896, -2, 3}, 128);
  x.resize(256, 44.8F);
  x.resize(260, 448.0F);
  const Packed packed = Run(Format::kFp8Block1x128, 1, x);
  EXPECT_EQ(packed.shape.scale_cols, 3);
  EXPECT_EQ(packed.Scale<float>(0), 2.0F);
  EXPECT_EQ(packed.Scale<float>(1), 44.8F / 448.0F);
  EXPECT_EQ(packed.Scale<float>(2), 1.0F);
  EXPECT_EQ(packed.codes[0], 0x7E);
  EXPECT_EQ(packed.codes[1], 0xB8);  // -1
  EXPECT_EQ(packed.codes[2], 0x3C);  // 1.5
  EXPECT_EQ(packed.codes[200], 0x7E);
  EXPECT_EQ(packed.codes[259], 0x7E);
}

TEST_P(QuantizeFormatTest, Fp8PerRowByHand) {
  const Packed packed = Run(Format::kFp8PerRow, 2, {896, 1, 2, -4, 0, 0, 0, -0.0F});
  EXPECT_EQ(packed.Scale<float>(0), 2.0F);
  EXPECT_EQ(packed.Scale<float>(1), FLT_MIN);
  EXPECT_THAT(packed.codes, testing::ElementsAre(0x7E, 0x30, 0x38, 0xC0, 0, 0, 0, 0x80));
}

TEST_P(QuantizeFormatTest, Fp8Block128ByHand) {
  // 130 x 140: four blocks with amax 448, 224, 112 and 56.
  std::vector<float> x(size_t{130} * 140, 1.0F);
  x[size_t{127} * 140 + 127] = -448.0F;
  x[size_t{127} * 140 + 128] = 224.0F;
  x[size_t{128} * 140 + 127] = 112.0F;
  x[size_t{129} * 140 + 139] = -56.0F;
  const Packed packed = Run(Format::kFp8Block128, 130, x);
  EXPECT_EQ(packed.shape.scale_rows, 2);
  EXPECT_EQ(packed.shape.scale_cols, 2);
  EXPECT_EQ(packed.Scale<float>(0), 1.0F);
  EXPECT_EQ(packed.Scale<float>(1), 0.5F);
  EXPECT_EQ(packed.Scale<float>(2), 0.25F);
  EXPECT_EQ(packed.Scale<float>(3), 0.125F);
  EXPECT_EQ(packed.codes[0], 0x38);                  // 1
  EXPECT_EQ(packed.codes[139], 0x40);                // 2
  EXPECT_EQ(packed.codes[size_t{128} * 140], 0x48);  // 4
  EXPECT_EQ(packed.codes[size_t{129} * 140 + 139], 0xFE);
  EXPECT_EQ(Decode(packed), x);
}

TEST_P(QuantizeFormatTest, Fp8PerTensorByHand) {
  const Packed dynamic = Run(Format::kFp8PerTensor, 2, {224, 1, -0.5, 0});
  EXPECT_EQ(dynamic.view.global_scale, 0.5F);
  EXPECT_THAT(dynamic.codes, testing::ElementsAre(0x7E, 0x40, 0xB8, 0));
  // Static: value / scale; infinity saturates, NaN is code 0x7F.
  const Packed fixed =
      Run(Format::kFp8PerTensor, 1, {4, kInfinity, -kInfinity, kNan, -1e30F}, 4.0F);
  EXPECT_EQ(fixed.view.global_scale, 4.0F);
  EXPECT_THAT(fixed.codes, testing::ElementsAre(0x38, 0x7E, 0xFE, 0x7F, 0xFE));
  const std::vector<float> out = Decode(fixed);
  EXPECT_EQ(out[1], 1792.0F);
  EXPECT_TRUE(std::isnan(out[3]));
}

TEST_P(QuantizeFormatTest, Bf16AndFp16KeepSpecials) {
  const std::vector<float> x = {1.00390625F, 1.01171875F, kInfinity, -kInfinity,
                                kNan,        70000,       -0.0F};
  const Packed bf16 = Run(Format::kBf16, 1, x, 1.0F);
  const std::vector<float> out = Decode(bf16);
  EXPECT_EQ(out[0], 1.0F);       // tie, even
  EXPECT_EQ(out[1], 1.015625F);  // tie, even
  EXPECT_EQ(out[2], kInfinity);
  EXPECT_TRUE(std::isnan(out[4]));
  const Packed fp16 = Run(Format::kFp16, 1, x, 1.0F);
  EXPECT_EQ(Decode(fp16)[5], kInfinity);
  EXPECT_EQ(Decode(fp16)[0], 1.00390625F);
  EXPECT_TRUE(std::isnan(Decode(fp16)[4]));
}

constexpr std::array<Format, 8> kScaledFormats = {
    Format::kFp8PerTensor, Format::kFp8PerRow, Format::kFp8Block1x128, Format::kFp8Block128,
    Format::kMxFp8,        Format::kMxFp4,     Format::kNvFp4,         Format::kMxInt4};

TEST_P(QuantizeFormatTest, ZerosStayZeros) {
  for (const Format format : kScaledFormats) {
    const Packed packed = Run(format, 3, std::vector<float>(size_t{3} * 64, 0.0F));
    EXPECT_THAT(packed.codes, Each(0)) << ToString(format);
    EXPECT_THAT(Decode(packed), Each(0.0F)) << ToString(format);
    if (format == Format::kMxFp4 || format == Format::kMxFp8 || format == Format::kNvFp4) {
      EXPECT_THAT(packed.scales, Each(0)) << ToString(format);
    }
    if (format == Format::kFp8PerTensor || format == Format::kNvFp4) {
      EXPECT_EQ(packed.view.global_scale, 1.0F);
    }
  }
  EXPECT_EQ(Run(Format::kMxInt4, 1, std::vector<float>(32, 0.0F)).Scale<uint16_t>(0), 0x3F80);
}

// The largest value of a block comes back with the format's relative error at any magnitude at
// which scales are normal numbers, tiny 1e-8 included; beyond, nothing turns to NaN.
TEST_P(QuantizeFormatTest, EveryMagnitude) {
  for (int exponent = -149; exponent < 128; ++exponent) {
    const auto unit = static_cast<float>(std::ldexp(1.0, exponent));
    const float top = std::min(unit * 1.9F, FLT_MAX);
    std::vector<float> x(64);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = (i % 2 == 0 ? 1.0F : -1.0F) * top * (1.0F - static_cast<float>(i) / 80.0F);
    }
    for (const Format format : kScaledFormats) {
      const bool four_bits = ShapeOf(format, 1, 64).code_cols == 32;
      const double relative = four_bits ? 0.34 : 0.07;
      // FP8 codes are at most 448 FLT_MIN below the scale's clamp, bf16 scales and 2^-127
      // underflow.
      const bool normal = exponent > -110 && exponent < 127;
      // 3.8 * 2^126 rounds to 4 * 2^126, which FP32 cannot hold.
      const bool overflows = format == Format::kMxFp4 && exponent == 127;
      const float first = Decode(Run(format, 1, x))[0];
      ASSERT_EQ(std::isfinite(first), !overflows) << ToString(format) << ' ' << top;
      ASSERT_FALSE(std::isnan(first)) << ToString(format) << ' ' << top;
      if (normal) {
        ASSERT_NEAR(Decode(Run(format, 1, x))[0], x[0], relative * top) << ToString(format);
        ASSERT_NEAR(Decode(Run(format, 1, x))[1], x[1], relative * top) << ToString(format);
      }
    }
  }
}

TEST_P(QuantizeFormatTest, NonFiniteBlocksDecodeToNan) {
  for (const Format format : kScaledFormats) {
    for (const float bad : {kNan, -kNan, kInfinity, -kInfinity}) {
      // 130 rows x 256 columns, one bad element in row 1, column 200.
      std::vector<float> x(size_t{130} * 256, 1.5F);
      x[256 + 200] = bad;
      const Packed packed = Run(format, 130, x);
      const std::vector<float> out = Decode(packed);
      int64_t first_col = 0;
      int64_t cols = 256;
      int64_t last_row = 1;
      int64_t first_row = 1;
      if (format == Format::kFp8PerTensor || format == Format::kNvFp4) {
        first_row = 0;
        last_row = 129;
        EXPECT_TRUE(std::isnan(packed.view.global_scale));
        EXPECT_THAT(packed.codes, Each(0));
      } else if (format == Format::kFp8Block128 || format == Format::kFp8Block1x128) {
        first_col = 128;
        cols = 128;
        first_row = format == Format::kFp8Block128 ? 0 : 1;
        last_row = format == Format::kFp8Block128 ? 127 : 1;
      } else if (format != Format::kFp8PerRow) {
        first_col = 192;
        cols = 32;
      }
      for (int64_t i = 0; i < int64_t{130} * 256; ++i) {
        const int64_t row = i / 256;
        const int64_t col = i % 256;
        const bool inside =
            row >= first_row && row <= last_row && col >= first_col && col < first_col + cols;
        ASSERT_EQ(std::isnan(out[static_cast<size_t>(i)]), inside)
            << ToString(format) << " row " << row << " col " << col;
      }
    }
  }
}

TEST_P(QuantizeFormatTest, NonFiniteScaleCodes) {
  const std::vector<float> x = Padded({1, 2, kNan}, 32);
  EXPECT_EQ(Run(Format::kMxFp8, 1, x).scales[0], 255);
  EXPECT_EQ(Run(Format::kMxFp4, 1, x).scales[0], 255);
  EXPECT_EQ(Run(Format::kNvFp4, 1, x).scales[0], 0x7F);
  EXPECT_EQ(Run(Format::kMxInt4, 1, x).Scale<uint16_t>(0), 0x7FC0);
  EXPECT_THAT(Run(Format::kMxInt4, 1, x).codes, Each(0));
  EXPECT_EQ(Run(Format::kFp8PerRow, 1, x).Scale<uint32_t>(0), 0x7FC00000U);
  // A static global scale confines the damage to the block of 16.
  const Packed fixed = Run(Format::kNvFp4, 1, x, 1.0F);
  EXPECT_EQ(fixed.scales[0], 0x7F);
  EXPECT_EQ(fixed.scales[1], 0x00);
}

TEST_P(QuantizeFormatTest, HugeBlocksStayFinite) {
  const Packed int4 = Run(Format::kMxInt4, 1, Padded({FLT_MAX, -FLT_MAX}, 32));
  EXPECT_NEAR(Decode(int4)[0] / FLT_MAX, 1.0F, 0.13F);
  EXPECT_TRUE(std::isfinite(Decode(int4)[0]));
  const Packed tiny = Run(Format::kMxInt4, 1, Padded({1e-45F, -1e-45F}, 32));
  EXPECT_THAT(tiny.codes, Each(0));  // s = a / 8 underflows to 0, which counts as 1
  EXPECT_EQ(tiny.Scale<uint16_t>(0), 0x3F80);
}

// Searches the table of values for the nearest, ties to the even code.
int NearestCode(const std::vector<float>& values, float x) {
  int best = 0;
  for (int code = 1; code < static_cast<int>(values.size()); ++code) {
    const double distance = std::fabs(static_cast<double>(x) - values[static_cast<size_t>(code)]);
    const double current = std::fabs(static_cast<double>(x) - values[static_cast<size_t>(best)]);
    if (distance < current || (distance == current && code % 2 == 0)) {
      best = code;
    }
  }
  return best;
}

std::vector<float> E4m3Magnitudes() {
  std::vector<float> values;
  for (int code = 0; code < 127; ++code) {
    const int e = code / 8;
    values.push_back(
        static_cast<float>(e == 0 ? std::ldexp(code % 8, -9) : std::ldexp(8 + code % 8, e - 10)));
  }
  return values;
}

TEST_P(QuantizeFormatTest, RandomBlocksEqualATableSearch) {
  const std::vector<float> e4m3 = E4m3Magnitudes();
  const std::vector<float> e2m1 = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 300; ++round) {
    std::vector<float> x(32);
    const auto unit = static_cast<float>(std::ldexp(1.0, static_cast<int>(random() % 80) - 40));
    float amax = 0.0F;
    for (float& v : x) {
      v = normal(random) * unit;
      amax = std::max(amax, std::fabs(v));
    }
    const Packed mx8 = Run(Format::kMxFp8, 1, x);
    const Packed mx4 = Run(Format::kMxFp4, 1, x);
    const Packed fp8 = Run(Format::kFp8PerRow, 1, x);
    const Packed nv4 = Run(Format::kNvFp4, 2, x);
    const double e8 = std::ceil(std::log2(static_cast<double>(amax) / 448.0));
    const double e4 = std::ceil(std::log2(static_cast<double>(amax) / 6.0));
    ASSERT_EQ(mx8.scales[0], static_cast<int>(e8) + 127);
    ASSERT_EQ(mx4.scales[0], static_cast<int>(e4) + 127);
    ASSERT_EQ(fp8.Scale<float>(0), amax / 448.0F);
    const float g = 2688.0F / amax;
    ASSERT_EQ(nv4.view.global_scale, 1.0F / g);
    for (int64_t i = 0; i < 32; ++i) {
      const auto at = static_cast<size_t>(i);
      const int sign = x[at] < 0.0F ? 1 : 0;
      const float a = std::fabs(x[at]);
      const auto scaled8 = static_cast<float>(std::ldexp(a, -static_cast<int>(e8)));
      const auto scaled4 = static_cast<float>(std::ldexp(a, -static_cast<int>(e4)));
      ASSERT_EQ(mx8.codes[at], NearestCode(e4m3, scaled8) + 128 * sign);
      ASSERT_EQ(mx4.Nibble(i), NearestCode(e2m1, scaled4) + 8 * sign);
      ASSERT_EQ(fp8.codes[at], NearestCode(e4m3, a / (amax / 448.0F)) + 128 * sign);
      float block = 0.0F;
      for (size_t j = at / 16 * 16; j < at / 16 * 16 + 16; ++j) {
        block = std::max(block, std::fabs(x[j]));
      }
      const int sf = NearestCode(e4m3, (g * block) / 6.0F);
      ASSERT_EQ(nv4.scales[at / 16], sf);
      const float step = e4m3[static_cast<size_t>(sf)] / g;
      ASSERT_EQ(nv4.Nibble(i), NearestCode(e2m1, a * (1.0F / step)) + 8 * sign);
      const float decoded = (e2m1[nv4.Nibble(i) & 7] * e4m3[static_cast<size_t>(sf)]) * (1.0F / g);
      ASSERT_EQ(std::fabs(Decode(nv4)[at]), decoded);
    }
  }
}

std::string IsaName(const testing::TestParamInfo<Isa>& info) {
  return std::string(ToString(info.param));
}

INSTANTIATE_TEST_SUITE_P(Isas, QuantizeFormatTest,
                         testing::Values(Isa::kScalar, Isa::kAvx2, Isa::kAvx512), IsaName);

}  // namespace
}  // namespace hopyard::formats
