// SPDX-License-Identifier: Apache-2.0
// The tuner's rules on made-up times.
#include "tune/tuner.h"

#include <algorithm>
#include <iostream>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tune/fake_lab.h"

namespace hopyard::tune {
namespace {

using ::testing::HasSubstr;
TEST(Tuner, FindsTheBestPair) {
  FakeLab lab;
  lab.kernels = {"a+x", {"a", "b", "c"}, {"x", "y", "z"}};
  lab.time = TimesOf({{"a", 50}, {"b", 45}, {"c", 70}, {"x", 30}, {"y", 33}, {"z", 25}});
  const TunerResult tuned = Tune(&lab, {16});
  const TunedRange range = RangeAt(tuned, 16);
  EXPECT_EQ(range.tokens, 16);
  EXPECT_EQ(range.tactic, "b+z");
  EXPECT_EQ(range.untuned, "a+x");
  EXPECT_NEAR(range.us, 70.0, 1e-9);
  EXPECT_NEAR(range.untuned_us, 80.0, 1e-9);
  EXPECT_TRUE(tuned.faults.empty()) << Shown(tuned);
  // a+x, b+x, c+x; b+y, b+z; beyond the largest number of tokens, and at four between that and
  // it, a+x and b+z again.
  EXPECT_EQ(tuned.measured, 5 + 5 * 2);
  EXPECT_EQ(lab.RunsOf("a+y"), 0) << "GEMM2 is tuned beside the best GEMM1";
}

TEST(Tuner, OneListIsTheWholeTactic) {
  FakeLab lab;
  lab.kernels = {"wide", {"wide", "narrow"}, {}};
  lab.time = TimesOf({{"wide", 50}, {"narrow", 30}});
  const TunerResult tuned = Tune(&lab, {1});
  EXPECT_EQ(tuned.ranges.front().tactic, "narrow");
  EXPECT_TRUE(tuned.faults.empty()) << Shown(tuned);
}

TEST(Tuner, EqualTimesKeepTheUntuned) {
  FakeLab lab;
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  ASSERT_EQ(tuned.ranges.size(), 3U);
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, "a+x");
    EXPECT_EQ(range.us, range.untuned_us);
    EXPECT_EQ(range.last, range.tokens);
  }
}

TEST(Tuner, AWinnerIsFasterByMoreThanTheMargin) {
  for (const auto& [us, wins] : {std::pair{99.2, false}, {98.8, true}}) {
    FakeLab lab;
    lab.kernels = {"a", {"a", "b"}, {}};
    lab.time = TimesOf({{"a", 100.0}, {"b", us}});
    EXPECT_EQ(RangeAt(Tune(&lab, {8}), 8).tactic, wins ? "b" : "a") << us;
  }
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 100.0}, {"b", 93.0}});
  TuneOptions options;
  options.margin = 0.08;
  EXPECT_EQ(RangeAt(Tune(&lab, {8}, options), 8).tactic, "a");
}

TEST(Tuner, AWinnerLosesInNoKindOfRouting) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = [](const std::string& kernel, int64_t, int kind) {
    return kernel == "a" ? 100.0 : kind == 0 ? 80.0 : 103.0;
  };
  EXPECT_EQ(RangeAt(Tune(&lab, {8}), 8).tactic, "a") << "12 % faster in all, 3 % slower in one";
  lab.time = [](const std::string& kernel, int64_t, int kind) {
    return kernel == "a" ? 100.0 : kind == 0 ? 80.0 : 100.5;
  };
  EXPECT_EQ(RangeAt(Tune(&lab, {8}), 8).tactic, "b") << "equal within the margin";
}

// Every round has every runner once per kind of routing, and another one first.
TEST(Tuner, RoundsAreInterleaved) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = TimesOf({{"a", 100.0}, {"b", 101.0}, {"c", 102.0}});
  static_cast<void>(Tune(&lab, {8}));
  // The reference twice and b, c once on entry, then 5 rounds of 2 kinds of 3 runners.
  const size_t entry = 4;
  ASSERT_GE(lab.runs.size(), entry + 30);
  std::map<std::string, int> first;
  for (size_t group = 0; group < 10; ++group) {
    std::set<std::string> names;
    std::set<int> kinds;
    for (size_t i = 0; i < 3; ++i) {
      names.insert(lab.runs[entry + 3 * group + i].second);
      kinds.insert(lab.run_kinds[entry + 3 * group + i]);
    }
    EXPECT_EQ(names.size(), 3U) << "group " << group;
    EXPECT_EQ(kinds.size(), 1U) << "group " << group;
    ++first[lab.runs[entry + 3 * group].second];
  }
  EXPECT_EQ(first.size(), 3U) << "every runner begins a round";
}

