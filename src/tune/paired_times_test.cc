// SPDX-License-Identifier: Apache-2.0
#include "tune/paired_times.h"

#include <cmath>
#include <random>

#include <gtest/gtest.h>

namespace hopyard::tune {
namespace {

TEST(PairedTimes, MedianByHand) {
  EXPECT_EQ(Median({}), 0.0);
  EXPECT_EQ(Median({3.0}), 3.0);
  EXPECT_EQ(Median({9.0, 1.0, 4.0}), 4.0);
  EXPECT_EQ(Median({9.0, 1.0, 4.0, 6.0}), 5.0);
}

TEST(PairedTimes, DifferenceByHand) {
  // Ratios 1.1, 1.2, 1.4: median 0.2, deviations 0.1, 0, 0.2 with median 0.1.
  const Difference difference = Compare({11.0, 12.0, 14.0}, {10.0, 10.0, 10.0});
  EXPECT_NEAR(difference.median, 0.2, 1e-12);
  EXPECT_NEAR(difference.noise, 1.2533 * 1.4826 * 0.1 * (3.0 / 2.2) / std::sqrt(3.0), 1e-12);
}

TEST(PairedTimes, WhatSlowsBothIsNoNoise) {
  const Difference difference = Compare({9.0, 18.0, 90.0, 27.0}, {10.0, 20.0, 100.0, 30.0});
  EXPECT_NEAR(difference.median, -0.1, 1e-12);
  EXPECT_NEAR(difference.noise, 0.0, 1e-12);
}

TEST(PairedTimes, OneRoundThatSomethingFellIntoChangesLittle) {
  std::vector<double> times(9, 10.0);
  times[4] = 1000.0;
  const Difference difference = Compare(times, std::vector<double>(9, 10.0));
  EXPECT_EQ(difference.median, 0.0);
  EXPECT_EQ(difference.noise, 0.0);
}

// The noise that is reported is the spread of the median over many experiments.
TEST(PairedTimes, NoiseIsTheStandardErrorOfTheMedian) {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal(0.0, 0.02);
  for (const size_t rounds : {9U, 25U}) {
    double squares = 0.0;
    double noises = 0.0;
    constexpr int kExperiments = 4000;
    for (int i = 0; i < kExperiments; ++i) {
      std::vector<double> times(rounds);
      std::vector<double> reference(rounds);
      for (size_t r = 0; r < rounds; ++r) {
        times[r] = 100.0 * (1.0 + normal(random));
        reference[r] = 100.0 * (1.0 + normal(random));
      }
      const Difference difference = Compare(times, reference);
      squares += difference.median * difference.median;
      noises += difference.noise;
    }
    const double spread = std::sqrt(squares / kExperiments);
    EXPECT_NEAR(noises / kExperiments / spread, 1.0, 0.1) << rounds;
  }
}

}  // namespace
}  // namespace hopyard::tune
