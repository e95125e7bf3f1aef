// SPDX-License-Identifier: Apache-2.0
#include "tune/workload.h"

#include <algorithm>
#include <cmath>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/error.h"

#include "tests/forward_runner.h"

namespace hopyard::tune {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kTokens = 512;

MoeSpec SpecOf(int experts = 32, int top_k = 4) {
  MoeSpec spec = test::SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  spec.num_experts = experts;
  spec.top_k = top_k;
  spec.routing = RoutingRule::Renormalize();
  return spec;
}

Workload Make(const MoeSpec& spec, const std::string& routing, bool ids = true, uint64_t seed = 1) {
  TuneOptions options;
  options.routings = {routing};
  options.seed = seed;
  CallPath path;
  path.ids = ids;
  return {spec, path, options};
}

// How many tokens take each expert, in descending order.
std::vector<int64_t> LoadOf(const std::vector<int32_t>& ids, int experts) {
  std::vector<int64_t> load(static_cast<size_t>(experts), 0);
  for (const int32_t id : ids) {
    ++load[static_cast<size_t>(id)];
  }
  std::sort(load.rbegin(), load.rend());
  return load;
}

// Ids as the layer's rule selects them from the logits.
std::vector<int32_t> IdsFromLogits(const MoeSpec& spec, const std::vector<float>& logits,
                                   int64_t tokens) {
  std::vector<int32_t> ids(static_cast<size_t>(tokens * spec.top_k));
  std::vector<float> weights(ids.size());
  RouteInputs in;
  in.logits = TensorView::Contiguous(logits.data(), DType::kFloat32, {tokens, spec.num_experts});
  RouteOutputs out;
  out.expert_ids = TensorView::Contiguous(ids.data(), DType::kInt32, {tokens, spec.top_k});
  out.weights = TensorView::Contiguous(weights.data(), DType::kFloat32, {tokens, spec.top_k});
  Route(spec.routing, spec.top_k, in, out);
  return ids;
}

class EveryRouting : public ::testing::TestWithParam<std::string> {};

TEST_P(EveryRouting, IdsAreDistinctAndInRange) {
  const MoeSpec spec = SpecOf();
  const RoutedTokens routed = Make(spec, GetParam()).Make(0, 0, kTokens);
  ASSERT_EQ(routed.ids.size(), static_cast<size_t>(kTokens * spec.top_k));
  EXPECT_TRUE(routed.logits.empty());
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto row = routed.ids.begin() + t * spec.top_k;
    const std::set<int32_t> ids(row, row + spec.top_k);
    ASSERT_EQ(ids.size(), static_cast<size_t>(spec.top_k)) << "token " << t;
    ASSERT_GE(*ids.begin(), 0);
    ASSERT_LT(*ids.rbegin(), spec.num_experts);
  }
  for (const float weight : routed.weights) {
    ASSERT_TRUE(std::isfinite(weight) && weight > 0.0F);
  }
}

// Rules with other scores and groups of experts select what is meant.
TEST_P(EveryRouting, LogitsSelectWhatTheIdsAre) {
  for (const RoutingRule& rule :
       {RoutingRule::Default(), RoutingRule::Renormalize(), RoutingRule::Sigmoid(),
        RoutingRule::SqrtSoftplus(), RoutingRule::DeepSeekV3(4, 2, 2.5F)}) {
    MoeSpec spec = SpecOf();
    spec.routing = rule;
    const RoutedTokens logits = Make(spec, GetParam(), false).Make(0, 1, kTokens);
    const RoutedTokens ids = Make(spec, GetParam(), true).Make(0, 1, kTokens);
    EXPECT_TRUE(logits.ids.empty());
    EXPECT_EQ(IdsFromLogits(spec, logits.logits, kTokens), ids.ids) << hopyard::ToString(rule);
  }
}

TEST_P(EveryRouting, DependsOnSeedAndSetAlone) {
  const MoeSpec spec = SpecOf();
  const Workload one = Make(spec, GetParam(), false);
  EXPECT_EQ(one.Make(0, 2, 64).logits, Make(spec, GetParam(), false).Make(0, 2, 64).logits);
  EXPECT_NE(one.Make(0, 0, 64).logits, one.Make(0, 1, 64).logits);
  EXPECT_NE(one.Make(0, 0, 64).logits, Make(spec, GetParam(), false, 2).Make(0, 0, 64).logits);
}

INSTANTIATE_TEST_SUITE_P(Kinds, EveryRouting,
                         ::testing::Values("uniform", "zipf", "balanced", "hot"),
                         [](const auto& test) { return test.param; });

TEST(Workload, IsSkewedAsNamed) {
  const MoeSpec spec = SpecOf();
  const auto load = [&](const std::string& routing) {
    return LoadOf(Make(spec, routing).Make(0, 0, kTokens).ids, spec.num_experts);
  };
  const int64_t average = kTokens * spec.top_k / spec.num_experts;
  EXPECT_EQ(load("balanced").front(), average);
  EXPECT_EQ(load("balanced").back(), average);
  EXPECT_LT(load("uniform").front(), 2 * average);
  EXPECT_GT(load("uniform").back(), average / 2);
  EXPECT_GT(load("zipf").front(), 4 * average);
  EXPECT_LT(load("zipf").back(), average / 2);
  const std::vector<int64_t> hot = load("hot");
  EXPECT_GT(hot[0] + hot[1] + hot[2] + hot[3], 3 * kTokens * spec.top_k / 4);
}