TEST(Tuner, TheSlowLeaveEarly) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c", "d"}, {}};
  lab.time = TimesOf({{"a", 100}, {"b", 140}, {"c", 108}, {"d", 90}});
  EXPECT_EQ(RangeAt(Tune(&lab, {8}), 8).tactic, "d");
  EXPECT_EQ(lab.RunsOf("b"), 1 + 2 * 2) << "out after two rounds";
  EXPECT_EQ(lab.RunsOf("c"), 1 + 3 * 2) << "out after three";
}

// A final of calls that take milliseconds has fewer rounds, unless they differ.
TEST(Tuner, LongSteadyCallsTakeFewerRounds) {
  const auto finals_of = [](double us, double noise) {
    FakeLab lab;
    lab.kernels = {"a", {"a", "b"}, {}};
    lab.time = TimesOf({{"a", us}, {"b", 0.97 * us}});
    lab.noise = noise;
    EXPECT_EQ(RangeAt(Tune(&lab, {8}), 8).tactic, "b") << us;
    const auto runs =
        std::count(lab.runs.begin(), lab.runs.end(), std::pair{int64_t{8}, std::string("b")});
    // Once on entry, a screening of five rounds of both kinds.
    return (runs - 11) / 2;
  };
  EXPECT_EQ(finals_of(2000.0, 0.0), 9);
  EXPECT_EQ(finals_of(5000.0, 0.0), 5);
  EXPECT_EQ(finals_of(5000.0, 0.001), 5);
  EXPECT_GE(finals_of(5000.0, 0.015), 9);
}

// --- failures ---

TEST(Tuner, ACandidateThatThrowsIsNotRunAgain) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 10}, {"x", 50}, {"y", 40}});
  lab.on_run["b"] = [](int64_t) { throw std::runtime_error("misaligned address"); };
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, "a+y");
  }
  ASSERT_NE(FindFault(tuned, "b+x"), nullptr) << Shown(tuned);
  EXPECT_EQ(FindFault(tuned, "b+x")->reason, "misaligned address");
  EXPECT_EQ(lab.RunsOf("b+x"), 1) << "not at other numbers of tokens either";
  EXPECT_EQ(lab.recoveries, 1);
  EXPECT_EQ(tuned.faults.size(), 1U) << Shown(tuned);
}

TEST(Tuner, ACandidateThatLiesAboutSupport) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 10}, {"x", 50}, {"y", 40}});
  lab.on_prepare["b"] = [](int64_t) { throw Error(ErrorKind::kUnsupported, "no such tile"); };
  const TunerResult tuned = Tune(&lab, {1, 2});
  EXPECT_EQ(tuned.ranges.front().tactic, "a+y");
  ASSERT_NE(FindFault(tuned, "b+x"), nullptr) << Shown(tuned);
  EXPECT_EQ(FindFault(tuned, "b+x")->reason, "no such tile");
  EXPECT_EQ(lab.RunsOf("b+x"), 0);
}

TEST(Tuner, ACandidateThatIsFarTooLate) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 1000}, {"b", 2e6}});
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  EXPECT_EQ(lab.RunsOf("b"), 1);
  ASSERT_NE(FindFault(tuned, "b"), nullptr) << Shown(tuned);
  EXPECT_THAT(FindFault(tuned, "b")->reason,
              HasSubstr("took 2000000 us, a 1000 us: not run again"));
  EXPECT_EQ(tuned.ranges.size(), 3U);
}

TEST(Tuner, ATimeThatIsNoNumberIsTooLate) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 1000}, {"b", std::numeric_limits<double>::quiet_NaN()}});
  const TunerResult tuned = Tune(&lab, {1});
  EXPECT_EQ(tuned.ranges.front().tactic, "a");
  EXPECT_NE(FindFault(tuned, "b"), nullptr);
}

