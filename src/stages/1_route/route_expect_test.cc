// SPDX-License-Identifier: Apache-2.0
// The test of the routing tests: both judges accept what Route gives and reject planted faults.
#include "stages/1_route/route_expect.h"

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/rejects.h"

namespace hopyard::route {
namespace {

using hopyard::test::Rejects;
using testing::Case;
using testing::Random;
using testing::Result;

constexpr int64_t kToken = 3;

struct Verdicts {
  bool definition = false;  // true: rejected
  bool oracle = false;
};

Verdicts Judge(const Case& c, const Result& got) {
  Result oracle(c.num_tokens, c.top_k);
  RouteRef(c.rule, c.top_k, c.inputs, oracle.outputs);
  return {Rejects([&] { testing::ExpectDefinition(c, got); }), Rejects([&] {
            for (int64_t token = 0; token < c.num_tokens; ++token) {
              testing::ExpectNearOracle(c, got, oracle, token);
            }
          })};
}

// Ids and weights of token kToken, choice j.
struct Choice {
  int32_t* id;
  float* weight;
};

Choice At(const Case& c, Result& result, int j) {
  const auto at = static_cast<size_t>(kToken * c.top_k + j);
  return {&result.ids[at], &result.weights[at]};
}

struct Fault {
  const char* name;
  std::function<void(const Case&, Result*)> plant;
};

const std::vector<Fault>& Faults() {
  static const std::vector<Fault> faults = {
      {"TwoExpertsSwapped",
       [](const Case& c, Result* r) {
         std::swap(*At(c, *r, 0).id, *At(c, *r, 1).id);
         std::swap(*At(c, *r, 0).weight, *At(c, *r, 1).weight);
       }},
      {"TwoIdsSwappedUnderTheirWeights",
       [](const Case& c, Result* r) { std::swap(*At(c, *r, 0).id, *At(c, *r, 1).id); }},
      {"TwoWeightsSwapped",
       [](const Case& c, Result* r) { std::swap(*At(c, *r, 0).weight, *At(c, *r, 1).weight); }},
      {"IdOffByOne",
       [](const Case& c, Result* r) {
         int32_t& id = *At(c, *r, 0).id;
         id = (id + 1) % c.num_experts;
       }},
      {"IdBeyondTheExperts", [](const Case& c, Result* r) { *At(c, *r, 1).id = c.num_experts; }},
      {"SkippedSlot", [](const Case& c, Result* r) { *At(c, *r, 1).id = -1; }},
      {"OneExpertTwice", [](const Case& c, Result* r) { *At(c, *r, 1).id = *At(c, *r, 0).id; }},
      {"ExpertsOfTheNextToken",
       [](const Case& c, Result* r) {
         for (int j = 0; j < c.top_k; ++j) {
           *At(c, *r, j).id = r->ids[static_cast<size_t>((kToken + 1) * c.top_k + j)];
         }
       }},
      {"UnscaledWeight",
       [](const Case& c, Result* r) { *At(c, *r, 0).weight /= c.rule.scaling_factor; }},
      {"WeightOffBy1e-5", [](const Case& c, Result* r) { *At(c, *r, 0).weight *= 1.00001F; }},
      {"WeightNotANumber",
       [](const Case& c, Result* r) { *At(c, *r, c.top_k - 1).weight = testing::kNan; }},
  };
  return faults;
}

// Random rows without near ties.
Case RandomCase(const RoutingRule& rule) {
  Case c(rule, 32, 4, 8);
  Random random(5);
  for (float& z : c.logits) {
    z = random.Normal();
  }
  if (rule.use_bias) {
    c.bias.resize(32);
    for (float& b : c.bias) {
      b = 0.1F * random.Normal();
    }
  }
  return c;
}

// The rules that have a factor to forget.
std::vector<testing::Method> JudgedMethods() {
  std::vector<testing::Method> methods;
  for (testing::Method& method : testing::Methods(4, 2)) {
    method.rule.scaling_factor = 2.5F;
    methods.push_back(method);
  }
  return methods;
}

class Judges : public ::testing::TestWithParam<testing::Method> {};

TEST_P(Judges, AcceptRouteAndRejectEveryFault) {
  Case c = RandomCase(GetParam().rule);
  c.Bind();
  Result right(c.num_tokens, c.top_k);
  Route(c.rule, c.top_k, c.inputs, right.outputs);
  EXPECT_FALSE(Judge(c, right).definition);
  EXPECT_FALSE(Judge(c, right).oracle);
  for (const Fault& fault : Faults()) {
    Result wrong(c.num_tokens, c.top_k);
    Route(c.rule, c.top_k, c.inputs, wrong.outputs);
    fault.plant(c, &wrong);
    const Verdicts verdicts = Judge(c, wrong);
    EXPECT_TRUE(verdicts.definition) << fault.name;
    EXPECT_TRUE(verdicts.oracle) << fault.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, Judges, ::testing::ValuesIn(JudgedMethods()),
                         [](const auto& method) { return method.param.name; });

// One token whose logits are given, judged with these ids.
class OneToken {
 public:
  OneToken(const RoutingRule& rule, int top_k, const std::vector<float>& logits)
      : case_(rule, static_cast<int>(logits.size()), top_k, 1) {
    case_.logits = logits;
    case_.Bind();
  }
  [[nodiscard]] Verdicts With(const std::vector<int32_t>& ids) const {
    Result result(1, case_.top_k);
    result.ids = ids;
    const std::vector<int> chosen(ids.begin(), ids.end());
    result.weights = testing::DefWeights(case_.rule, case_.logits, chosen);
    return Judge(case_, result);
  }

 private:
  Case case_;
};

// Equal scores go to the smaller id; the double oracle cannot tell equal from nearly equal, the
// definition can.
TEST(TieOrder, TheDefinitionRejectsTheLargerId) {
  const OneToken token(RoutingRule::Renormalize(), 2, {0, 2, 2, 1, 2, -1});
  EXPECT_FALSE(token.With({1, 2}).definition);
  EXPECT_FALSE(token.With({1, 2}).oracle);
  for (const std::vector<int32_t>& ids :
       {std::vector<int32_t>{2, 1}, std::vector<int32_t>{1, 4}, std::vector<int32_t>{4, 2}}) {
    EXPECT_TRUE(token.With(ids).definition);
    EXPECT_FALSE(token.With(ids).oracle);
  }
  EXPECT_TRUE(token.With({1, 3}).oracle) << "3 is in no tie";
  EXPECT_TRUE(token.With({1, 1}).oracle);
}

// Groups {0, 1}, {2, 3}, {4, 5}, {6, 7}, two of which are kept: the first is best, the second and
// the third tie, the fourth is out.
TEST(GroupTies, OnlyGroupsWithinTheTieAreAccepted) {
  const std::vector<float> logits = {3, 2, 1, 0.5, 1, 0.5, 1.2F, -4};
  const OneToken token(RoutingRule::DeepSeekV3(4, 2, 1.0F), 3, logits);
  EXPECT_FALSE(token.With({0, 1, 2}).definition);
  EXPECT_FALSE(token.With({0, 1, 2}).oracle);
  EXPECT_TRUE(token.With({0, 1, 4}).definition);
  EXPECT_FALSE(token.With({0, 1, 4}).oracle) << "the other group of the tie";
  EXPECT_TRUE(token.With({0, 1, 6}).oracle) << "an expert of the dropped group";
  EXPECT_TRUE(token.With({0, 1, 3}).oracle) << "2 is better";
  EXPECT_TRUE(token.With({0, 1, 5}).oracle) << "4 is better";
  EXPECT_TRUE(token.With({0, 2, 4}).oracle) << "three groups, and without 1";
  EXPECT_TRUE(token.With({2, 0, 1}).oracle) << "out of order";
  const OneToken wide(RoutingRule::DeepSeekV3(4, 2, 1.0F), 4, logits);
  EXPECT_FALSE(wide.With({0, 1, 2, 3}).oracle);
  EXPECT_FALSE(wide.With({0, 1, 4, 5}).oracle);
  EXPECT_TRUE(wide.With({0, 1, 2, 4}).oracle) << "both groups of the tie, where one is kept";
}

// A kept group that the ids do not show must be one that hides no better expert.
TEST(GroupTies, AHiddenGroupMayNotHoldABetterExpert) {
  // Sums of sigmoids: {0, 1} and {2, 3} tie exactly, {4, 5} is out; one group is kept.
  const OneToken token(RoutingRule::DeepSeekV3(3, 1, 1.0F), 1, {2, 1, 2, 1, 1.9F, -9});
  EXPECT_FALSE(token.With({0}).oracle);
  EXPECT_FALSE(token.With({2}).oracle);
  EXPECT_TRUE(token.With({1}).oracle);
  EXPECT_TRUE(token.With({4}).oracle);
  // Two of three kept, all three tie: some group beside {4, 5} is kept, and both hold a better one.
  const OneToken three(RoutingRule::DeepSeekV3(3, 2, 1.0F), 1, {2, 1, 1, 2, 1, 2});
  EXPECT_FALSE(three.With({0}).oracle);
  EXPECT_FALSE(three.With({5}).oracle);
  EXPECT_TRUE(three.With({4}).oracle);
}

}  // namespace
}  // namespace hopyard::route
