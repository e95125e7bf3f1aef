// SPDX-License-Identifier: Apache-2.0
#include "tune/same_rows.h"

#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "formats/codes.h"

namespace hopyard::tune {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kCols = 4;
constexpr double kBound = 0.1;

std::vector<uint16_t> Bits(const std::vector<float>& values) {
  std::vector<uint16_t> bits;
  bits.reserve(values.size());
  for (const float value : values) {
    bits.push_back(formats::EncodeBf16(value));
  }
  return bits;
}

std::string Describe(const std::vector<float>& got, const std::vector<float>& wanted) {
  return DescribeDifference(Bits(got), Bits(wanted), kCols, kBound);
}

TEST(SameRows, EqualAndNearlyEqualRowsPass) {
  const std::vector<float> rows = {1, 2, -3, 4, 0.5F, 0, 0, -1};
  EXPECT_EQ(Describe(rows, rows), "");
  std::vector<float> near = rows;
  near[2] = -3.25F;
  EXPECT_EQ(Describe(near, rows), "");
  EXPECT_EQ(Describe({}, {}), "");
}

TEST(SameRows, EveryRowCounts) {
  std::vector<float> wanted(1000 * kCols, 1.0F);
  std::vector<float> got = wanted;
  got[777 * kCols] = 1.5F;
  EXPECT_THAT(Describe(got, wanted), HasSubstr("row 777 of the output differs by 0.25"));
}

TEST(SameRows, NoNumbersAreNamed) {
  const std::vector<float> wanted = {1, 2, 3, 4, 1, 2, 3, 4};
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<float> got = wanted;
    got[5] = bad;
    EXPECT_THAT(Describe(got, wanted), HasSubstr("row 1 of the output is not finite"));
    // What the untuned kernels make no number of is nobody's fault.
    EXPECT_EQ(Describe(wanted, got), "");
  }
}

TEST(SameRows, TheFirstRowThatIsNotFiniteIsNamed) {
  std::vector<float> rows = {1, 2, 3, 4, -3.3e38F, 2, 3, 4, 1, 2, 3, 4};
  EXPECT_EQ(DescribeNotFinite(Bits(rows), kCols), "");
  EXPECT_EQ(DescribeNotFinite({}, kCols), "");
  rows[11] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(DescribeNotFinite(Bits(rows), kCols), "row 2 of the output is not finite");
  rows[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(DescribeNotFinite(Bits(rows), kCols), "row 1 of the output is not finite");
}

TEST(SameRows, ZerosMustBeZeros) {
  const std::vector<float> wanted = {0, 0, 0, 0, 1, 2, 3, 4};
  EXPECT_EQ(Describe(wanted, wanted), "");
  std::vector<float> got = wanted;
  got[1] = 1e-6F;
  EXPECT_THAT(Describe(got, wanted), HasSubstr("row 0 of the output differs"));
}

TEST(SameRows, ATinyRowIsJudgedByTheOthers) {
  const std::vector<float> wanted = {100, 100, 100, 100, 0.01F, 0, 0, 0};
  std::vector<float> got = wanted;
  got[4] = 0.02F;
  EXPECT_EQ(Describe(got, wanted), "");
}

}  // namespace
}  // namespace hopyard::tune