TEST(Tuner, WrongValuesAreAFault) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 10}, {"x", 50}, {"y", 10}});
  lab.wrong = {{"b", "row 3 is NaN"}, {"y", "row 5 is off"}};
  const TunerResult tuned = Tune(&lab, {1, 2});
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, "a+x");
  }
  ASSERT_NE(FindFault(tuned, "b+x"), nullptr);
  EXPECT_EQ(FindFault(tuned, "b+x")->reason, "row 3 is NaN");
  ASSERT_NE(FindFault(tuned, "a+y"), nullptr);
  EXPECT_EQ(FindFault(tuned, "a+y")->reason, "row 5 is off");
  EXPECT_EQ(tuned.faults.size(), 2U) << Shown(tuned);
}

// The default's output is not the candidate's with the last kind of routing alone.
TEST(Tuner, WrongValuesWithOneRoutingAreAFault) {
  FakeLab lab;
  lab.num_kinds = 3;
  lab.right_kinds = 2;
  lab.time = TimesOf({{"a", 50}, {"b", 10}, {"x", 50}, {"y", 50}});
  lab.wrong = {{"b", "hot: row 3 is NaN"}};
  const TunerResult tuned = Tune(&lab, {1});
  EXPECT_EQ(tuned.ranges.front().tactic, "a+x");
  ASSERT_NE(FindFault(tuned, "b+x"), nullptr) << Shown(tuned);
  EXPECT_EQ(FindFault(tuned, "b+x")->reason, "hot: row 3 is NaN");
}

// Less memory may do for other numbers of tokens.
TEST(Tuner, OutOfMemoryHoldsForThatNumberOfTokensOnly) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}, {"c", 45}});
  lab.on_prepare["b"] = [](int64_t tokens) {
    HOPYARD_CHECK(tokens != 2, kOutOfMemory) << "no memory";
  };
  lab.on_prepare["c"] = [](int64_t tokens) {
    if (tokens == 4) {
      throw std::bad_alloc();
    }
  };
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  ASSERT_GE(tuned.ranges.size(), 3U) << Shown(tuned);
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, range.tokens == 2 ? "c" : "b") << range.tokens;
  }
  ASSERT_NE(FindFault(tuned, "b"), nullptr);
  EXPECT_EQ(FindFault(tuned, "b")->tokens, 2);
  ASSERT_NE(FindFault(tuned, "c"), nullptr);
  EXPECT_EQ(FindFault(tuned, "c")->reason, "out of memory");
}

TEST(Tuner, ACandidateThatFailsInALaterRoundLeaves) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 38}, {"c", 40}});
  int calls = 0;
  lab.on_run["b"] = [&calls](int64_t) {
    if (++calls == 8) {
      throw std::runtime_error("launch failed");
    }
  };
  const TunerResult tuned = Tune(&lab, {1});
  EXPECT_EQ(tuned.ranges.front().tactic, "c");
  EXPECT_EQ(calls, 8);
  EXPECT_EQ(FindFault(tuned, "b")->reason, "launch failed");
}

TEST(Tuner, WhereTheUntunedFailsTheOthersAreStillTuned) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}});
  lab.memory_for = 4;
  const TunerResult tuned = Tune(&lab, {1, 4, 8});
  ASSERT_EQ(tuned.ranges.size(), 4U) << "2 and 3 between: " << Shown(tuned);
  EXPECT_EQ(tuned.ranges.back().last, 4) << "nothing is known beyond";
  ASSERT_NE(FindFault(tuned, "a"), nullptr);
  EXPECT_EQ(FindFault(tuned, "a")->tokens, 8);
  EXPECT_THAT(FindFault(tuned, "a")->reason, HasSubstr("need too much"));
}

TEST(Tuner, ALostDeviceKeepsWhatWasMeasured) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}});
  lab.on_run["b"] = [](int64_t tokens) {
    if (tokens == 4) {
      throw Error(ErrorKind::kCuda, "illegal address");
    }
  };
  lab.lost_after_failure = true;
  const TunerResult tuned = Tune(&lab, {1, 4, 8});
  ASSERT_EQ(tuned.ranges.size(), 1U) << Shown(tuned);
  EXPECT_EQ(tuned.ranges.front().tactic, "a") << "b was faster, but has failed since";
  EXPECT_EQ(tuned.ranges.front().us, 50.0);
  EXPECT_EQ(tuned.ranges.front().last, 1);
  EXPECT_THAT(Shown(tuned), HasSubstr("illegal address; the device is lost"));
  EXPECT_THAT(Shown(tuned), HasSubstr("a at 8: the device is lost; 1 numbers of tokens"));
}

