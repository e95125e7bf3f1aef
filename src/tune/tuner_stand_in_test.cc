// SPDX-License-Identifier: Apache-2.0
// What the tuner does where the untuned choice itself fails.
#include <cstdint>
#include <stdexcept>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tune/fake_lab.h"
#include "tune/tuner.h"

namespace hopyard::tune {
namespace {

using ::testing::HasSubstr;

TEST(TunerStandIn, AnotherStandsInForAnUntunedChoiceThatThrows) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 60}, {"x", 50}, {"y", 40}});
  lab.on_run["a"] = [](int64_t) { throw std::runtime_error("misaligned address"); };
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  ASSERT_GE(tuned.ranges.size(), 3U) << Shown(tuned);
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, "b+y");
    EXPECT_EQ(range.untuned, "a+x");
    EXPECT_EQ(range.us, 100.0);
    EXPECT_EQ(range.untuned_us, 0.0) << "it has not been measured";
  }
  ASSERT_NE(FindFault(tuned, "a+x"), nullptr) << Shown(tuned);
  EXPECT_EQ(FindFault(tuned, "a+x")->reason, "misaligned address");
  EXPECT_EQ(FindFault(tuned, "a+x")->tokens, 1);
  EXPECT_EQ(lab.RunsOf("a+x"), 1) << "not at other numbers of tokens either";
  EXPECT_EQ(lab.RunsOf("a+y"), 1) << "a is to blame: b ran beside x";
}

TEST(TunerStandIn, AnotherStandsInForAnUntunedChoiceThatLiesAboutSupport) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.on_prepare["a"] = [](int64_t) { throw Error(ErrorKind::kUnsupported, "no such tile"); };
  const TunerResult tuned = Tune(&lab, {1, 2});
  EXPECT_EQ(RangeAt(tuned, 1).tactic, "b");
  EXPECT_EQ(FindFault(tuned, "a")->reason, "no such tile");
  EXPECT_EQ(lab.RunsOf("a"), 0);
}

// Rows that are no numbers are not compared: the candidates would all look right.
TEST(TunerStandIn, AnotherStandsInForAnUntunedChoiceWhoseOutputIsNotFinite) {
  FakeLab lab;
  lab.num_kinds = 3;
  lab.right_kinds = 2;
  lab.kernels = {"a+x", {"a", "b"}, {"x", "y", "z"}};
  lab.time = TimesOf({{"a", 50}, {"b", 60}, {"x", 10}, {"y", 40}, {"z", 30}});
  lab.not_finite = {{"x", "hot: row 3 is NaN"}};
  lab.wrong = {{"z", "hot: row 5 is off"}};
  const TunerResult tuned = Tune(&lab, {1, 2});
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, "a+y");
    EXPECT_EQ(range.untuned_us, 0.0);
  }
  ASSERT_NE(FindFault(tuned, "a+x"), nullptr) << Shown(tuned);
  EXPECT_EQ(FindFault(tuned, "a+x")->reason, "hot: row 3 is NaN");
  EXPECT_NE(FindFault(tuned, "a+z"), nullptr) << "the others are held to what stands in";
  EXPECT_EQ(lab.RunsOf("a+x"), 2) << "at the first number of tokens alone";
  EXPECT_EQ(tuned.faults.size(), 2U) << Shown(tuned);
}

// Weights may overflow with every kernel: the layer is tuned all the same.
TEST(TunerStandIn, WhereNoOutputIsFiniteTheUntunedChoiceStays) {
  FakeLab lab;
  lab.time = TimesOf({{"a", 50}, {"b", 40}, {"x", 50}, {"y", 50}});
  lab.not_finite = {{"a", "row 3 is NaN"}, {"b", "row 3 is NaN"}};
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_EQ(range.tactic, "b+x");
    EXPECT_EQ(range.untuned_us, 100.0);
  }
  ASSERT_EQ(tuned.faults.size(), 1U) << "said once: " << Shown(tuned);
  EXPECT_EQ(tuned.faults.front(),
            (TuningFault{"a+x", 1,
                         "row 3 is NaN, nor is any other candidate's finite; this is not looked "
                         "at again"}));
}

TEST(TunerStandIn, AnUntunedChoiceThatFailsInALaterRoundIsReplaced) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 60}, {"c", 55}});
  int calls = 0;
  lab.on_run["a"] = [&calls](int64_t) {
    if (++calls == 8) {
      throw std::runtime_error("launch failed");
    }
  };
  const TunerResult tuned = Tune(&lab, {1, 2});
  EXPECT_EQ(calls, 8);
  for (const int64_t tokens : {1, 2}) {
    EXPECT_EQ(RangeAt(tuned, tokens).tactic, "c") << Shown(tuned);
    EXPECT_EQ(RangeAt(tuned, tokens).tokens, tokens) << "measured again: " << Shown(tuned);
  }
  EXPECT_EQ(FindFault(tuned, "a")->reason, "launch failed");
  EXPECT_EQ(tuned.faults.size(), 1U) << Shown(tuned);
}

