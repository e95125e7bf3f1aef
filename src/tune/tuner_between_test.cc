// SPDX-License-Identifier: Apache-2.0
// The tuner's rules between and beyond the numbers of tokens that it is told to measure.
#include <algorithm>
#include <iterator>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tune/fake_lab.h"
#include "tune/tuner.h"

namespace hopyard::tune {
namespace {

using ::testing::HasSubstr;

// a is faster up to 700 tokens, b beyond.
FakeLab::Times CrossAt(double crossover) {
  return [crossover](const std::string& kernel, int64_t tokens, int) {
    const auto t = static_cast<double>(tokens);
    return kernel == "a" ? 100.0 + t : 100.0 + crossover + 0.2 * (t - crossover);
  };
}

TEST(TunerBetween, TheBorderIsWhereTheWinnerChanges) {
  for (const double crossover : {540.0, 700.0, 820.0, 990.0}) {
    FakeLab lab;
    lab.kernels = {"a", {"a", "b"}, {}};
    lab.time = CrossAt(crossover);
    const TunerResult tuned = Tune(&lab, {512, 1024});
    int64_t border = 0;
    for (const TunedRange& range : tuned.ranges) {
      border = range.tactic == "a" ? range.last : border;
    }
    // b is taken where it has won by the margin of 1 %; three halvings of 512 leave 64.
    const double wins = (1.0 + 0.8 * crossover) / 0.79;
    EXPECT_GE(static_cast<double>(border), crossover - 1.0) << Shown(tuned);
    EXPECT_LE(static_cast<double>(border), wins + 64.0) << Shown(tuned);
    for (size_t i = 1; i < tuned.ranges.size(); ++i) {
      const TunedRange& low = tuned.ranges[i - 1];
      const TunedRange& high = tuned.ranges[i];
      EXPECT_LT(low.last, high.last);
      EXPECT_GT(high.tokens, low.last);
      EXPECT_LE(high.tokens, high.last);
      if (low.tactic == "b") {
        EXPECT_LE(static_cast<double>(high.tokens), 1.16 * static_cast<double>(low.tokens))
            << Shown(tuned);
      }
    }
  }
}

TEST(TunerBetween, AWinnerOnBothSidesIsMeasuredBetweenThem) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  // b is the faster one but for a stretch that no bucket lies in.
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    const bool stretch = tokens >= 5500 && tokens < 7500;
    return (kernel == "b") == stretch ? 70.0 : 60.0;
  };
  const TunerResult tuned = Tune(&lab, {4096, 8192});
  EXPECT_EQ(RangeAt(tuned, 4500).tactic, "b") << Shown(tuned);
  EXPECT_EQ(RangeAt(tuned, 5793).tactic, "a") << Shown(tuned);
  EXPECT_EQ(RangeAt(tuned, 6889).tactic, "a") << Shown(tuned);
  EXPECT_EQ(RangeAt(tuned, 8000).tactic, "b") << Shown(tuned);
}

// Where it loses lies between what a border made and a bucket.
TEST(TunerBetween, AWinnerThatABorderLeavesIsMeasuredUpToTheNext) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    if (kernel == "a") {
      return 70.0;
    }
    const bool stretch = tokens >= 6500 && tokens < 7500;
    const bool good = kernel == "c" ? tokens < 5000 : tokens >= 5000 && !stretch;
    return good ? 60.0 : 80.0;
  };
  const TunerResult tuned = Tune(&lab, {4096, 8192});
  for (const int64_t tokens : {6600, 7000, 7400}) {
    EXPECT_EQ(RangeAt(tuned, tokens).tactic, "a") << tokens << '\n' << Shown(tuned);
  }
}

// 1 % at 512 says nothing about 540: the next that was measured has the untuned choice.
TEST(TunerBetween, WhatWasNotMeasuredBesideAWinnerIsTheUntunedChoices) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    return kernel == "a" ? 50.0 : tokens <= 512 ? 40.0 : 60.0;
  };
  const TunerResult tuned = Tune(&lab, {256, 512, 1024});
  for (const TunedRange& range : tuned.ranges) {
    const bool wins = range.tokens >= 256 && range.last <= 512;
    EXPECT_EQ(range.tactic, wins ? "b" : "a") << Shown(tuned);
  }
}

TEST(TunerBetween, BelowTheFirstNumberOfTokensItsWinnerRunsNothing) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}});
  const TunerResult tuned = Tune(&lab, {16, 32});
  EXPECT_EQ(tuned.ranges.front(), (TunedRange{15, 15, "a", 0.0, "a"})) << Shown(tuned);
  EXPECT_EQ(tuned.ranges[1].tokens, 16);
  EXPECT_EQ(tuned.ranges[1].tactic, "b");
  // An untuned choice that won there may run below; one that may not run leaves it to the winner.
  lab.time = TimesOf({{"a", 50}, {"b", 60}});
  EXPECT_EQ(Tune(&lab, {16, 32}).ranges.front().tokens, 16);
  TuneOptions options;
  options.blocklist = {"a"};
  const TunerResult without = Tune(&lab, {16, 32}, options);
  EXPECT_EQ(without.ranges.front().tactic, "b") << Shown(without);
  EXPECT_EQ(without.ranges.front().tokens, 16);
}

