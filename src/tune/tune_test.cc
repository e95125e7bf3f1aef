// SPDX-License-Identifier: Apache-2.0
// Tune from the plan to the plan: a table of a real layer on the CPU, and what MakePlan does with
// it. The rules are tuner_test.cc's, what is measured layer_lab_test.cc's.
#include "hopyard/tune.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/error.h"

#include "tests/layer.h"

namespace hopyard {
namespace {

using ::testing::HasSubstr;

PlanOptions PlanFor(int64_t tokens) {
  PlanOptions options;
  options.max_tokens = tokens;
  options.num_threads = 1;
  return options;
}

// Flushing the caches takes the most time: little of it.
TuneOptions QuickOptions() {
  TuneOptions options;
  options.max_seconds = 1.0;
  options.routings = {"uniform"};
  options.tokens = {4};
  return options;
}

TEST(Tune, GivesATableThatPlansUse) {
  const test::TestLayer layer(test::MiniSpec());
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  ResetTuningStats();
  std::vector<std::string> measured;
  TuneOptions options = QuickOptions();
  options.measured = [&measured](const TuningTime& time) { measured.push_back(time.tactic); };
  const TuningTable table = Tune(plan, layer.weights(), options);
  EXPECT_EQ(table.machine(), MachineOf(Device{}, 1));
  ASSERT_EQ(table.layers().size(), 1U);
  const TunedLayer& tuned = table.layers().front();
  EXPECT_EQ(tuned.key, KeyOf(layer.spec(), plan.options()));
  EXPECT_EQ(tuned.routing, "uniform");
  const auto at = std::find_if(tuned.ranges.begin(), tuned.ranges.end(),
                               [](const TunedRange& range) { return range.tokens == 4; });
  ASSERT_NE(at, tuned.ranges.end());
  const std::vector<std::string> kernels = test::RunnableKernels(layer.spec());
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_NE(std::find(kernels.begin(), kernels.end(), range.tactic), kernels.end());
    EXPECT_EQ(range.untuned, plan.Explain().Chosen());
  }
  EXPECT_GE(GetTuningStats().measured, 1);
  EXPECT_NE(std::find(measured.begin(), measured.end(), at->tactic), measured.end());
  EXPECT_EQ(TuningTable::FromJson(table.ToJson()), table);

  PlanOptions with = PlanFor(4);
  with.batch_invariant = true;  // the kernel for four tokens alone
  with.tuning = std::make_shared<TuningTable>(table);
  const Plan second = MakePlan(layer.spec(), Device{}, with);
  EXPECT_EQ(GetTuningStats().hits, 1);
  EXPECT_EQ(second.Explain().Chosen(), at->tactic) << second.Explain().ToString();
}

// What was measured with MN-major weights is found for such, and for no others.
TEST(Tune, MnMajorWeightsAreALayerOfTheirOwn) {
  test::WeightSource source;
  source.spec = test::MiniSpec();
  source.layout.major = MajorOrder::kMnMajor;
  source.layout.order = RowOrder::kInterleavedGateUp;
  const test::TestLayer layer(source);
  const TuningTable table =
      Tune(MakePlan(layer.spec(), Device{}, PlanFor(4)), layer.weights(), QuickOptions());
  WeightOrders orders;
  orders.gemm1 = ReadOrder::kMnMajorInterleaved;
  orders.gemm2 = ReadOrder::kMnMajor;
  EXPECT_EQ(table.layers().front().key.weight_orders, orders);
  PlanOptions with = PlanFor(4);
  with.tuning = std::make_shared<TuningTable>(table);
  EXPECT_THAT(MakePlan(layer.spec(), Device{}, with).Explain().ToString(),
              HasSubstr("no table has measurements of this layer"));
  with.weight_orders = orders;
  EXPECT_THAT(MakePlan(layer.spec(), Device{}, with).Explain().ToString(), HasSubstr("tuned: "));
}

// Everything but MN-major matrices has the K-major kernels.
TEST(OrdersOf, AreThoseThatHaveKernels) {
  test::WeightSource source;
  source.spec = test::MiniSpec();
  const auto orders = [&] { return OrdersOf(source.spec, test::LayerWeights(source).desc()); };
  for (const test::WeightLayout& layout : test::KMajorLayouts(0)) {
    if (layout.major == MajorOrder::kKMajor) {  // blocks of K need larger matrices
      source.layout = layout;
      EXPECT_EQ(orders(), WeightOrders()) << test::ToString(layout);
    }
  }
  source.layout = {};
  source.layout.major = MajorOrder::kMnMajor;
  source.layout.order = RowOrder::kInterleavedUpGate;
  EXPECT_EQ(orders().gemm1, ReadOrder::kMnMajorInterleaved);
  EXPECT_EQ(orders().gemm2, ReadOrder::kMnMajor);
  EXPECT_EQ(orders().shared_gemm1, ReadOrder::kKMajor);  // none
  source.spec.shared.count = 1;
  EXPECT_EQ(orders().shared_gemm1, ReadOrder::kMnMajorInterleaved);
  EXPECT_EQ(orders().shared_gemm2, ReadOrder::kMnMajor);
  source.layout.separate = true;  // each matrix has rows of its own
  EXPECT_EQ(orders().gemm1, ReadOrder::kMnMajor);
  source.layout.separate = false;
  source.spec.activation.kind = ActivationKind::kRelu2;
  EXPECT_EQ(orders().gemm1, ReadOrder::kMnMajor);
}

TEST(Tune, KeepsToTheKernelsThatMayRun) {
  const test::TestLayer layer(test::MiniSpec());
  const std::vector<std::string> kernels = test::RunnableKernels(layer.spec());
  if (kernels.size() < 2) {
    GTEST_SKIP() << "one kernel here";
  }
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  TuneOptions options = QuickOptions();
  options.tokens = {4};
  options.blocklist = {kernels.front()};
  const TuningTable table = Tune(plan, layer.weights(), options);
  const TunedLayer& tuned = table.layers().front();
  for (const TunedRange& range : tuned.ranges) {
    EXPECT_NE(range.tactic, kernels.front());
    EXPECT_EQ(range.untuned, kernels.front());
  }
  ASSERT_FALSE(tuned.faults.empty());
  EXPECT_EQ(tuned.faults.front().tactic, kernels.front());
  EXPECT_EQ(tuned.faults.front().reason, "blocklisted");
}

TEST(Tune, StopsAtOnce) {
  const test::TestLayer layer(test::MiniSpec());
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  TuneOptions options = QuickOptions();
  options.progress = [](const TuneProgress&) { return false; };
  const TuningTable table = Tune(plan, layer.weights(), options);
  EXPECT_TRUE(table.layers().front().ranges.empty());
  ASSERT_FALSE(table.layers().front().faults.empty());
  EXPECT_THAT(table.layers().front().faults.front().reason, HasSubstr("stopped"));
}

TEST(Tune, RefusesOptionsThatMeanNothing) {
  const test::TestLayer layer(test::MiniSpec());
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  TuneOptions options = QuickOptions();
  options.tokens = {4, 1};
  const test::Caught caught =
      test::CatchError([&] { static_cast<void>(Tune(plan, layer.weights(), options)); });
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  EXPECT_THAT(caught.message, HasSubstr("tokens has 1 behind 4"));
}

}  // namespace
}  // namespace hopyard