TEST(Tuner, BlocklistedNamesAreNeverRun) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 10}, {"x", 50}, {"y", 10}});
  TuneOptions options;
  options.blocklist = {"b", "a+y"};
  const TunerResult tuned = Tune(&lab, {1, 2}, options);
  EXPECT_EQ(tuned.ranges.front().tactic, "a+x");
  for (const auto& [tokens, tactic] : lab.runs) {
    EXPECT_EQ(tactic, "a+x");
  }
  ASSERT_NE(FindFault(tuned, "b"), nullptr);
  EXPECT_EQ(FindFault(tuned, "b")->reason, "blocklisted");
  ASSERT_NE(FindFault(tuned, "a+y"), nullptr);
  EXPECT_EQ(tuned.faults.size(), 2U) << "each once: " << Shown(tuned);
}

TEST(Tuner, AnotherStandsInForABlocklistedUntunedChoice) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 60}, {"x", 50}, {"y", 40}});
  TuneOptions options;
  options.blocklist = {"a"};
  const TunerResult tuned = Tune(&lab, {1}, options);
  EXPECT_EQ(tuned.ranges.front().tactic, "b+y");
  EXPECT_EQ(tuned.ranges.front().untuned, "a+x");
  EXPECT_EQ(tuned.ranges.front().untuned_us, 0.0) << "it has not been measured";
  EXPECT_EQ(lab.RunsOf("a+x") + lab.RunsOf("a+y"), 0);
  options.blocklist = {"a", "b"};
  const TunerResult nothing = Tune(&lab, {1}, options);
  EXPECT_TRUE(nothing.ranges.empty());
  EXPECT_THAT(Shown(nothing), HasSubstr("every candidate is on the blocklist"));
}

TEST(Tuner, PairsThatDoNotFitAreNotTried) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 10}, {"x", 50}, {"y", 40}});
  lab.unfit = {"b+x", "b+y"};
  const TunerResult tuned = Tune(&lab, {1});
  EXPECT_EQ(tuned.ranges.front().tactic, "a+y");
  EXPECT_TRUE(tuned.faults.empty()) << Shown(tuned);
}

// --- time ---

TEST(Tuner, SharesItsTimeSoThatAllNumbersOfTokensAreReached) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c", "d", "e", "f"}, {}};
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    return (100.0 + static_cast<double>(tokens)) * (1.0 + 0.001 * (kernel[0] - 'a'));
  };
  lab.noise = 0.02;
  lab.overhead = 0.02;
  TuneOptions options;
  options.max_seconds = 40.0;
  const std::vector<int64_t> tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};
  const double begin = lab.seconds;
  const TunerResult tuned = Tune(&lab, tokens, options);
  EXPECT_EQ(tuned.ranges.back().last, 4096) << Shown(tuned);
  EXPECT_GE(tuned.ranges.size(), tokens.size());
  EXPECT_LT(lab.seconds - begin, 1.05 * options.max_seconds);
}

TEST(Tuner, KeepsWhatWasMeasuredWhenTimeRunsOut) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}});
  lab.overhead = 0.1;
  TuneOptions options;
  options.max_seconds = 10.0;
  const TunerResult tuned = Tune(&lab, {1, 2, 4, 8, 16, 32}, options);
  ASSERT_FALSE(tuned.ranges.empty());
  EXPECT_LT(tuned.ranges.back().last, 32);
  EXPECT_EQ(tuned.ranges.back().last, tuned.ranges.back().tokens);
  EXPECT_THAT(Shown(tuned), HasSubstr("max_seconds=10 ran out"));
  EXPECT_THAT(Shown(tuned), HasSubstr("numbers of tokens from this one on were not measured"));
}