TEST(TunerBetween, TwoUntunedChoicesMeetWhereTheModelChanges) {
  FakeLab lab;
  lab.kernels_at = [](int64_t tokens) { return Kernels{tokens < 700 ? "a" : "c", {"a", "c"}, {}}; };
  lab.time = [](const std::string&, int64_t, int) { return 50.0; };
  const TunerResult tuned = Tune(&lab, {512, 1024});
  int64_t border = 0;
  for (const TunedRange& range : tuned.ranges) {
    border = range.tactic == "a" ? range.last : border;
  }
  EXPECT_EQ(border, 699) << Shown(tuned);
}

TEST(TunerBetween, BothSidesOfAChangeOfTheUntunedChoiceAreMeasured) {
  FakeLab lab;
  lab.kernels_at = [](int64_t tokens) {
    return tokens < 1000 ? Kernels{"a", {"a", "b"}, {}} : Kernels{"c", {"b", "c"}, {}};
  };
  // b wins where c would run, and loses to a until then.
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    return kernel == "b" ? 60.0 : kernel == "c" || tokens >= 1000 ? 70.0 : 50.0;
  };
  const TunerResult tuned = Tune(&lab, {512, 1024});
  const auto border = std::find_if(tuned.ranges.begin(), tuned.ranges.end(),
                                   [](const TunedRange& range) { return range.tactic == "b"; });
  ASSERT_NE(border, tuned.ranges.begin()) << Shown(tuned);
  ASSERT_NE(border, tuned.ranges.end()) << Shown(tuned);
  EXPECT_EQ(border->tokens, 1000) << Shown(tuned);
  EXPECT_EQ(std::prev(border)->last, 999) << Shown(tuned);
  EXPECT_EQ(std::prev(border)->tactic, "a") << Shown(tuned);
}

TEST(TunerBetween, TheUntunedChoiceOnBothSidesIsNotMeasuredBetweenThem) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = [](const std::string& kernel, int64_t, int) { return kernel == "a" ? 50.0 : 70.0; };
  const TunerResult tuned = Tune(&lab, {4096, 8192});
  EXPECT_EQ(tuned.ranges.size(), 2U) << Shown(tuned);
}

TEST(TunerBetween, AnUntunedChoiceBetweenTwoWinnersIsMeasuredThere) {
  FakeLab lab;
  lab.kernels_at = [](int64_t tokens) {
    return Kernels{tokens == 768 ? "c" : "a", {"a", "b"}, {}};
  };
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    return kernel == "c" ? 50.0 : (kernel == "a") == (tokens < 800) ? 60.0 : 70.0;
  };
  const TunerResult tuned = Tune(&lab, {512, 1024});
  const auto middle = std::find_if(tuned.ranges.begin(), tuned.ranges.end(),
                                   [](const TunedRange& range) { return range.tokens == 768; });
  ASSERT_NE(middle, tuned.ranges.end());
  EXPECT_EQ(middle->tactic, "c");
}

TEST(TunerBetween, TheLargestWinnerIsMeasuredBeyond) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}});
  const TunerResult wins = Tune(&lab, {8, 16});
  EXPECT_EQ(wins.ranges.back().last, 32) << Shown(wins);
  EXPECT_EQ(wins.ranges.back().tactic, "b");

  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    return kernel == "b" && tokens <= 1400 ? 40.0 : kernel == "b" ? 60.0 : 50.0;
  };
  const TunerResult loses = Tune(&lab, {512, 1024});
  EXPECT_EQ(loses.ranges.back().last, 2048) << Shown(loses);
  EXPECT_EQ(loses.ranges.back().tactic, "a");
  EXPECT_EQ(loses.ranges[1].tactic, "b");
  int64_t border = 0;
  for (const TunedRange& range : loses.ranges) {
    border = range.tactic == "b" ? range.last : border;
  }
  EXPECT_NEAR(static_cast<double>(border), 1400.0, 128.0) << Shown(loses);
}

TEST(TunerBetween, WithoutMemoryBeyondTheLargestItsOwnIsTheLast) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}});
  lab.memory_for = 20;
  const TunerResult tuned = Tune(&lab, {8, 16});
  EXPECT_EQ(tuned.ranges.back().last, 16);
  EXPECT_THAT(Shown(tuned), HasSubstr("a at 32: 32 tokens need too much"));
}

TEST(TunerBetween, WhatAPlanWouldTakeAnywayIsNotMeasuredBeyond) {
  FakeLab lab;
  const TunerResult tuned = Tune(&lab, {8, 16});
  for (const auto& [tokens, tactic] : lab.runs) {
    EXPECT_LE(tokens, 16);
  }
  EXPECT_EQ(tuned.ranges.back().last, 16);
}

// b and c are as fast: the one that won below stays.
TEST(TunerBetween, NeighboursKeepAWinner) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    return kernel == "a" ? 100.0 : kernel == "b" ? (tokens == 1 ? 95.0 : 90.2) : 90.0;
  };
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, "c");
  }
}

}  // namespace
}  // namespace hopyard::tune