// Calls in turn shall not find each other's experts in the cache.
TEST(Workload, SetsHaveOtherHotExperts) {
  const MoeSpec spec = SpecOf();
  for (const std::string& routing : {std::string("zipf"), std::string("hot")}) {
    std::set<int32_t> most;
    for (int set = 0; set < 4; ++set) {
      std::vector<int64_t> load(static_cast<size_t>(spec.num_experts), 0);
      for (const int32_t id : Make(spec, routing).Make(0, set, kTokens).ids) {
        ++load[static_cast<size_t>(id)];
      }
      most.insert(static_cast<int32_t>(std::max_element(load.begin(), load.end()) - load.begin()));
    }
    EXPECT_EQ(most.size(), 4U) << routing;
  }
}

TEST(Workload, ARanksHotExpertsAreItsOwn) {
  MoeSpec spec = SpecOf();
  spec.local = {ExpertMap::Kind::kRange, 24, 8};
  const Workload workload = Make(spec, "hot");
  for (int set = 0; set < 4; ++set) {
    int64_t local = 0;
    const RoutedTokens routed = workload.Make(0, set, kTokens);
    for (const int32_t id : routed.ids) {
      local += id >= 24 ? 1 : 0;
    }
    EXPECT_GT(local, 3 * kTokens * spec.top_k / 4) << "set " << set;
  }
  EXPECT_LE(workload.ExpertsTouched(0, kTokens), 8);
  EXPECT_GE(workload.ExpertsTouched(0, kTokens), 4);
  EXPECT_EQ(Make(SpecOf(), "balanced").ExpertsTouched(0, 1), 4);
  EXPECT_EQ(Make(SpecOf(), "balanced").ExpertsTouched(0, 100), 32);
}

TEST(Workload, RecordedRowsAreReplayed) {
  const MoeSpec spec = SpecOf(32, 2);
  const std::vector<int16_t> rows = {1, 2, 3, 4, 5, -1};
  TuneOptions options;
  options.recorded = TensorView::Contiguous(rows.data(), DType::kInt16, {3, 2});
  for (const bool given : {false, true}) {
    CallPath path;
    path.ids = given;
    const Workload workload(spec, path, options);
    EXPECT_EQ(workload.ToString(), "recorded");
    EXPECT_EQ(workload.kinds(), 1);
    EXPECT_EQ(workload.mode(), given ? RoutingInput::kUnpacked : RoutingInput::kReplay);
    const RoutedTokens routed = workload.Make(0, 0, 5);
    ASSERT_EQ(routed.ids.size(), 10U);
    EXPECT_EQ(routed.logits.empty(), given);
    EXPECT_EQ(routed.weights.empty(), !given);
    std::set<std::pair<int32_t, int32_t>> seen;
    for (size_t t = 0; t < 5; ++t) {
      seen.emplace(routed.ids[2 * t], routed.ids[2 * t + 1]);
    }
    EXPECT_EQ(seen, (std::set<std::pair<int32_t, int32_t>>{{1, 2}, {3, 4}, {5, -1}}));
  }
}

TEST(Workload, HiddenStatesAreNumbersAndNoZeros) {
  const MoeSpec spec = SpecOf();
  const std::vector<uint16_t> values = Make(spec, "uniform").HiddenStates(33);
  ASSERT_EQ(values.size(), static_cast<size_t>(33 * spec.hidden_size));
  std::set<uint16_t> different(values.begin(), values.end());
  EXPECT_GT(different.size(), 400U);
  for (const double value : test::FromBf16(values)) {
    ASSERT_TRUE(std::abs(value) >= 0.5 && std::abs(value) < 2.0) << value;
  }
}

TEST(Workload, OnlyWhatTheSpecHasIsThere) {
  MoeSpec spec = SpecOf();
  EXPECT_TRUE(Make(spec, "uniform").SharedWeights(3).empty());
  EXPECT_TRUE(Make(spec, "uniform").ExpertTable().empty());
  spec.shared.count = 2;
  spec.shared.per_token_weight = true;
  spec.local = {ExpertMap::Kind::kTable, 0, 3};
  EXPECT_EQ(Make(spec, "uniform").SharedWeights(3).size(), 6U);
  const std::vector<int32_t> table = Make(spec, "uniform").ExpertTable();
  ASSERT_EQ(table.size(), 32U);
  EXPECT_EQ(std::vector<int32_t>(table.begin(), table.begin() + 4),
            (std::vector<int32_t>{0, 1, 2, -1}));
}

std::string MessageOf(const TuneOptions& options) {
  const test::Caught caught =
      test::CatchError([&] { static_cast<void>(Workload(SpecOf(), {}, options)); });
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  return caught.message;
}

TEST(Workload, RefusesWhatMeansNothing) {
  TuneOptions options;
  options.routings = {"uniform", "gaussian"};
  EXPECT_THAT(MessageOf(options), HasSubstr("'gaussian'; wanted uniform, zipf, balanced or hot"));
  options.routings.clear();
  EXPECT_THAT(MessageOf(options), HasSubstr("routings is empty"));
  std::vector<int32_t> ids = {0, 1, 2, 32};
  options.recorded = TensorView::Contiguous(ids.data(), DType::kInt32, {1, 4});
  EXPECT_THAT(MessageOf(options), HasSubstr("recorded has expert 32 at token 0; wanted -1 .. 31"));
  options.recorded = TensorView::Contiguous(ids.data(), DType::kInt32, {2, 2});
  EXPECT_THAT(MessageOf(options), HasSubstr("wanted a contiguous replay [n, 4]"));
  options.recorded = TensorView::Contiguous(ids.data(), DType::kFloat32, {1, 4});
  EXPECT_THAT(MessageOf(options), HasSubstr("recorded is f32; wanted i16 or i32"));
}

}  // namespace
}  // namespace hopyard::tune
