// SPDX-License-Identifier: Apache-2.0
// Hand-made routing cases, special values, given ids and the optional outputs. Every case runs on
// the oracle and on all instruction sets.
#include <cmath>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "stages/1_route/route_testing.h"

namespace hopyard::route {
namespace {

using testing::Bits;
using testing::Case;
using ::testing::ElementsAre;
using testing::kInf;
using testing::kNan;
using testing::Random;
using testing::Result;

// Runs `check` on the result of the oracle and of every instruction set.
void OnAll(Case& c, const std::function<void(const Result&, const std::string&)>& check) {
  c.Bind();
  Result oracle(c.num_tokens, c.top_k);
  RouteRef(c.rule, c.top_k, c.inputs, oracle.outputs);
  check(oracle, "oracle");
  for (const Isa isa : testing::Isas()) {
    Result result(c.num_tokens, c.top_k);
    RouteCpuWith(isa, c.rule, c.top_k, c.inputs, result.outputs, 2);
    check(result, std::string(ToString(isa)));
  }
}

Case OneRow(const RoutingRule& rule, int top_k, const std::vector<float>& logits) {
  Case c(rule, static_cast<int>(logits.size()), top_k, 1);
  c.logits = logits;
  return c;
}

void ExpectRow(Case c, const std::vector<int32_t>& ids, const std::vector<double>& weights) {
  OnAll(c, [&](const Result& result, const std::string& who) {
    EXPECT_EQ(result.ids, ids) << who << ": " << ToString(c.rule);
    ASSERT_EQ(result.weights.size(), weights.size());
    for (size_t j = 0; j < weights.size(); ++j) {
      if (std::isnan(weights[j])) {
        EXPECT_TRUE(std::isnan(result.weights[j])) << who << ": " << ToString(c.rule);
      } else if (std::isinf(weights[j])) {
        EXPECT_EQ(result.weights[j], weights[j]) << who << ": " << ToString(c.rule);
      } else {
        EXPECT_NEAR(result.weights[j], weights[j], 1e-6 * std::fabs(weights[j]))
            << who << ": " << ToString(c.rule) << " choice " << j;
      }
    }
  });
}

// Logits ln 1, ln 2, ln 4, ln 1: everything has a simple closed form.
TEST(Route, EveryMethodByHand) {
  const float l2 = std::log(2.0F);
  const std::vector<float> z = {0.0F, l2, 2 * l2, 0.0F};
  ExpectRow(OneRow(RoutingRule::Default(), 2, z), {2, 1}, {0.5, 0.25});
  ExpectRow(OneRow(RoutingRule::Renormalize(), 2, z), {2, 1}, {2.0 / 3, 1.0 / 3});
  ExpectRow(OneRow(RoutingRule::RenormalizeNaive(), 3, z), {2, 1, 0}, {4.0 / 7, 2.0 / 7, 1.0 / 7});
  ExpectRow(OneRow(RoutingRule::TopK(), 2, z), {2, 1}, {2 * l2, l2});
  ExpectRow(OneRow(RoutingRule::Sigmoid(), 2, z), {2, 1}, {0.8, 2.0 / 3});
  ExpectRow(OneRow(RoutingRule::TopKSigmoid(), 2, z), {2, 1}, {0.8, 2.0 / 3});
  ExpectRow(OneRow(RoutingRule::Llama4(), 1, z), {2}, {0.8});
  ExpectRow(OneRow(RoutingRule::SigmoidRenorm(), 2, z), {2, 1}, {6.0 / 11, 5.0 / 11});
  ExpectRow(OneRow(RoutingRule::SigmoidRenorm(false), 2, z), {2, 1}, {0.8, 2.0 / 3});
  const double a = std::sqrt(std::log(5.0));
  const double b = std::sqrt(std::log(3.0));
  ExpectRow(OneRow(RoutingRule::SqrtSoftplus(1.5F), 2, z), {2, 1},
            {1.5 * a / (a + b), 1.5 * b / (a + b)});
  Case biased = OneRow(RoutingRule::MiniMax2(2.0F), 2, z);
  biased.bias = {1.0F, 0.0F, -1.0F, 0.5F};  // 1.5, 0.667, -0.2, 1.0
  ExpectRow(biased, {0, 3}, {1.0, 1.0});
  Case llama = OneRow(RoutingRule::Llama4(), 3, z);  // a limit of FlashInfer that is lifted
  ExpectRow(llama, {2, 1, 0}, {0.8, 2.0 / 3, 0.5});
}

// Groups {0,1} {2,3} {4,5}; sums of the two best biased scores decide, not the best alone.
TEST(Route, GroupsAreRankedByTheirTwoBest) {
  Case c = OneRow(RoutingRule::DeepSeekV3(3, 1, 1.0F), 2, std::vector<float>(6, 0.0F));
  c.bias = {0.9F, -0.9F, 0.3F, 0.2F, 0.1F, 0.1F};
  ExpectRow(c, {2, 3}, {0.5, 0.5});
  c.rule.top_groups = 2;
  c.top_k = 4;
  ExpectRow(c, {2, 3, 4, 5}, {0.25, 0.25, 0.25, 0.25});
}

// An expert of a dropped group is never chosen, even where every kept one is worse than zero.
TEST(Route, DroppedGroupsStayOutUnderNegativeBias) {
  Case c = OneRow(RoutingRule::DeepSeekV3(2, 1, 1.0F), 4, std::vector<float>(8, 0.0F));
  c.bias = {-1.0F, -1.0F, -9.0F, -9.5F, -5.0F, -5.0F, -5.0F, -5.0F};
  ExpectRow(c, {0, 1, 2, 3}, {0.25, 0.25, 0.25, 0.25});
}

TEST(Route, GroupTiesGoToTheSmallerGroupAndSingleMemberGroupsWork) {
  Case tie = OneRow(RoutingRule::DeepSeekV3(4, 2, 1.0F), 3, std::vector<float>(8, 0.0F));
  ExpectRow(tie, {0, 1, 2}, {1.0 / 3, 1.0 / 3, 1.0 / 3});
  Case single = OneRow(RoutingRule::DeepSeekV3(4, 2, 1.0F), 2, {0.0F, 3.0F, 1.0F, 2.0F});
  const double a = 1 / (1 + std::exp(-3.0));
  const double b = 1 / (1 + std::exp(-2.0));
  ExpectRow(single, {1, 3}, {a / (a + b), b / (a + b)});
}

TEST(Route, EqualScoresAreWonBySmallerIds) {
  for (const testing::Method& method : testing::Methods()) {
    Case c(method.rule, 100, 7, 3);
    std::fill(c.logits.begin(), c.logits.end(), -2.5F);
    OnAll(c, [&](const Result& result, const std::string& who) {
      for (int i = 0; i < 21; ++i) {
        EXPECT_EQ(result.ids[static_cast<size_t>(i)], i % 7) << who << ' ' << method.name;
      }
    });
  }
}

// bf16 logits: 1.001 and 1.002 become the same number, so the smaller id wins.
TEST(Route, Bf16LogitsTie) {
  Case c = OneRow(RoutingRule::Renormalize(), 2, {0.5F, 1.001F, 1.002F, -3.0F});
  ExpectRow(c, {2, 1}, {0.50025, 0.49975});
  c.logits_dtype = DType::kBf16;
  ExpectRow(c, {1, 2}, {0.5, 0.5});
}

// sigmoid saturates to 1: Sigmoid then ties by id, TopKSigmoid still ranks by the logit.
TEST(Route, SaturatedSigmoid) {
  const std::vector<float> z = {20.0F, 30.0F, 25.0F, 40.0F};
  Case tied = OneRow(RoutingRule::Sigmoid(), 2, z);
  tied.Bind();
  for (const Isa isa : testing::Isas()) {
    Result result(1, 2);
    RouteCpuWith(isa, tied.rule, 2, tied.inputs, result.outputs, 1);
    EXPECT_THAT(result.ids, ElementsAre(0, 1)) << ToString(isa);
  }
  ExpectRow(OneRow(RoutingRule::TopKSigmoid(), 2, z), {3, 1}, {1.0, 1.0});
}

// A bias of 12 must not leak into the weights: they come from the bare sigmoid, about 2e-7.
TEST(Route, WeightsComeFromUnbiasedScores) {
  Case c = OneRow(RoutingRule::DeepSeekV3(1, 1, 2.5F), 4, std::vector<float>(8, -15.4F));
  c.bias.assign(8, 12.0F);
  ExpectRow(c, {0, 1, 2, 3}, {0.625, 0.625, 0.625, 0.625});
}

TEST(Route, InfiniteLogits) {
  ExpectRow(OneRow(RoutingRule::Renormalize(), 2, {0.0F, kInf, 1.0F, -kInf}), {1, 2}, {1.0, 0.0});
  ExpectRow(OneRow(RoutingRule::Renormalize(), 3, {0.0F, kInf, 1.0F, kInf}), {1, 3, 2},
            {0.5, 0.5, 0.0});
  ExpectRow(OneRow(RoutingRule::Default(), 2, {-kInf, -kInf, -kInf, -kInf}), {0, 1}, {0.25, 0.25});
  ExpectRow(OneRow(RoutingRule::Sigmoid(), 3, {0.0F, -kInf, kInf}), {2, 0, 1}, {1.0, 0.5, 0.0});
  ExpectRow(OneRow(RoutingRule::TopK(), 2, {-kInf, 3e38F, -kInf}), {1, 0}, {3e38F, -kInf});
}

TEST(Route, AllZeroScoresGiveZeroWeights) {
  const std::vector<float> z(4, -kInf);
  ExpectRow(OneRow(RoutingRule::SqrtSoftplus(), 2, z), {0, 1}, {0.0, 0.0});
  ExpectRow(OneRow(RoutingRule::SigmoidRenorm(), 2, z), {0, 1}, {0.0, 0.0});
  ExpectRow(OneRow(RoutingRule::MiniMax2(), 2, z), {0, 1}, {0.0, 0.0});
}

TEST(Route, NanRanksLastAndPoisonsItsRowOnly) {
  for (const testing::Method& method : testing::Methods()) {
    Case c(method.rule, 4, 3, 3);
    c.logits = {kNan, -kInf, kNan, 1.0F, kNan, kNan, kNan, -kNan, 1.0F, 2.0F, 3.0F, 0.0F};
    OnAll(c, [&](const Result& result, const std::string& who) {
      const std::string what = who + ' ' + method.name;
      EXPECT_THAT(result.ids, ElementsAre(3, 1, 0, 0, 1, 2, 2, 1, 0)) << what;
      for (size_t j = 0; j < 6; ++j) {
        EXPECT_TRUE(std::isnan(result.weights[j])) << what;
      }
      for (size_t j = 6; j < 9; ++j) {
        EXPECT_TRUE(std::isfinite(result.weights[j])) << what;
      }
    });
  }
}

TEST(Route, NanInsideKeptGroupsStillGivesDistinctIds) {
  Case c = OneRow(RoutingRule::DeepSeekV3(2, 1, 1.0F), 4, std::vector<float>(8, kNan));
  ExpectRow(c, {0, 1, 2, 3}, {kNan, kNan, kNan, kNan});
  Case second = OneRow(RoutingRule::DeepSeekV3(2, 1, 1.0F), 4,
                       {kNan, kNan, kNan, 5.0F, kNan, 1.0F, 2.0F, kNan});
  ExpectRow(second, {6, 5, 4, 7}, {kNan, kNan, kNan, kNan});
}

TEST(Route, ForcedIdsGetTheMethodsWeights) {
  const float l2 = std::log(2.0F);
  for (const DType dtype : {DType::kInt16, DType::kInt32}) {
    const std::vector<int16_t> ids16 = {1, -1, 3, 4, 32767, 3};
    const std::vector<int32_t> ids32 = {1, -1, 3, 4, 1 << 20, 3};
    Case c(RoutingRule::Renormalize(), 4, 3, 2);
    c.logits = {0.0F, l2, 2 * l2, 0.0F, 1.0F, 2.0F, 3.0F, 4.0F};
    c.inputs.forced_ids =
        dtype == DType::kInt16
            ? TensorView::Contiguous(static_cast<const void*>(ids16.data()), dtype, {2, 3})
            : TensorView::Contiguous(static_cast<const void*>(ids32.data()), dtype, {2, 3});
    ExpectRow(c, {1, -1, 3, -1, -1, 3}, {2.0 / 3, 0, 1.0 / 3, 0, 0, 1.0});
    c.rule = RoutingRule::Default();  // the softmax still runs over all experts
    const double sum = std::exp(1.0) + std::exp(2.0) + std::exp(3.0) + std::exp(4.0);
    ExpectRow(c, {1, -1, 3, -1, -1, 3}, {0.25, 0, 0.125, 0, 0, std::exp(4.0) / sum});
    c.rule = RoutingRule::SigmoidRenorm();  // skipped slots stay out of the sum
    ExpectRow(c, {1, -1, 3, -1, -1, 3}, {4.0 / 7, 0, 3.0 / 7, 0, 0, 1.0});
  }
}

TEST(Route, ForcedDuplicatesAreUsedAsGiven) {
  const std::vector<int32_t> ids = {2, 2, 2};
  Case c = OneRow(RoutingRule::Renormalize(), 3, {0.0F, 1.0F, 2.0F});
  c.inputs.forced_ids =
      TensorView::Contiguous(static_cast<const void*>(ids.data()), DType::kInt32, {1, 3});
  ExpectRow(c, {2, 2, 2}, {1.0 / 3, 1.0 / 3, 1.0 / 3});
}

TEST(Route, HashRoutingReadsTheTable) {
  const std::vector<int32_t> table = {0, 1, 3, 2, 1, 9};  // three tokens of vocabulary
  const std::vector<int64_t> tokens64 = {2, 0, 3, -1, 1};
  const std::vector<int32_t> tokens32 = {2, 0, 3, -1, 1};
  for (const DType dtype : {DType::kInt32, DType::kInt64}) {
    Case c(RoutingRule::SigmoidRenorm(), 4, 2, 5);
    c.inputs.token_to_experts =
        TensorView::Contiguous(static_cast<const void*>(table.data()), DType::kInt32, {3, 2});
    c.inputs.token_ids =
        dtype == DType::kInt64
            ? TensorView::Contiguous(static_cast<const void*>(tokens64.data()), dtype, {5})
            : TensorView::Contiguous(static_cast<const void*>(tokens32.data()), dtype, {5});
    ExpectRow(c, {1, -1, 0, 1, -1, -1, -1, -1, 3, 2}, {1, 0, 0.5, 0.5, 0, 0, 0, 0, 0.5, 0.5});
  }
}

// num_tokens, replay longer than T and load counters, on every path.
TEST(Route, OptionalOutputsAndLiveTokens) {
  const int32_t live = 5;
  Random random(3);
  Case c(RoutingRule::Default(), 24, 4, 9);
  for (float& z : c.logits) {
    z = random.Normal();
  }
  c.inputs.num_tokens = TensorView::Contiguous(static_cast<const void*>(&live), DType::kInt32, {});
  c.Bind();
  for (const bool oracle : {true, false}) {
    std::vector<int16_t> replay(12 * 4, -5);
    std::vector<int64_t> load(24, 100);
    Result result(9, 4);
    result.outputs.replay = TensorView::Contiguous(replay.data(), DType::kInt16, {12, 4});
    result.outputs.expert_load = TensorView::Contiguous(load.data(), DType::kInt64, {24});
    if (oracle) {
      RouteRef(c.rule, 4, c.inputs, result.outputs);
    } else {
      RouteCpu(c.rule, 4, c.inputs, result.outputs, 2);
    }
    std::vector<int64_t> counted(24, 100);
    for (size_t i = 0; i < replay.size(); ++i) {
      EXPECT_EQ(replay[i], i < 20 ? result.ids[i] : -5) << i;
      EXPECT_EQ(i >= 20 && i < 36, i < 36 && result.ids[i] == -77) << i;
      if (i < 20) {
        ++counted[static_cast<size_t>(result.ids[i])];
      }
    }
    EXPECT_EQ(load, counted);
    EXPECT_EQ(result.weights[20], -77.0F);
  }
}

// Counters are exact whatever the threads, also with skipped slots; more slots than one block.
TEST(Route, ExpertLoadIsExactForAnyThreads) {
  Random random(4);
  Case c(RoutingRule::TopK(), 50, 6, 7000);
  std::vector<int32_t> forced(42000);
  std::vector<int32_t> counted(50, 0);
  for (int32_t& id : forced) {
    id = random.Below(60) - 5;
    if (id >= 0 && id < 50) {
      ++counted[static_cast<size_t>(id)];
    }
  }
  c.inputs.forced_ids =
      TensorView::Contiguous(static_cast<const void*>(forced.data()), DType::kInt32, {7000, 6});
  c.Bind();
  for (const int threads : {1, 2, 5}) {
    std::vector<int32_t> load(50, 0);
    Result result(7000, 6);
    result.outputs.expert_load = TensorView::Contiguous(load.data(), DType::kInt32, {50});
    RouteCpu(c.rule, 6, c.inputs, result.outputs, threads);
    EXPECT_EQ(load, counted) << threads;
  }
}

TEST(Route, Bf16WeightsAreRoundedOnce) {
  Random random(5);
  Case c(RoutingRule::Renormalize(), 32, 4, 20);
  for (float& z : c.logits) {
    z = random.Normal();
  }
  c.Bind();
  Result wide(20, 4);
  RouteCpu(c.rule, 4, c.inputs, wide.outputs, 1);
  std::vector<uint16_t> narrow(80);
  Result result(20, 4);
  result.outputs.weights = TensorView::Contiguous(narrow.data(), DType::kBf16, {20, 4});
  RouteCpu(c.rule, 4, c.inputs, result.outputs, 1);
  for (size_t i = 0; i < narrow.size(); ++i) {
    EXPECT_EQ(narrow[i], formats::EncodeBf16(wide.weights[i]));
  }
}

// A token's result depends on nothing around it: threads, position, batch.
TEST(Route, TokensAreIndependent) {
  Random random(6);
  Case c(RoutingRule::DeepSeekV3(8, 4, 2.5F), 256, 8, 300);
  for (float& z : c.logits) {
    z = random.Normal();
  }
  c.Bind();
  Result whole(300, 8);
  RouteCpu(c.rule, 8, c.inputs, whole.outputs, 4);
  for (const int64_t token : {0, 17, 299}) {
    Case alone(c.rule, 256, 8, 1);
    alone.logits = c.Row(token);
    alone.Bind();
    Result one(1, 8);
    RouteCpu(c.rule, 8, alone.inputs, one.outputs, 1);
    for (size_t j = 0; j < 8; ++j) {
      const size_t at = (static_cast<size_t>(token) * 8) + j;
      EXPECT_EQ(one.ids[j], whole.ids[at]);
      EXPECT_EQ(Bits(one.weights)[j], Bits(whole.weights)[at]);
    }
  }
}

TEST(Route, RulesPrintAllTheirFields) {
  EXPECT_EQ(ToString(RoutingRule::DeepSeekV3(8, 4, 2.5F)),
            "score=sigmoid weight=score renormalise=sum_plus_epsilon bias=yes groups=4/8 "
            "scaling_factor=2.5");
  std::set<std::string> texts;
  for (const testing::Method& method : testing::Methods()) {
    texts.insert(ToString(method.rule));
  }
  // Same data under two names: Renormalize(Naive), Llama4 and TopKSigmoid, Sigmoid and
  // SigmoidRenorm without renormalisation.
  EXPECT_EQ(texts.size(), testing::Methods().size() - 3);
}

}  // namespace
}  // namespace hopyard::route
