// SPDX-License-Identifier: Apache-2.0
// Which measurements a plan takes, and what it says and counts of them.
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan/plan_impl.h"
#include "tests/layer.h"
#include "tests/temporary_directory.h"
#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

using test::MiniSpec;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int kThreads = 2;
constexpr const char* kScalar = "cpu_scalar_bf16";

PlanOptions Options(int64_t max_tokens = 64) {
  PlanOptions options;
  options.max_tokens = max_tokens;
  options.num_threads = kThreads;
  return options;
}

std::string BestKernel() {
  return "cpu_" + std::string(ToString(BestIsa())) + "_bf16";
}

// `tactic` up to 16 tokens, the best kernel up to 32.
TunedLayer LayerFor(const TuningKey& key, const std::string& tactic = kScalar) {
  TunedLayer layer;
  layer.key = key;
  layer.ranges = {{16, 8, tactic, 10.0, BestKernel(), 11.0, 0.01},
                  {32, 24, BestKernel(), 30.0, BestKernel(), 30.0, 0.0}};
  layer.routing = "uniform";
  return layer;
}

TuningTable TableFor(const TuningKey& key, const std::string& tactic = kScalar) {
  TuningTable table(MachineOf(Device{}, kThreads));
  table.Put(LayerFor(key, tactic));
  return table;
}

Plan PlanWith(PlanOptions options, const TuningTable& table) {
  options.tuning = std::make_shared<const TuningTable>(table);
  return MakePlan(MiniSpec(), Device{}, options);
}

Plan PlanOf(const PlanOptions& options) {
  return MakePlan(MiniSpec(), Device{}, options);
}

std::string ReasonFor(const Explanation& explanation, const std::string& kernel) {
  for (const Candidate& candidate : explanation.candidates) {
    if (candidate.kernel == kernel) {
      return (candidate.chosen ? "chosen: " : "") + candidate.reason;
    }
  }
  return "";
}

// Tables and statistics of the process are each test's own.
class Lookup : public ::testing::Test {
 protected:
  Lookup() {
    ForgetTuning();
    ResetTuningStats();
  }
  void TearDown() override { ForgetTuning(); }

  const TuningKey key_ = KeyOf(MiniSpec(), Options());
};