TEST(Tuner, StopsWhenProgressSaysSo) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}});
  std::vector<TuneProgress> seen;
  TuneOptions options;
  options.progress = [&seen](const TuneProgress& progress) {
    seen.push_back(progress);
    return progress.tokens < 4;
  };
  const TunerResult tuned = Tune(&lab, {1, 2, 4, 8}, options);
  ASSERT_EQ(tuned.ranges.size(), 2U);
  EXPECT_EQ(tuned.ranges.back().last, 2);
  EXPECT_THAT(Shown(tuned), HasSubstr("stopped"));
  ASSERT_GT(seen.size(), 10U);
  EXPECT_EQ(seen.back().tokens, 4);
  EXPECT_EQ(seen.back().done, 2);
  EXPECT_EQ(seen.back().total, 4);
  EXPECT_EQ(seen[seen.size() - 2].best, "b");
  EXPECT_NEAR(seen[seen.size() - 2].best_us, 40.0, 1e-9);
  EXPECT_GT(seen.back().seconds, 0.0);
  EXPECT_GT(seen.back().seconds_left, 0.0);
  EXPECT_LT(seen.back().seconds_left, 60.0);
}

TEST(Tuner, WhatProgressThrowsIsTheCallersOwn) {
  FakeLab lab;
  TuneOptions options;
  options.progress = [](const TuneProgress&) -> bool { throw std::out_of_range("interrupt"); };
  EXPECT_THROW(static_cast<void>(Tune(&lab, {1}, options)), std::out_of_range);
}

TEST(Tuner, ReportsTheTimesOfThoseMeasuredToTheEnd) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 40}, {"c", 100}});
  std::map<std::pair<int64_t, std::string>, double> times;
  TuneOptions options;
  options.measured = [&times](const TuningTime& time) {
    EXPECT_TRUE(times.emplace(std::pair{time.tokens, time.tactic}, time.us).second) << "twice";
  };
  static_cast<void>(Tune(&lab, {1, 2}, options));
  EXPECT_EQ(times.size(), 8U) << "a and b at 1, 2, between at 3 and beyond at 4";
  EXPECT_NEAR((times[{2, "a"}]), 50.0, 1e-9);
  EXPECT_NEAR((times[{2, "b"}]), 40.0, 1e-9);
}

// --- noise ---

struct Rates {
  double flips = 0.0;   // tunes that did not end in the usual winner
  double regret = 0.0;  // mean of the winner's true time over that of the truly fastest, less 1
  double worst = 0.0;
};

// `difference`: how much faster b is than the untuned a.
Rates RatesOf(double difference, int tunes) {
  std::map<std::string, int> winners;
  Rates rates;
  for (int i = 0; i < tunes; ++i) {
    FakeLab lab;
    lab.kernels = {"a", {"a", "b", "c"}, {}};
    lab.time = TimesOf({{"a", 100.0}, {"b", 100.0 * (1.0 - difference)}, {"c", 104.0}});
    lab.noise = 0.02;
    lab.overhead = 1e-6;
    lab.seed = static_cast<uint64_t>(i) + 1;
    const std::string winner = RangeAt(Tune(&lab, {8}), 8).tactic;
    ++winners[winner];
    const double regret = lab.TimeOf(winner, 8, 0) / (100.0 * (1.0 - difference)) - 1.0;
    rates.regret += regret / tunes;
    rates.worst = std::max(rates.worst, regret);
  }
  int most = 0;
  for (const auto& [winner, count] : winners) {
    most = std::max(most, count);
  }
  rates.flips = 1.0 - static_cast<double>(most) / tunes;
  std::cout << "true difference " << difference << ": flips " << rates.flips << ", mean regret "
            << rates.regret << ", worst " << rates.worst << '\n';
  return rates;
}

TEST(Tuner, NoiseDoesNotFlipTheWinner) {
  constexpr int kTunes = 1000;
  const Rates none = RatesOf(0.0, kTunes);
  EXPECT_LT(none.flips, 0.04);
  EXPECT_EQ(none.worst, 0.0);
  const Rates half = RatesOf(0.005, kTunes);
  EXPECT_LT(half.flips, 0.20);
  EXPECT_LT(half.regret, 0.006);
  const Rates three = RatesOf(0.03, kTunes);
  EXPECT_LT(three.flips, 0.05);
  EXPECT_LT(three.regret, 0.002);
  const Rates ten = RatesOf(0.10, kTunes);
  EXPECT_EQ(ten.flips, 0.0);
  EXPECT_EQ(ten.worst, 0.0);
}

}  // namespace
}  // namespace hopyard::tune