// It was kept at 1 and 2 before it failed at 4: there, too, another one runs.
TEST(TunerStandIn, AnUntunedChoiceThatFailsLaterIsReplacedWhereItWasKept) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b", "c"}, {}};
  lab.time = TimesOf({{"a", 50}, {"b", 60}, {"c", 55}});
  lab.on_run["a"] = [](int64_t tokens) {
    if (tokens == 4) {
      throw std::runtime_error("launch failed");
    }
  };
  const TunerResult tuned = Tune(&lab, {1, 2, 4, 8});
  for (const int64_t tokens : {1, 2, 4, 8}) {
    EXPECT_EQ(RangeAt(tuned, tokens).tactic, "c") << Shown(tuned);
    EXPECT_EQ(RangeAt(tuned, tokens).tokens, tokens) << Shown(tuned);
  }
  // Without time to measure again nothing is said of these.
  TuneOptions options;
  options.progress = [](const TuneProgress& progress) { return progress.tokens < 8; };
  const TunerResult stopped = Tune(&lab, {1, 2, 4, 8}, options);
  ASSERT_EQ(stopped.ranges.size(), 1U) << Shown(stopped);
  EXPECT_EQ(stopped.ranges.front().tactic, "c");
  EXPECT_EQ(stopped.ranges.front().tokens, 4);
  EXPECT_THAT(Shown(stopped), HasSubstr("a at 2: stopped; failed later"));
}

TEST(TunerStandIn, AnUntunedChoiceThatFailsLastOfAllIsNotKept) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.time = [](const std::string& kernel, int64_t tokens, int) {
    return kernel == "a" ? 50.0 : tokens < 64 ? 60.0 : 40.0;
  };
  lab.on_run["a"] = [](int64_t tokens) {
    if (tokens == 32) {
      throw std::runtime_error("launch failed");
    }
  };
  TuneOptions options;
  options.progress = [](const TuneProgress& progress) { return progress.tokens != 32; };
  const TunerResult tuned = Tune(&lab, {1, 64}, options);
  EXPECT_EQ(RangeAt(tuned, 1).tactic, "b") << Shown(tuned);
  EXPECT_EQ(RangeAt(tuned, 1).tokens, 64) << Shown(tuned);
}

// The untuned choice is the model's between numbers of tokens, too: none of it is left to one that
// does not run, even where no time is left to look for borders.
TEST(TunerStandIn, NothingIsLeftToAnUntunedChoiceThatDoesNotRun) {
  for (const bool fails_above : {true, false}) {
    FakeLab lab;
    lab.kernels_at = [&](int64_t tokens) {
      const std::string untuned = (tokens < 37) == fails_above ? "c" : "a";
      return Kernels{untuned, {untuned, "b"}, {}};
    };
    lab.time = [&](const std::string& kernel, int64_t tokens, int) {
      return kernel == "b" ? 60.0 : (tokens < 37) == fails_above ? 50.0 : 90.0;
    };
    lab.on_run["a"] = [](int64_t) { throw std::runtime_error("launch failed"); };
    for (const bool stops : {false, true}) {
      TuneOptions options;
      options.progress = [&](const TuneProgress& now) {
        return !stops || now.tokens == 1 || now.tokens == 64;
      };
      const TunerResult tuned = Tune(&lab, {1, 64}, options);
      EXPECT_EQ(RangeAt(tuned, 36).tactic, fails_above ? "c" : "b") << Shown(tuned);
      EXPECT_EQ(RangeAt(tuned, 37).tactic, fails_above ? "b" : "c") << Shown(tuned);
    }
  }
}

TEST(TunerStandIn, NothingStandsInForWantOfMemory) {
  FakeLab lab;
  lab.kernels = {"a", {"a", "b"}, {}};
  lab.on_prepare["a"] = [](int64_t tokens) {
    HOPYARD_CHECK(tokens != 2, kOutOfMemory) << "no memory";
  };
  const TunerResult tuned = Tune(&lab, {1, 2, 4});
  ASSERT_EQ(tuned.ranges.size(), 2U) << Shown(tuned);
  EXPECT_EQ(tuned.ranges.back().tactic, "a");
  EXPECT_EQ(FindFault(tuned, "a")->tokens, 2);
}

TEST(TunerStandIn, WhereAllFailNothingIsTuned) {
  FakeLab lab;
  lab.on_run = {{"a", [](int64_t) { throw std::runtime_error("a"); }},
                {"b", [](int64_t) { throw std::runtime_error("b"); }}};
  const TunerResult tuned = Tune(&lab, {1, 2});
  EXPECT_TRUE(tuned.ranges.empty()) << Shown(tuned);
  EXPECT_EQ(lab.runs.size(), 4U) << "every pair once";
  EXPECT_THAT(Shown(tuned), HasSubstr("every candidate is on the blocklist or has failed"));
}

}  // namespace
}  // namespace hopyard::tune
