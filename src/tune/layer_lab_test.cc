// SPDX-License-Identifier: Apache-2.0
// Layers tuned on the CPU, with real times: what they are is not judged, what becomes of them is.
#include "tune/layer_lab.h"

#include <algorithm>
#include <cmath>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/error.h"

#include "tests/layer.h"
#include "tune/fake_lab.h"
#include "tune/host_calls.h"
#include "tune/tuner.h"

namespace hopyard::tune {
namespace {

using ::testing::HasSubstr;

PlanOptions PlanFor(int64_t tokens) {
  PlanOptions options;
  options.max_tokens = tokens;
  options.num_threads = 1;
  return options;
}

TuneOptions QuickOptions() {
  TuneOptions options;
  options.max_seconds = 2.0;
  options.routings = {"uniform"};
  return options;
}

// Warm: reading memory that empties the caches takes the most time by far.
TunerResult TuneLayer(const Plan& plan, const Weights& weights, const TuneOptions& options,
                      std::vector<int64_t> tokens) {
  LayerTask task = MakeTask(plan, weights, options, {});
  task.cold = false;
  LayerLab lab(std::move(task));
  return Tuner(&lab, std::move(tokens), options).Run();
}

void Judge(const MoeSpec& spec, const TunerResult& result) {
  const std::vector<std::string> kernels = test::RunnableKernels(spec);
  ASSERT_GE(result.ranges.size(), 2U);
  for (const TunedRange& range : result.ranges) {
    EXPECT_NE(std::find(kernels.begin(), kernels.end(), range.tactic), kernels.end())
        << range.tactic;
    EXPECT_EQ(range.untuned, kernels.front());
    EXPECT_GT(range.us, 0.0);
    EXPECT_LE(range.us, range.untuned_us);
    EXPECT_TRUE(std::isfinite(range.noise));
  }
  // Nothing fails but for want of time.
  for (const TuningFault& fault : result.faults) {
    EXPECT_THAT(fault.reason, HasSubstr("no time left")) << fault.tactic;
  }
}

class EveryPair : public ::testing::TestWithParam<test::FormatPair> {};

TEST_P(EveryPair, IsTunedWithoutFaults) {
  const test::TestLayer layer(test::MiniSpec(GetParam()));
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(5));
  const TunerResult result = TuneLayer(plan, layer.weights(), QuickOptions(), {1, 5});
  Judge(layer.spec(), result);
  EXPECT_GE(result.measured, static_cast<int64_t>(test::RunnableKernels(layer.spec()).size()));
}

INSTANTIATE_TEST_SUITE_P(Formats, EveryPair, ::testing::ValuesIn(test::SupportedPairs()),
                         [](const auto& test) { return test::ToString(test.param); });

TEST(LayerLab, EveryPathIsCalled) {
  MoeSpec spec = test::MiniSpec();
  spec.shared.count = 1;
  spec.shared.per_token_weight = true;
  spec.local = {ExpertMap::Kind::kTable, 0, 5};
  const test::TestLayer layer(spec);
  for (const bool ids : {false, true}) {
    for (const bool unfinalised : {false, true}) {
      PlanOptions options = PlanFor(6);
      options.path = {ids, unfinalised, true};
      const Plan plan = MakePlan(spec, Device{}, options);
      Judge(spec, TuneLayer(plan, layer.weights(), QuickOptions(), {1, 6}));
    }
  }
}

TEST(LayerLab, RecordedTokensAreCalled) {
  const test::TestLayer layer(test::MiniSpec());
  const std::vector<int32_t> rows = {0, 1, 5, -1, 7, 3};
  TuneOptions options = QuickOptions();
  options.recorded = TensorView::Contiguous(rows.data(), DType::kInt32, {3, 2});
  for (const bool ids : {false, true}) {
    PlanOptions plan = PlanFor(4);
    plan.path.ids = ids;
    Judge(layer.spec(),
          TuneLayer(MakePlan(layer.spec(), Device{}, plan), layer.weights(), options, {1, 4}));
  }
}

TEST(LayerLab, MemoryIsAskedForBeforeItIsTaken) {
  const test::TestLayer layer(test::MiniSpec());
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  TuneOptions options = QuickOptions();
  options.max_bytes = plan.workspace_bytes() + 20000;
  const TunerResult result = TuneLayer(plan, layer.weights(), options, {1, 2, int64_t{1} << 20});
  EXPECT_EQ(result.ranges.back().last, 2);
  ASSERT_FALSE(result.faults.empty());
  EXPECT_EQ(result.faults.back().tokens, int64_t{1} << 20);
  EXPECT_THAT(result.faults.back().reason, HasSubstr("1048576 tokens need"));
  EXPECT_THAT(result.faults.back().reason,
              HasSubstr(std::to_string(options.max_bytes) + " may be used"));
}

// A round of calls that find the caches cold.
TEST(LayerLab, ColdCallsAreTimedWithoutTheFlush) {
  const test::TestLayer layer(test::MiniSpec());
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  LayerTask task = MakeTask(plan, layer.weights(), QuickOptions(), {});
  LayerLab lab(std::move(task));
  const std::string untuned = lab.KernelsAt(4).untuned;
  const std::unique_ptr<Bench> bench = lab.Open(4);
  bench->Prepare(untuned);
  EXPECT_GT(bench->Run(untuned, 0), 0.0);

  // 64 MiB take milliseconds to read.
  const std::vector<uint8_t> memory(size_t{64} << 20, 1);
  int calls = 0;
  const auto timed = HostCalls({[&calls](void*) { ++calls; }, [&calls](void*) { ++calls; }},
                               {memory.data(), static_cast<int64_t>(memory.size())});
  EXPECT_LT(timed->Run(), 500.0);
  EXPECT_EQ(calls, 2);
}

TEST(LayerLab, OneKernelsOutputIsTheOthers) {
  const test::TestLayer layer(test::MiniSpec());
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  LayerLab lab(MakeTask(plan, layer.weights(), QuickOptions(), {}));
  const Kernels kernels = lab.KernelsAt(4);
  const std::unique_ptr<Bench> bench = lab.Open(4);
  for (const std::string& kernel : kernels.gemm1) {
    bench->Prepare(kernel);
    EXPECT_EQ(bench->Check(kernel, kernels.untuned, 0), "") << kernel;
  }
  const test::Caught caught = test::CatchError([&] { bench->Prepare("cpu_abacus_bf16"); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_TRUE(lab.Recover());
}

// The expert of `ids` that is none of `others`.
int32_t ExpertOnlyIn(const std::vector<int32_t>& ids, const std::vector<int32_t>& others) {
  const auto found = std::find_if(ids.begin(), ids.end(), [&](int32_t id) {
    return std::find(others.begin(), others.end(), id) == others.end();
  });
  EXPECT_NE(found, ids.end());
  return found == ids.end() ? 0 : *found;
}

// An expert that one kind of routing alone reads computes something else than it did for the
// reference, as with a kernel that is wrong for it.
TEST(LayerLab, OutputsAreComparedWithEachRouting) {
  test::WeightSource source;
  source.spec = test::MiniSpec();
  const test::LayerWeights storage(source);
  PlanOptions options = PlanFor(4);
  options.path.ids = true;
  TuneOptions tune = QuickOptions();
  tune.routings = {"hot", "uniform"};
  LayerTask task = MakeTask(MakePlan(source.spec, Device{}, options), storage.Make(), tune, {});
  const int32_t expert =
      ExpertOnlyIn(task.workload.Make(1, 0, 4).ids, task.workload.Make(0, 0, 4).ids);
  LayerLab lab(std::move(task));
  const std::string kernel = lab.KernelsAt(4).untuned;
  const std::unique_ptr<Bench> bench = lab.Open(4);
  bench->Prepare(kernel);
  for (const int kind : {0, 1}) {
    EXPECT_EQ(bench->Check(kernel, kernel, kind), "");
  }
  const TensorView& values = storage.desc().routed.gemm2.values;
  std::fill_n(values.as<uint16_t>() + expert * values.strides[0], values.strides[0], uint16_t{0});
  EXPECT_EQ(bench->Check(kernel, kernel, 0), "");
  EXPECT_THAT(bench->Check(kernel, kernel, 1), HasSubstr("uniform: row "));
}

// Weights that make no numbers of an expert's tokens do so with every kernel: that is the layer,
// and its kernels are tuned.
TEST(LayerLab, OutputsThatAreNotFiniteWithAnyKernelAreTheLayers) {
  test::WeightSource source;
  source.spec = test::MiniSpec();
  const test::LayerWeights storage(source);
  const TensorView& values = storage.desc().routed.gemm2.values;
  std::fill_n(values.as<uint16_t>(), values.strides[0], uint16_t{0x7FC0});
  const Plan plan = MakePlan(source.spec, Device{}, PlanFor(64));
  const TunerResult tuned = TuneLayer(plan, storage.Make(), QuickOptions(), {1, 64});
  EXPECT_EQ(tuned.ranges.front().tokens, 1);
  EXPECT_GE(tuned.ranges.back().last, 64);
  const TuningFault* const fault = FindFault(tuned, test::RunnableKernels(source.spec).front());
  ASSERT_NE(fault, nullptr) << Shown(tuned);
  EXPECT_THAT(fault->reason, HasSubstr("uniform: row "));
  EXPECT_THAT(fault->reason, HasSubstr("is not finite, nor is any other candidate's finite"));
  EXPECT_EQ(fault, &tuned.faults.back()) << "once: " << Shown(tuned);
}

test::Caught Refused(const TuneOptions& options) {
  const test::TestLayer layer(test::MiniSpec());
  const Plan plan = MakePlan(layer.spec(), Device{}, PlanFor(4));
  return test::CatchError([&] { static_cast<void>(MakeTask(plan, layer.weights(), options, {})); });
}

TEST(LayerLab, RefusesWhatMeansNothing) {
  const auto message = [](auto change) {
    TuneOptions options;
    change(&options);
    const test::Caught caught = Refused(options);
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
    return caught.message;
  };
  EXPECT_THAT(message([](TuneOptions* o) { o->struct_size = 3; }), HasSubstr("struct_size=3"));
  EXPECT_THAT(message([](TuneOptions* o) { o->max_seconds = 0; }), HasSubstr("max_seconds=0"));
  EXPECT_THAT(message([](TuneOptions* o) { o->margin = -0.1; }), HasSubstr("margin=-0.1"));
  EXPECT_THAT(message([](TuneOptions* o) { o->max_bytes = -1; }), HasSubstr("max_bytes=-1"));
  EXPECT_THAT(message([](TuneOptions* o) {
                o->tokens = {1, 4, 4};
              }),
              HasSubstr("tokens has 4 behind 4"));
  EXPECT_THAT(message([](TuneOptions* o) { o->tokens = {0}; }), HasSubstr("tokens has 0 behind 0"));
  EXPECT_THAT(message([](TuneOptions* o) { o->routings = {"bad"}; }), HasSubstr("'bad'"));
  const test::TestLayer layer(test::MiniSpec());
  MoeSpec other = test::MiniSpec();
  other.top_k = 1;
  const Plan plan = MakePlan(other, Device{}, PlanFor(4));
  const test::Caught caught =
      test::CatchError([&] { static_cast<void>(MakeTask(plan, layer.weights(), {}, {})); });
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  EXPECT_THAT(caught.message, HasSubstr("weights were made for another layer"));
}

}  // namespace
}  // namespace hopyard::tune
