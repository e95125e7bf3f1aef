// SPDX-License-Identifier: Apache-2.0
#include "formats/codes.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace hopyard::formats {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float Up(float value) {
  return std::nextafter(value, kInfinity);
}

float Down(float value) {
  return std::nextafter(value, -kInfinity);
}

// Value of a code of a binary format with a sign, `exponent_bits` and `mantissa_bits`.
double GridValue(uint32_t code, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const auto exponent = static_cast<int>((code >> mantissa_bits) & ((1U << exponent_bits) - 1U));
  const double fraction = static_cast<double>(code & ((1U << mantissa_bits) - 1U)) /
                          static_cast<double>(1U << mantissa_bits);
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
  return ((code >> (exponent_bits + mantissa_bits)) & 1U) != 0 ? -magnitude : magnitude;
}

// Checks an encoder against the grid: `largest` is the code of the greatest positive number, `sign`
// the sign bit. At every number, at every midpoint (the even code wins) and one step of FP32 beside
// it.
template <class Encode>
void CheckGrid(Encode encode, int exponent_bits, int mantissa_bits, uint32_t largest) {
  const uint32_t sign = 1U << (exponent_bits + mantissa_bits);
  for (uint32_t code = 0; code <= largest; ++code) {
    const auto value = static_cast<float>(GridValue(code, exponent_bits, mantissa_bits));
    ASSERT_EQ(encode(value), code) << value;
    ASSERT_EQ(encode(-value), code | sign) << -value;
    if (code == largest) {
      break;
    }
    const auto next = static_cast<float>(GridValue(code + 1, exponent_bits, mantissa_bits));
    const float middle = value + (next - value) / 2.0F;
    const uint32_t even = code % 2 == 0 ? code : code + 1;
    ASSERT_EQ(encode(middle), even) << middle;
    ASSERT_EQ(encode(-middle), even | sign) << -middle;
    ASSERT_EQ(encode(Down(middle)), code) << Down(middle);
    ASSERT_EQ(encode(Up(middle)), code + 1) << Up(middle);
    ASSERT_EQ(encode(-Down(middle)), code | sign) << -Down(middle);
    ASSERT_EQ(encode(-Up(middle)), (code + 1) | sign) << -Up(middle);
  }
}

TEST(E4m3, DecodesEveryCode) {
  for (uint32_t code = 0; code < 256; ++code) {
    const float value = DecodeE4m3(static_cast<uint8_t>(code));
    if ((code & 0x7FU) == 0x7FU) {
      EXPECT_TRUE(std::isnan(value)) << code;
    } else {
      EXPECT_EQ(value, GridValue(code, 4, 3)) << code;
      EXPECT_EQ(std::signbit(value), code >= 128) << code;
    }
  }
  EXPECT_EQ(DecodeE4m3(0x01), 0x1p-9F);
  EXPECT_EQ(DecodeE4m3(0x08), 0x1p-6F);
  EXPECT_EQ(DecodeE4m3(0x38), 1.0F);
  EXPECT_EQ(DecodeE4m3(0x7E), 448.0F);
}

TEST(E4m3, EncodesNumbersMidpointsAndTheirNeighbours) {
  CheckGrid(EncodeE4m3, 4, 3, 0x7E);
}

TEST(E4m3, SaturatesAndKeepsNan) {
  for (const float value : {448.0F, Up(448.0F), 464.0F, Up(464.0F), 1e10F, 3.4e38F, kInfinity}) {
    EXPECT_EQ(EncodeE4m3(value), 0x7E) << value;
    EXPECT_EQ(EncodeE4m3(-value), 0xFE) << value;
  }
  EXPECT_EQ(EncodeE4m3(kNan), 0x7F);
  EXPECT_EQ(EncodeE4m3(-kNan), 0x7F);
  EXPECT_EQ(EncodeE4m3(std::bit_cast<float>(0x7F800001U)), 0x7F);
  EXPECT_EQ(EncodeE4m3(std::numeric_limits<float>::denorm_min()), 0x00);
  EXPECT_EQ(EncodeE4m3(-1e-8F), 0x80);
}

TEST(E2m1, DecodesEveryCode) {
  const std::vector<float> expected = {0, 0.5,  1,  1.5,  2,  3,  4,  6,
                                       0, -0.5, -1, -1.5, -2, -3, -4, -6};
  for (uint8_t code = 0; code < 16; ++code) {
    EXPECT_EQ(DecodeE2m1(code), expected[code]);
    EXPECT_EQ(std::signbit(DecodeE2m1(code)), code >= 8);
  }
}

TEST(E2m1, TiesGoToTheEvenCode) {
  const std::vector<std::pair<float, uint8_t>> cases = {
      {0.25F, 0}, {0.75F, 2}, {1.25F, 2}, {1.75F, 4}, {2.5F, 4}, {3.5F, 6}, {5.0F, 6}};
  for (const auto& [value, code] : cases) {
    EXPECT_EQ(EncodeE2m1(value), code) << value;
    EXPECT_EQ(EncodeE2m1(-value), code | 8) << value;
  }
  CheckGrid(EncodeE2m1, 2, 1, 7);
}