TEST_F(Lookup, WithoutATableThePlanIsUntunedAndCounted) {
  const Plan plan = PlanOf(Options());
  EXPECT_THAT(plan.impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
  const TuningStats stats = GetTuningStats();
  EXPECT_EQ(stats.hits, 0);
  EXPECT_EQ(stats.misses, 1);
  EXPECT_THAT(stats.missed, ElementsAre(ToString(key_)));
  EXPECT_THAT(stats.ignored, IsEmpty());
  std::ignore = PlanOf(Options());
  EXPECT_EQ(GetTuningStats().misses, 2);
  EXPECT_EQ(GetTuningStats().missed.size(), 1U);
}

TEST_F(Lookup, RangesChooseByNumberOfTokens) {
  const Plan plan = PlanWith(Options(), TableFor(key_));
  EXPECT_THAT(plan.impl().isas, ElementsAre(IsaRange{16, Isa::kScalar}, IsaRange{64, BestIsa()}));
  for (int64_t tokens = 1; tokens <= 64; ++tokens) {
    EXPECT_EQ(plan.impl().IsaFor(tokens), tokens <= 16 ? Isa::kScalar : BestIsa()) << tokens;
  }
  EXPECT_THAT(ReasonFor(plan.Explain(), kScalar),
              HasSubstr("chosen: 1 .. 16 tokens: tuned: 10.0 us at 8 tokens, untuned " +
                        BestKernel() + " 11.0 us"));
  EXPECT_THAT(ReasonFor(plan.Explain(), BestKernel()),
              HasSubstr("17 .. 32 tokens: tuned: 30.0 us at 24 tokens"));
  EXPECT_THAT(
      ReasonFor(plan.Explain(), BestKernel()),
      HasSubstr(
          "33 .. 64 tokens: widest instruction set; not measured (untuned beyond 32 tokens)"));
  const TuningStats stats = GetTuningStats();
  EXPECT_EQ(stats.hits, 1);
  EXPECT_EQ(stats.misses, 0);
  EXPECT_EQ(stats.stale, 0);
}

TEST_F(Lookup, WhereNothingWasMeasuredTheUntunedChoiceRuns) {
  TunedLayer layer = LayerFor(key_);
  layer.ranges = {{7, 7, BestKernel(), 0.0, BestKernel()},
                  {16, 8, kScalar, 10.0, BestKernel(), 11.0, 0.01}};
  TuningTable table(MachineOf(Device{}, kThreads));
  table.Put(layer);
  EXPECT_EQ(TuningTable::FromJson(table.ToJson()), table);
  const Plan plan = PlanWith(Options(16), table);
  EXPECT_THAT(plan.impl().isas, ElementsAre(IsaRange{7, BestIsa()}, IsaRange{16, Isa::kScalar}));
  EXPECT_THAT(ReasonFor(plan.Explain(), BestKernel()),
              HasSubstr("1 .. 7 tokens: widest instruction set; not measured"));
}

TEST_F(Lookup, RangesEndAtTheCapacity) {
  EXPECT_THAT(PlanWith(Options(20), TableFor(key_)).impl().isas,
              ElementsAre(IsaRange{16, Isa::kScalar}, IsaRange{20, BestIsa()}));
  const Plan small = PlanWith(Options(5), TableFor(key_));
  EXPECT_THAT(small.impl().isas, ElementsAre(IsaRange{5, Isa::kScalar}));
  EXPECT_THAT(ReasonFor(small.Explain(), kScalar), HasSubstr("chosen: 1 .. 5 tokens: tuned"));
  EXPECT_THAT(ReasonFor(small.Explain(), kScalar), ::testing::Not(HasSubstr("not measured")));
}

TEST_F(Lookup, BatchInvariantPlansHaveOneKernel) {
  PlanOptions options = Options();
  options.batch_invariant = true;
  const Plan plan = PlanWith(options, TableFor(key_));
  EXPECT_THAT(plan.impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
  options.max_tokens = 16;
  EXPECT_THAT(PlanWith(options, TableFor(key_)).impl().isas,
              ElementsAre(IsaRange{16, Isa::kScalar}));
  EXPECT_THAT(ReasonFor(plan.Explain(), BestKernel()), HasSubstr("batch_invariant"));
}

// All instruction sets give the same bits, so a tuned plan computes what the untuned one does; and
// a plan whose chunks cross ranges, too.
TEST_F(Lookup, TunedPlansGiveTheBitsOfUntunedOnes) {
  const test::TestLayer layer(MiniSpec());
  for (const int64_t tokens : {1, 16, 17, 33, 64}) {
    test::LayerInputs inputs(layer.spec(), tokens);
    inputs.Logits();
    test::RunOptions options;
    options.plan = Options();
    options.plan.untuned = true;
    const test::RunResult wanted = layer.Run(inputs, options);
    options.plan.untuned = false;
    options.plan.tuning = std::make_shared<const TuningTable>(TableFor(key_));
    for (const bool chunks : {false, true}) {
      // 20 tokens a chunk: whole chunks run the second range's kernel, the rest the first's.
      options.plan.workspace_cap =
          chunks ? MakePlan(layer.spec(), Device{}, Options(20)).workspace_bytes() : 0;
      const test::RunResult got = layer.Run(inputs, options);
      EXPECT_EQ(got.output, wanted.output) << tokens;
      if (!chunks) {  // rows are in the order of their chunk's experts
        EXPECT_EQ(got.rows, wanted.rows) << tokens;
      }
    }
  }
}

TEST_F(Lookup, TablesAreLookedIntoInOrder) {
  const auto marked = [&](double us) {
    TuningTable table(MachineOf(Device{}, kThreads));
    TunedLayer layer = LayerFor(key_);
    layer.ranges[0].us = us;
    table.Put(layer);
    return table;
  };
  const auto taken = [&](const PlanOptions& options) {
    return ReasonFor(Explain(MiniSpec(), Device{}, options), kScalar);
  };
  UseTuning(marked(1.0));
  EXPECT_THAT(taken(Options()), HasSubstr("tuned: 1.0 us"));
  UseTuning(marked(2.0));  // the last one goes before those given earlier
  EXPECT_THAT(taken(Options()), HasSubstr("tuned: 2.0 us"));
  UseTuning(TuningTable(MachineOf(Device{}, kThreads)));  // has no such layer
  EXPECT_THAT(taken(Options()), HasSubstr("tuned: 2.0 us"));
  PlanOptions options = Options();
  options.tuning = std::make_shared<const TuningTable>(marked(3.0));
  EXPECT_THAT(taken(options), HasSubstr("tuned: 3.0 us"));
  ForgetTuning();
  EXPECT_THAT(taken(options), HasSubstr("tuned: 3.0 us"));
  EXPECT_THAT(taken(Options()), ::testing::Not(HasSubstr("tuned")));
  EXPECT_EQ(GetTuningStats().hits + GetTuningStats().misses, 0) << "Explain makes no plan";
}

TEST_F(Lookup, ATacticOrUntunedLooksNothingUp) {
  UseTuning(TableFor(key_));
  PlanOptions options = Options();
  options.untuned = true;
  EXPECT_THAT(PlanOf(options).impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
  options.untuned = false;
  options.tactic = BestKernel();
  EXPECT_THAT(PlanOf(options).impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
  const TuningStats stats = GetTuningStats();
  EXPECT_EQ(stats.hits + stats.misses, 0);
  std::ignore = PlanOf(Options());
  EXPECT_EQ(GetTuningStats().hits, 1);
}

TEST_F(Lookup, LayersOfOtherPathsAndRoutingsServeAndSaySo) {
  UseTuning(TableFor(key_));
  PlanOptions options = Options();
  options.path = {true, false, true};
  MoeSpec spec = MiniSpec();
  spec.routing = RoutingRule::Sigmoid();
  const Plan plan = MakePlan(spec, Device{}, options);
  EXPECT_THAT(ReasonFor(plan.Explain(), kScalar),
              HasSubstr("(measured with another routing rule; measured with logits, finalised, no "
                        "replay; untuned beyond 32 tokens)"));
  EXPECT_EQ(GetTuningStats().hits, 1);
  spec.top_k = 1;
  std::ignore = MakePlan(spec, Device{}, options);
  EXPECT_EQ(GetTuningStats().misses, 1);
}

TEST_F(Lookup, TacticsThatAreNotThereAreStale) {
  const Plan plan = PlanWith(Options(), TableFor(key_, "cpu_quantum_bf16"));
  EXPECT_THAT(plan.impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
  EXPECT_THAT(ReasonFor(plan.Explain(), BestKernel()),
              HasSubstr("the measured cpu_quantum_bf16 does not run here"));
  const TuningStats stats = GetTuningStats();
  EXPECT_EQ(stats.hits, 1);
  EXPECT_EQ(stats.stale, 1);
}

TEST_F(Lookup, ALayerWithoutRangesIsUntuned) {
  TuningTable table(MachineOf(Device{}, kThreads));
  TunedLayer layer = LayerFor(key_);
  layer.ranges.clear();
  table.Put(layer);
  const Plan plan = PlanWith(Options(), table);
  EXPECT_THAT(plan.impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
  EXPECT_THAT(ReasonFor(plan.Explain(), BestKernel()),
              HasSubstr("(no table has measurements of this layer)"));
  EXPECT_EQ(GetTuningStats().misses, 1);
  // One behind it that has measurements serves.
  UseTuning(TableFor(key_));
  EXPECT_THAT(PlanWith(Options(), table).impl().isas,
              ElementsAre(IsaRange{16, Isa::kScalar}, IsaRange{64, BestIsa()}));
}

TEST_F(Lookup, TablesOfOtherMachinesAreReportedOnce) {
  const auto ignored_of = [&](auto change) {
    TuningMachine machine = MachineOf(Device{}, kThreads);
    change(&machine);
    TuningTable table(machine);
    table.Put(LayerFor(key_));
    ForgetTuning();
    ResetTuningStats();
    UseTuning(table);
    for (int i = 0; i < 3; ++i) {
      EXPECT_THAT(PlanOf(Options()).impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
    }
    EXPECT_EQ(GetTuningStats().misses, 3);
    EXPECT_EQ(GetTuningStats().ignored.size(), 1U);
    return GetTuningStats().ignored.empty() ? "" : GetTuningStats().ignored[0];
  };
  EXPECT_THAT(ignored_of([](TuningMachine* m) { m->device = "Another"; }),
              ::testing::AllOf(HasSubstr("UseTuning: a table of Another, 2 threads"),
                               HasSubstr("not used for plans of " + CpuModel()),
                               HasSubstr("measure again")));
  EXPECT_THAT(ignored_of([](TuningMachine* m) { m->units = 7; }), HasSubstr("7 threads"));
  EXPECT_THAT(ignored_of([](TuningMachine* m) { m->isa = "amx"; }), HasSubstr("amx"));
  EXPECT_THAT(ignored_of([](TuningMachine* m) { m->library = "9.9"; }), HasSubstr("Hopyard 9.9"));
  EXPECT_THAT(ignored_of([](TuningMachine* m) {
                *m = {"NVIDIA A1", 9, "", m->library};
              }),
              HasSubstr("NVIDIA A1 of 9 multiprocessors"));
}

TEST_F(Lookup, ThreadsAreThoseOfThePlan) {
  UseTuning(TableFor(key_));
  PlanOptions options = Options();
  options.num_threads = kThreads + 1;
  EXPECT_THAT(PlanOf(options).impl().isas, ElementsAre(IsaRange{64, BestIsa()}));
  EXPECT_THAT(GetTuningStats().ignored, ElementsAre(HasSubstr("2 threads")));
  std::ignore = PlanOf(Options());
  EXPECT_EQ(GetTuningStats().hits, 1);
}

TEST_F(Lookup, StatisticsStartAgain) {
  std::ignore = PlanOf(Options());
  ResetTuningStats();
  const TuningStats stats = GetTuningStats();
  EXPECT_EQ(stats.misses, 0);
  EXPECT_THAT(stats.missed, IsEmpty());
}

}  // namespace
}  // namespace hopyard::tune::testing
