// SPDX-License-Identifier: Apache-2.0
// The FP32 functions of routing against double precision and at their edges.
#include "stages/1_route/score.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "stages/1_route/route_testing.h"

namespace hopyard::route {
namespace {

using testing::DefExp;
using testing::DefLog1p;
using testing::kInf;

double UlpOf(double value) {
  return std::ldexp(1.0, std::max(std::ilogb(value) - 23, -149));
}

float Exp(float x) {
  return ExpF32<ScalarOps>(x);
}

// Every 97th float (every 4850th when small) between 0 and the sign's end of the range.
TEST(ExpF32, IsWithinOneUlpAndMonotone) {
  const auto stride = static_cast<uint32_t>(97 * (testing::Scaled(50) == 1 ? 50 : 1));
  for (const float end : {88.7228F, -104.5F}) {
    double worst = 0;
    const auto sign = std::bit_cast<uint32_t>(end) & 0x80000000U;
    float previous = Exp(0.0F);
    for (uint32_t bits = sign + 1; bits < std::bit_cast<uint32_t>(end); bits += stride) {
      const auto x = std::bit_cast<float>(bits);
      const float got = Exp(x);
      const double wanted = std::exp(static_cast<double>(x));
      worst = std::max(worst, std::fabs(got - wanted) / UlpOf(wanted));
      ASSERT_TRUE(sign == 0 ? got >= previous : got <= previous) << "not monotone at " << x;
      previous = got;
    }
    EXPECT_LE(worst, 0.89) << "towards " << end;
    EXPECT_GT(worst, 0.5);  // the measure measures
  }
}

TEST(ExpF32, Edges) {
  EXPECT_EQ(Exp(0.0F), 1.0F);
  EXPECT_EQ(Exp(-0.0F), 1.0F);
  EXPECT_EQ(Exp(-kInf), 0.0F);
  EXPECT_EQ(Exp(kInf), kInf);
  EXPECT_EQ(Exp(88.72284F), kInf);
  EXPECT_LT(Exp(88.72283F), kInf);
  EXPECT_EQ(Exp(-102.5F), 2 * std::numeric_limits<float>::denorm_min());
  EXPECT_EQ(Exp(-103.9F), std::numeric_limits<float>::denorm_min());
  EXPECT_EQ(Exp(-104.0F), 0.0F);
  EXPECT_EQ(Exp(std::numeric_limits<float>::lowest()), 0.0F);
  EXPECT_EQ(Exp(std::numeric_limits<float>::max()), kInf);
  EXPECT_TRUE(std::isnan(Exp(testing::kNan)));
}

TEST(ExpF32, EqualsTheIndependentDefinition) {
  testing::Random random(1);
  for (int64_t i = 0; i < testing::Scaled(5'000'000); ++i) {
    const auto x = i % 2 == 0 ? std::bit_cast<float>(static_cast<uint32_t>(random.Next()))
                              : (random.Uniform() * 200.0F) - 108.0F;
    const float got = Exp(x);
    const float wanted = DefExp(x);
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(got));
    } else {
      ASSERT_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(wanted)) << "x=" << x;
    }
  }
}

TEST(Log1pF32, IsWithinItsBoundAndEqualsTheDefinition) {
  const auto stride = static_cast<uint32_t>(97 * (testing::Scaled(50) == 1 ? 50 : 1));
  double worst = 0;
  for (uint32_t bits = 0; bits <= std::bit_cast<uint32_t>(1.0F); bits += stride) {
    const auto u = std::bit_cast<float>(bits);
    const float got = Log1pF32<ScalarOps>(u);
    ASSERT_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(DefLog1p(u))) << "u=" << u;
    const double wanted = std::log1p(static_cast<double>(u));
    worst = std::max(worst, wanted == 0 ? 0.0 : std::fabs(got - wanted) / UlpOf(wanted));
  }
  EXPECT_LE(worst, 1.14);
  EXPECT_GT(worst, 0.5);
}

TEST(Sigmoid, Edges) {
  EXPECT_EQ(Sigmoid<ScalarOps>(0.0F), 0.5F);
  EXPECT_EQ(Sigmoid<ScalarOps>(-0.0F), 0.5F);
  EXPECT_EQ(Sigmoid<ScalarOps>(kInf), 1.0F);
  EXPECT_EQ(Sigmoid<ScalarOps>(-kInf), 0.0F);
  EXPECT_EQ(Sigmoid<ScalarOps>(20.0F), 1.0F);
  EXPECT_NEAR(Sigmoid<ScalarOps>(-20.0F), 2.0611537e-9, 1e-15);
  EXPECT_TRUE(std::isnan(Sigmoid<ScalarOps>(testing::kNan)));
}

TEST(SqrtSoftplus, Edges) {
  EXPECT_NEAR(SqrtSoftplus<ScalarOps>(0.0F), std::sqrt(std::log(2.0)), 1e-7);
  EXPECT_EQ(SqrtSoftplus<ScalarOps>(kInf), kInf);
  EXPECT_EQ(SqrtSoftplus<ScalarOps>(-kInf), 0.0F);
  EXPECT_EQ(SqrtSoftplus<ScalarOps>(1e30F), std::sqrt(1e30F));
  for (const double z : {-19.9, -20.1, -80.0, -110.0, -170.0}) {
    const double wanted = std::sqrt(std::log1p(std::exp(z)));
    EXPECT_NEAR(SqrtSoftplus<ScalarOps>(static_cast<float>(z)), wanted, 5e-6 * wanted) << z;
  }
  EXPECT_TRUE(std::isnan(SqrtSoftplus<ScalarOps>(testing::kNan)));
}

TEST(SoftmaxTerm, Edges) {
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(kInf, kInf), 1.0F);
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(-kInf, -kInf), 1.0F);
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(3.0F, kInf), 0.0F);
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(-kInf, 3.0F), 0.0F);
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(-3e38F, 3e38F), 0.0F);
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(testing::kNan, 3.0F), 0.0F);
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(-0.0F, 0.0F), 1.0F);
}

// Both differences round to the same float: without the rounding error put back they would tie.
TEST(SoftmaxTerm, KeepsTheOrderOfCloseLogits) {
  const float max = 16777216.0F;
  EXPECT_EQ(SoftmaxTerm<ScalarOps>(16777215.0F, max), Exp(-1.0F));
  const float low = SoftmaxTerm<ScalarOps>(1e-7F, 16.0F);
  const float high = SoftmaxTerm<ScalarOps>(4e-7F, 16.0F);
  EXPECT_LT(low, high);
  EXPECT_EQ(1e-7F - 16.0F, 4e-7F - 16.0F);
}

TEST(OrderKey, OrdersLikeTheFloats) {
  const std::vector<float> ascending = {-kInf, -1e30F, -1.0F, -1e-45F, -0.0F,
                                        0.0F,  1e-45F, 1.0F,  1e30F,   kInf};
  int32_t previous = OrderKey<ScalarOps>(testing::kNan);
  EXPECT_EQ(previous, OrderKey<ScalarOps>(-testing::kNan));
  for (const float value : ascending) {
    const int32_t key = OrderKey<ScalarOps>(value);
    EXPECT_GT(key, previous) << value;
    EXPECT_EQ(std::bit_cast<uint32_t>(FromOrderKey(key)), std::bit_cast<uint32_t>(value));
    previous = key;
  }
  EXPECT_TRUE(std::isnan(FromOrderKey(OrderKey<ScalarOps>(testing::kNan))));
}

}  // namespace
}  // namespace hopyard::route