TEST(E2m1, SaturatesAndHasNoNan) {
  for (const float value : {Up(6.0F), 7.0F, 8.0F, 1e30F, kInfinity}) {
    EXPECT_EQ(EncodeE2m1(value), 7) << value;
    EXPECT_EQ(EncodeE2m1(-value), 15) << value;
  }
  EXPECT_EQ(EncodeE2m1(kNan), 0);
  EXPECT_EQ(EncodeE2m1(-kNan), 0);
}

TEST(E8m0, DecodesAndReencodesEveryCode) {
  for (int code = 0; code < 255; ++code) {
    const auto value = static_cast<float>(std::ldexp(1.0, code - 127));
    EXPECT_EQ(DecodeE8m0(static_cast<uint8_t>(code)), value) << code;
    EXPECT_EQ(EncodeE8m0RoundUp(value), code) << code;
    // One step above rounds up, one below is covered by this code.
    EXPECT_EQ(EncodeE8m0RoundUp(Up(value)), std::min(code + 1, 254)) << code;
    EXPECT_EQ(EncodeE8m0RoundUp(Down(value)), code) << code;
  }
  EXPECT_TRUE(std::isnan(DecodeE8m0(255)));
}

TEST(E8m0, ZeroSubnormalsAndSpecials) {
  EXPECT_EQ(EncodeE8m0RoundUp(0.0F), 0);
  EXPECT_EQ(EncodeE8m0RoundUp(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(EncodeE8m0RoundUp(0x1p-128F), 0);
  EXPECT_EQ(EncodeE8m0RoundUp(0x1.000004p-127F), 1);
  EXPECT_EQ(EncodeE8m0RoundUp(0x1.8p-127F), 1);
  EXPECT_EQ(EncodeE8m0RoundUp(std::numeric_limits<float>::max()), 254);
  EXPECT_EQ(EncodeE8m0RoundUp(kInfinity), 255);
  EXPECT_EQ(EncodeE8m0RoundUp(kNan), 255);
}

TEST(Int4, DecodesEveryNibble) {
  for (int value = -8; value < 8; ++value) {
    EXPECT_EQ(DecodeInt4(static_cast<uint8_t>(value & 0xF)), static_cast<float>(value));
  }
}

TEST(Fp16, DecodesEveryCode) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const float value = DecodeFp16(static_cast<uint16_t>(code));
    const uint32_t magnitude = code & 0x7FFFU;
    if (magnitude > 0x7C00U) {
      ASSERT_TRUE(std::isnan(value)) << code;
      // A NaN comes back quiet, with its sign and payload.
      ASSERT_EQ(EncodeFp16(value), code | 0x200U);
    } else if (magnitude == 0x7C00U) {
      ASSERT_EQ(value, code < 0x8000U ? kInfinity : -kInfinity);
      ASSERT_EQ(EncodeFp16(value), code);
    } else {
      ASSERT_EQ(value, GridValue(code, 5, 10)) << code;
      ASSERT_EQ(std::signbit(value), code >= 0x8000U) << code;
    }
  }
}

TEST(Fp16, EncodesNumbersMidpointsAndTheirNeighbours) {
  CheckGrid(EncodeFp16, 5, 10, 0x7BFF);
  EXPECT_EQ(EncodeFp16(Down(65520.0F)), 0x7BFF);
  for (const float value : {65520.0F, 65535.0F, 65536.0F, 65537.0F, 1e20F, kInfinity}) {
    EXPECT_EQ(EncodeFp16(value), 0x7C00) << value;
    EXPECT_EQ(EncodeFp16(-value), 0xFC00) << value;
  }
}

TEST(Bf16, DecodesAndReencodesEveryCode) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const float value = DecodeBf16(static_cast<uint16_t>(code));
    const uint32_t magnitude = code & 0x7FFFU;
    if (magnitude > 0x7F80U) {
      ASSERT_TRUE(std::isnan(value));
      ASSERT_EQ(EncodeBf16(value), code | 0x40U);
    } else {
      if (magnitude < 0x7F80U) {
        ASSERT_EQ(value, GridValue(code, 8, 7)) << code;
      }
      ASSERT_EQ(EncodeBf16(value), code);
    }
  }
}

TEST(Bf16, EncodesNumbersMidpointsAndTheirNeighbours) {
  CheckGrid(EncodeBf16, 8, 7, 0x7F7F);
  EXPECT_EQ(EncodeBf16(std::numeric_limits<float>::max()), 0x7F80);  // nearest is infinity
  EXPECT_EQ(EncodeBf16(std::bit_cast<float>(0x7F7F7FFFU)), 0x7F7F);
  EXPECT_EQ(EncodeBf16(std::bit_cast<float>(0x7F7F8000U)), 0x7F80);
  // A NaN whose payload lies in the dropped bits stays a NaN.
  EXPECT_EQ(EncodeBf16(std::bit_cast<float>(0xFF800001U)), 0xFFC0);
}

}  // namespace
}  // namespace hopyard::formats
