// SPDX-License-Identifier: Apache-2.0
// Measured ranges in plans for a GPU, made without one: which kernels they replace, and what the
// tuner is told of the others.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "bench/shapes.h"
#include "plan/backend_sm90.h"
#include "tests/forward_runner.h"
#include "tests/gpu/all_kernels.h"
#include "tests/gpu/mixed_tactics.h"

namespace hopyard::sm90 {
namespace {

const Backend& Hopper() {
  return *FindBackend();
}

PlanOptions OptionsFor(int64_t max_tokens) {
  PlanOptions options;
  options.max_tokens = max_tokens;
  return options;
}

// GEMM1+GEMM2 for so many tokens alone.
std::string PickAt(const MoeSpec& spec, int64_t tokens, const std::vector<TunedRange>& tuned) {
  PlanOptions options = OptionsFor(tokens);
  options.batch_invariant = true;
  return Hopper().Choose(spec, options, tuned).Chosen();
}

TunedRange RangeOf(int64_t last, int64_t tokens, const std::string& tactic) {
  TunedRange range;
  range.last = last;
  range.tokens = tokens;
  range.tactic = tactic;
  range.us = 95.123;
  range.untuned = "some_gemm1+some_gemm2";
  range.untuned_us = 97.2;
  return range;
}

// A pair that fits and is not what an untuned plan takes at that number of tokens.
std::string OtherTactic(const MoeSpec& spec, int64_t tokens) {
  const RankedTactics ranked = Hopper().Rank(spec, OptionsFor(tokens), tokens);
  for (auto one = ranked.gemm1.rbegin(); one != ranked.gemm1.rend(); ++one) {
    for (const RankedTactics::Entry& two : ranked.gemm2) {
      const std::string tactic = one->kernel + '+' + two.kernel;
      if (tactic != ranked.untuned && Hopper().HasTactic(spec, tactic)) {
        return tactic;
      }
    }
  }
  return {};
}

std::string ReasonOf(const Explanation& explanation, const std::string& kernel) {
  for (const Candidate& candidate : explanation.candidates) {
    if (candidate.kernel == kernel) {
      return candidate.reason;
    }
  }
  return "no such candidate";
}

MoeSpec Spec() {
  return bench::FindShape("qwen3-30b-a3b")->spec;
}

TEST(TunedChoice, RangesReplaceTheModelsKernelsUpToTheLast) {
  const MoeSpec spec = Spec();
  const std::string low = OtherTactic(spec, 8);
  const std::string high = OtherTactic(spec, 4096);
  ASSERT_NE(low, high);
  const std::vector<TunedRange> tuned = {RangeOf(8, 8, low), RangeOf(64, 32, "gone+gone"),
                                         RangeOf(100, 100, high)};
  for (const int64_t tokens : {1, 5, 8}) {
    EXPECT_EQ(PickAt(spec, tokens, tuned), low) << tokens;
  }
  for (const int64_t tokens : {9, 17, 40, 64}) {
    EXPECT_EQ(PickAt(spec, tokens, tuned), PickAt(spec, tokens, {})) << tokens;
  }
  for (const int64_t tokens : {65, 100}) {
    EXPECT_EQ(PickAt(spec, tokens, tuned), high) << tokens;
  }
  for (const int64_t tokens : {101, 8192, 1000000}) {
    EXPECT_EQ(PickAt(spec, tokens, tuned), PickAt(spec, tokens, {})) << tokens;
  }
  // A plan for all of them has the choices of each, and says so.
  const std::string chosen = Hopper().Choose(spec, OptionsFor(8192), tuned).Chosen(" ");
  for (const std::string& tactic : {low, high, PickAt(spec, 9, {})}) {
    EXPECT_NE(chosen.find(tactic.substr(0, tactic.find('+'))), std::string::npos) << chosen;
    EXPECT_NE(chosen.find(tactic.substr(tactic.find('+') + 1)), std::string::npos) << chosen;
  }
}

TEST(TunedChoice, AMissingLastRangeLeavesTheModelsKernelsAbove) {
  const MoeSpec spec = Spec();
  const std::vector<TunedRange> tuned = {RangeOf(8, 8, OtherTactic(spec, 8)),
                                         RangeOf(64, 64, "gone+gone")};
  for (const int64_t tokens : {9, 64, 65, 8192}) {
    EXPECT_EQ(PickAt(spec, tokens, tuned), PickAt(spec, tokens, {})) << tokens;
  }
}

// The other GEMM's kernel is the model's at the measured number of tokens.
TEST(TunedChoice, ATacticOfOneKernelIsCompleted) {
  const MoeSpec spec = Spec();
  const std::string tactic = OtherTactic(spec, 8);
  const std::string first = tactic.substr(0, tactic.find('+'));
  const std::string pick = PickAt(spec, 4, {RangeOf(64, 8, first)});
  EXPECT_EQ(pick.substr(0, pick.find('+')), first);
  EXPECT_TRUE(Hopper().HasTactic(spec, pick)) << pick;
  EXPECT_TRUE(Hopper().HasTactic(spec, first));
}

TEST(TunedChoice, ReasonsSayWhatWasMeasured) {
  const MoeSpec spec = Spec();
  const std::string tactic = OtherTactic(spec, 8);
  const std::string first = tactic.substr(0, tactic.find('+'));
  const std::vector<TunedRange> tuned = {RangeOf(8, 8, tactic), RangeOf(64, 64, tactic)};
  const std::string reason = ReasonOf(Hopper().Choose(spec, OptionsFor(64), tuned), first);
  EXPECT_NE(reason.find("GEMM1, tokens 1..64: tiles of "), std::string::npos) << reason;
  EXPECT_NE(reason.find("tuned: 95.1 us at 8 tokens, untuned some_gemm1+some_gemm2 97.2 us, "
                        "95.1 us at 64 tokens, untuned some_gemm1+some_gemm2 97.2 us"),
            std::string::npos)
      << reason;
  // Nothing of ranges that no batch reaches.
  const std::string small = ReasonOf(Hopper().Choose(spec, OptionsFor(8), tuned), first);
  EXPECT_EQ(small.find("at 64 tokens"), std::string::npos) << small;
  EXPECT_EQ(ReasonOf(Hopper().Choose(spec, OptionsFor(8), {}), first).find("tuned"),
            std::string::npos);
}

// A range of time 0 fills a gap between measurements.
TEST(TunedChoice, WhereNothingWasMeasuredNothingIsSaidToBe) {
  const MoeSpec spec = Spec();
  const std::string model = PickAt(spec, 8, {});
  TunedRange filled = RangeOf(8, 8, model);
  filled.untuned = model;
  const std::string first = model.substr(0, model.find('+'));
  const auto reason = [&] {
    return ReasonOf(Hopper().Choose(spec, OptionsFor(8), {filled}), first);
  };
  EXPECT_NE(reason().find("tuned: "), std::string::npos) << reason();
  filled.us = 0.0;
  EXPECT_EQ(reason().find("tuned: "), std::string::npos) << reason();
  EXPECT_EQ(PickAt(spec, 8, {filled}), model);
}

TEST(TunedChoice, WhereNothingWonTheModelChooses) {
  const MoeSpec spec = Spec();
  const std::string usual = PickAt(spec, 8, {});
  TunedRange range = RangeOf(64, 8, usual);
  range.untuned = usual;
  for (const int64_t tokens : {1, 8, 33, 64, 65}) {
    EXPECT_EQ(PickAt(spec, tokens, {range}), PickAt(spec, tokens, {})) << tokens;
  }
  const std::string reason =
      ReasonOf(Hopper().Choose(spec, OptionsFor(8), {range}), usual.substr(0, usual.find('+')));
  EXPECT_NE(reason.find("tuned: 95.1 us at 8 tokens"), std::string::npos) << reason;
}

// What the model takes now was not measured, or was and did not win.
TEST(TunedChoice, WhereTheModelHasLearntSinceWhatWasMeasuredStays) {
  const MoeSpec spec = Spec();
  const std::string once = OtherTactic(spec, 8);
  TunedRange range = RangeOf(64, 8, once);
  range.untuned = once;
  for (const int64_t tokens : {1, 8, 33, 64}) {
    EXPECT_EQ(PickAt(spec, tokens, {range}), once) << tokens;
  }
  EXPECT_EQ(PickAt(spec, 65, {range}), PickAt(spec, 65, {}));
  range.us = 0.0;
  EXPECT_EQ(PickAt(spec, 8, {range}), PickAt(spec, 8, {}));
}

TEST(TunedChoice, ANamedTacticWins) {
  const MoeSpec spec = Spec();
  PlanOptions options = OptionsFor(8);
  options.tactic = Hopper().Rank(spec, options, 8).untuned;
  const std::vector<TunedRange> tuned = {RangeOf(64, 8, OtherTactic(spec, 8))};
  EXPECT_EQ(Hopper().Choose(spec, options, tuned).candidates,
            Hopper().Choose(spec, options, {}).candidates);
}

// Kernels that round more than the formats ask come from no table.
TEST(TunedChoice, NoTableNamesAKernelThatRoundsMore) {
  const MoeSpec spec = test::SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kMxFp8);
  int by_name = 0;
  for (const Candidate& candidate : Hopper().Choose(spec, OptionsFor(64), {}).candidates) {
    PlanOptions named = OptionsFor(64);
    named.tactic = candidate.kernel;
    if (candidate.reason.find("GEMM1, by name only") == std::string::npos) {
      continue;
    }
    ++by_name;
    EXPECT_TRUE(Hopper().Choose(spec, named, {}).supported) << candidate.kernel;
    EXPECT_FALSE(Hopper().HasTactic(spec, candidate.kernel));
    EXPECT_EQ(PickAt(spec, 64, {RangeOf(64, 64, candidate.kernel)}), PickAt(spec, 64, {}));
  }
  EXPECT_GT(by_name, 0);
}

TEST(TunedChoice, HasTacticDeniesWhatDoesNotRun) {
  const MoeSpec spec = Spec();
  const RankedTactics ranked = Hopper().Rank(spec, OptionsFor(8), 8);
  EXPECT_TRUE(Hopper().HasTactic(spec, ranked.untuned));
  for (const std::string& tactic :
       {std::string(), std::string("gone"), ranked.gemm1[0].kernel + "+gone",
        ranked.gemm1[0].kernel + '+', ranked.gemm2[0].kernel,
        ranked.gemm2[0].kernel + '+' + ranked.gemm1[0].kernel}) {
    EXPECT_FALSE(Hopper().HasTactic(spec, tactic)) << tactic;
  }
  MoeSpec odd = spec;
  odd.hidden_size = 252;
  EXPECT_FALSE(Hopper().HasTactic(odd, ranked.untuned));
}

TEST(TunedChoice, RanksEveryKernelOfEachGemmCheapestFirst) {
  for (const bench::ModelShape& model : bench::ModelShapes()) {
    for (const int64_t tokens : {1, 64, 4096}) {
      const RankedTactics ranked = Hopper().Rank(model.spec, OptionsFor(8192), tokens);
      EXPECT_EQ(ranked.untuned, PickAt(model.spec, tokens, {})) << model.name;
      for (const auto* entries : {&ranked.gemm1, &ranked.gemm2}) {
        ASSERT_FALSE(entries->empty());
        EXPECT_TRUE(
            std::is_sorted(entries->begin(), entries->end(),
                           [](const auto& one, const auto& other) { return one.us < other.us; }));
        EXPECT_GT(entries->front().us, 0.0);
      }
      for (const RankedTactics::Entry& entry : ranked.gemm1) {
        EXPECT_TRUE(Hopper().HasTactic(model.spec, entry.kernel))
            << model.name << ' ' << entry.kernel;
      }
    }
  }
}

// Each GEMM has its own tiles.
TEST(TunedChoice, EveryPairOfKernelsFits) {
  for (const test::FormatPair& pair : test::SupportedPairs()) {
    const MoeSpec spec = test::SmallSpec(pair.weights, pair.activations);
    const RankedTactics ranked = Hopper().Rank(spec, OptionsFor(64), 64);
    for (const RankedTactics::Entry& one : ranked.gemm1) {
      for (const RankedTactics::Entry& two : ranked.gemm2) {
        PlanOptions options = OptionsFor(64);
        options.tactic = one.kernel + '+' + two.kernel;
        EXPECT_TRUE(Hopper().HasTactic(spec, options.tactic)) << options.tactic;
        EXPECT_EQ(PickAt(spec, 64, {RangeOf(64, 64, options.tactic)}), options.tactic);
        EXPECT_TRUE(Hopper().Choose(spec, options, {}).supported) << options.tactic;
      }
    }
  }
}

// NVFP4 codes have kernels of small tiles alone, which do not keep GEMM1 from large ones.
TEST(TunedChoice, TheModelMixesTilesWhereThatIsCheaper) {
  MoeSpec spec = Spec();
  spec.weights = WeightFormat::kNvFp4;
  spec.activations = ActivationFormat::kFp8PerToken;
  const std::string few = PickAt(spec, 1, {});
  const std::string many = PickAt(spec, 4096, {});
  const auto tiles = [](const std::string& tactic) {
    const size_t plus = tactic.find('+');
    return std::pair{test::TilesOf(tactic.substr(0, plus)), test::TilesOf(tactic.substr(plus + 1))};
  };
  EXPECT_EQ(tiles(few).first, tiles(few).second) << few;
  if (test::MixedTactics(spec).empty()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  EXPECT_GT(tiles(many).first, tiles(many).second) << many;
}

MoeSpec PackableSpec(ActivationFormat activations) {
  MoeSpec spec = Spec();
  spec.weights = WeightFormat::kMxFp4;
  spec.activations = activations;
  return spec;
}

// Options of a plan for packed weights.
PlanOptions PackedOptions(const MoeSpec& spec, int64_t tokens) {
  WeightsDesc desc;
  desc.packed = true;
  PlanOptions options = OptionsFor(tokens);
  options.weight_orders = OrdersOf(spec, desc);
  return options;
}

// NaN for what is not listed.
double TimeOf(const std::vector<RankedTactics::Entry>& entries, const std::string& kernel) {
  const auto found =
      std::find_if(entries.begin(), entries.end(),
                   [&](const RankedTactics::Entry& entry) { return entry.kernel == kernel; });
  return found == entries.end() ? NAN : found->us;
}

// Kernels that one for packed weights replaces are the same one there: listed once, expected to
// take its time, which is not that of the checkpoint's layout.
TEST(TunedChoice, PackedWeightsHaveTheirKernelsTimes) {
  if (!test::HasAllKernels()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  for (const ActivationFormat activations :
       {ActivationFormat::kBf16, ActivationFormat::kFp8Block128}) {
    const MoeSpec spec = PackableSpec(activations);
    const RankedTactics natural = Hopper().Rank(spec, OptionsFor(64), 64);
    const RankedTactics packed = Hopper().Rank(spec, PackedOptions(spec, 64), 64);
    std::set<double> times;
    for (const RankedTactics::Entry& entry : packed.gemm1) {
      EXPECT_TRUE(times.insert(entry.us).second) << entry.kernel;
      const auto same =
          std::find_if(natural.gemm1.begin(), natural.gemm1.end(),
                       [&](const RankedTactics::Entry& one) { return one.kernel == entry.kernel; });
      ASSERT_NE(same, natural.gemm1.end());
      EXPECT_NE(entry.us, same->us) << entry.kernel;
    }
    EXPECT_LT(packed.gemm1.size(), natural.gemm1.size());
    EXPECT_LT(packed.gemm1.front().us, natural.gemm1.front().us);
    // The cheapest, or one with tiles of as many rows in both GEMMs that takes 1 % more at most.
    const size_t plus = packed.untuned.find('+');
    EXPECT_LT(TimeOf(packed.gemm1, packed.untuned.substr(0, plus)) +
                  TimeOf(packed.gemm2, packed.untuned.substr(plus + 1)),
              1.01 * (packed.gemm1.front().us + packed.gemm2.front().us));
    // Where no two are within that of each other, the cheapest.
    const RankedTactics few = Hopper().Rank(spec, PackedOptions(spec, 4), 4);
    EXPECT_EQ(few.untuned, few.gemm1.front().kernel + '+' + few.gemm2.front().kernel);
  }
}

// One kernel that rounds as it goes or leaves that to a pass of its own is two candidates.
TEST(TunedChoice, PackedKernelsThatRoundOrDoNotAreTwo) {
  const MoeSpec spec = PackableSpec(ActivationFormat::kFp8Block128);
  if (!test::HasAllKernels()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  std::set<std::string> listed;
  for (const auto& entry : Hopper().Rank(spec, PackedOptions(spec, 64), 64).gemm1) {
    listed.insert(entry.kernel);
  }
  EXPECT_TRUE(listed.contains("mxfp4_fp8_gated_m64n32_s8"));
  EXPECT_TRUE(listed.contains("mxfp4_fp8_gated_m128n32_s3"));
  EXPECT_TRUE(listed.contains("mxfp4_fp8_gated_m64n16_s8"));
  EXPECT_FALSE(listed.contains("mxfp4_fp8_gated_m64n16_s4"));
}

// Names of one packed kernel are one choice: what was measured under another is said of it.
TEST(TunedChoice, ExplainsThePackedKernelsThatRun) {
  const MoeSpec spec = PackableSpec(ActivationFormat::kBf16);
  const PlanOptions options = PackedOptions(spec, 4);
  if (!test::HasAllKernels()) {
    EXPECT_EQ(Hopper().Choose(spec, options, {}).reason.find("there is no kernel for packed"), 0U);
    GTEST_SKIP() << "a build of a few kernels";
  }
  const std::string other = "mxfp4_bf16_gated_m64n16_s4+mxfp4_bf16_m128n16_s4";
  TunedRange range = RangeOf(4, 4, other);
  range.untuned = other;
  const Explanation explanation = Hopper().Choose(spec, options, {range});
  EXPECT_EQ(explanation.Chosen(), "mxfp4_bf16_gated_m64n16_s8+mxfp4_bf16_m128n16_s8");
  for (const Candidate& candidate : explanation.candidates) {
    const bool named =
        candidate.reason.find("packed, runs as mxfp4_bf16_packed_") != std::string::npos;
    const bool same = candidate.reason.find("no other than ") != std::string::npos;
    EXPECT_EQ(named, candidate.chosen || same) << candidate.kernel << ": " << candidate.reason;
    EXPECT_EQ(candidate.reason.find("tuned: 95.1 us at 4 tokens") != std::string::npos,
              candidate.chosen)
        << candidate.kernel << ": " << candidate.reason;
    EXPECT_TRUE(candidate.kernel != "mxfp4_bf16_gated_m64n16_s4" || same) << candidate.reason;
  }
}

TEST(TunedChoice, ExplainsThePackedKernelsOfFewTokens) {
  const MoeSpec spec = PackableSpec(ActivationFormat::kBf16);
  if (!test::HasAllKernels()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  const Explanation explanation = Hopper().Choose(spec, PackedOptions(spec, 4096), {});
  EXPECT_NE(ReasonOf(explanation, "mxfp4_bf16_gated_m64n16_s4")
                .find("no other than mxfp4_bf16_gated_m64n16_s8"),
            std::string::npos)
      << ReasonOf(explanation, "mxfp4_bf16_gated_m64n16_s4");
}

// GEMM1's kernel alone is a tactic: the model completes it.
TEST(TunedChoice, ARangeOfOneKernelIsTheModelsWhereItsKernelIs) {
  const MoeSpec spec = PackableSpec(ActivationFormat::kBf16);
  if (!test::HasAllKernels()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  const PlanOptions options = PackedOptions(spec, 4);
  const std::string usual = Hopper().Choose(spec, options, {}).Chosen();
  TunedRange range = RangeOf(4, 4, usual.substr(0, usual.find('+')));
  range.untuned = range.tactic;
  const Explanation explanation = Hopper().Choose(spec, options, {range});
  EXPECT_EQ(explanation.Chosen(), usual);
  EXPECT_NE(ReasonOf(explanation, range.tactic).find("tuned: 95.1 us"), std::string::npos);
}

// Weights of these activations cannot be packed, which a plan says as early.
TEST(TunedChoice, RefusesPackedWeightsWithoutKernels) {
  MoeSpec spec = Spec();
  spec.weights = WeightFormat::kNvFp4;
  spec.activations = ActivationFormat::kFp8PerToken;
  const Explanation explanation = Hopper().Choose(spec, PackedOptions(spec, 64), {});
  EXPECT_FALSE(explanation.supported);
  EXPECT_EQ(explanation.reason.rfind("there is no kernel for packed nvfp4 weights in place of ", 0),
            0U)
      << explanation.reason;
  EXPECT_TRUE(Hopper().Choose(spec, OptionsFor(64), {}).supported);
}

// Of shared experts in another format the routed ones alone are packed.
TEST(TunedChoice, SharedExpertsOfAnotherFormatAreNotPacked) {
  MoeSpec spec = PackableSpec(ActivationFormat::kBf16);
  spec.shared = {1, false, 1.0F, WeightFormat::kBf16};
  if (!test::HasAllKernels()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  for (const Candidate& candidate : Hopper().Choose(spec, PackedOptions(spec, 64), {}).candidates) {
    const bool packed = candidate.reason.find("packed, runs as ") != std::string::npos;
    EXPECT_TRUE(!candidate.chosen || packed == candidate.kernel.starts_with("mxfp4_bf16_"))
        << candidate.kernel << ": " << candidate.reason;
  }
}

// Shared experts of another format take a GEMM's tiles as well.
TEST(TunedChoice, SharedExpertsTakeTheTilesOfTheirGemm) {
  MoeSpec spec = Spec();
  spec.shared = {1, false, 1.0F, WeightFormat::kMxFp4};
  int fit = 0;
  int unfit = 0;
  const RankedTactics ranked = Hopper().Rank(spec, OptionsFor(64), 64);
  for (const RankedTactics::Entry& one : ranked.gemm1) {
    for (const RankedTactics::Entry& two : ranked.gemm2) {
      PlanOptions options = OptionsFor(64);
      options.tactic = one.kernel + '+' + two.kernel;
      const Explanation explanation = Hopper().Choose(spec, options, {});
      EXPECT_EQ(Hopper().HasTactic(spec, options.tactic), explanation.supported);
      if (!explanation.supported) {
        ++unfit;
        EXPECT_EQ(explanation.reason, "tactic '" + options.tactic +
                                          "': the same GEMM of shared experts has no kernel with "
                                          "tiles of as many rows; name another");
        continue;
      }
      ++fit;
      for (const Candidate& candidate : explanation.candidates) {
        const bool of_gemm1 = candidate.reason.find("GEMM1") != std::string::npos;
        if (candidate.chosen) {
          EXPECT_EQ(test::TilesOf(candidate.kernel).first,
                    test::TilesOf(of_gemm1 ? one.kernel : two.kernel).first)
              << candidate.kernel << " with " << options.tactic;
        }
      }
    }
  }
  EXPECT_GT(fit, 0);
  if (test::MixedTactics(spec).empty()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  EXPECT_GT(unfit, 0) << "MXFP4 has kernels with tiles of 128 rows now: name another format here";
}

}  // namespace
}  // namespace hopyard::sm90
