// SPDX-License-Identifier: Apache-2.0
// The judge of selections: it accepts what FP32 scores may choose and nothing else.
#include "stages/1_route/route_judge.h"

#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "stages/1_route/route_testing.h"

namespace hopyard::route {
namespace {

using testing::Case;
using testing::kInf;
using testing::kNan;

struct Row {
  RoutingRule rule;
  std::vector<float> logits;
  std::vector<float> bias;

  [[nodiscard]] SelectionMatch Judge(const std::vector<int32_t>& ids) const {
    RouteInputs inputs;
    const auto count = static_cast<int64_t>(logits.size());
    inputs.logits = TensorView::Contiguous(logits.data(), DType::kFloat32, {1, count});
    if (!bias.empty()) {
      inputs.bias = TensorView::Contiguous(bias.data(), DType::kFloat32, {count});
    }
    return JudgeSelection(rule, inputs, 0, ids);
  }
};

using M = SelectionMatch;

TEST(JudgeSelection, KnowsTheDefinition) {
  const Row row{RoutingRule::Renormalize(), {0.0F, 3.0F, 1.0F, 2.0F}, {}};
  EXPECT_EQ(row.Judge({1, 3}), M::kEqual);
  EXPECT_EQ(row.Judge({3, 1}), M::kDifferent);   // order
  EXPECT_EQ(row.Judge({1, 2}), M::kDifferent);   // a better one is left out
  EXPECT_EQ(row.Judge({1, 1}), M::kDifferent);   // twice
  EXPECT_EQ(row.Judge({1, -1}), M::kDifferent);  // not an expert
  EXPECT_EQ(row.Judge({1, 4}), M::kDifferent);
}

TEST(JudgeSelection, EqualScoresGoToTheSmallerIdButAnyOrderIsATie) {
  const Row row{RoutingRule::Renormalize(), {1.0F, 2.0F, 2.0F, 2.0F}, {}};
  EXPECT_EQ(row.Judge({1, 2}), M::kEqual);
  EXPECT_EQ(row.Judge({3, 1}), M::kTied);
  EXPECT_EQ(row.Judge({3, 0}), M::kDifferent);
}

// FP32 sigmoids of 18 and more are all 1; in double they differ.
TEST(JudgeSelection, SaturatedScoresTie) {
  const Row row{RoutingRule::DeepSeekV3(1, 1, 1.0F), {20.0F, 25.0F, 18.0F, 2.0F}, {}};
  EXPECT_EQ(row.Judge({1, 0}), M::kEqual);
  EXPECT_EQ(row.Judge({0, 1}), M::kTied);
  EXPECT_EQ(row.Judge({0, 2}), M::kTied);
  EXPECT_EQ(row.Judge({0, 3}), M::kDifferent);
}

// The same logits under another score are far apart: no rule may be judged by a sigmoid.
TEST(JudgeSelection, ScoresAreTheRulesOwn) {
  const std::vector<float> zeros(3, 0.0F);
  const Row softplus{RoutingRule::SqrtSoftplus(), {20.0F, 30.0F, 40.0F}, zeros};
  EXPECT_EQ(softplus.Judge({2, 1}), M::kEqual);
  EXPECT_EQ(softplus.Judge({1, 2}), M::kDifferent);
  EXPECT_EQ(softplus.Judge({0, 1}), M::kDifferent);
  const Row logits{RoutingRule::Llama4(), {20.0F, 30.0F, 40.0F}, {}};
  EXPECT_EQ(logits.Judge({1}), M::kDifferent);
  // Underflow: both probabilities are 0 in FP32.
  const Row softmax{RoutingRule::Default(), {0.0F, -150.0F, -140.0F}, {}};
  EXPECT_EQ(softmax.Judge({0, 2}), M::kEqual);
  EXPECT_EQ(softmax.Judge({0, 1}), M::kTied);
}

// An ulp of score + bias is one of the larger of the two, however little their sum is.
TEST(JudgeSelection, BiasesCancel) {
  const Row row{RoutingRule::DeepSeekV3(1, 1, 1.0F), {0.0F, 1e-7F, 0.5F}, {-0.5F, -0.5F, -0.5F}};
  EXPECT_EQ(row.Judge({2, 1}), M::kEqual);
  EXPECT_EQ(row.Judge({2, 0}), M::kTied);
  EXPECT_EQ(row.Judge({0, 2}), M::kDifferent);
}

TEST(JudgeSelection, NanIsNoTie) {
  const Row row{RoutingRule::Renormalize(), {kNan, 1.0F, 2.0F, kNan}, {}};
  EXPECT_EQ(row.Judge({2, 1, 0}), M::kEqual);
  EXPECT_EQ(row.Judge({2, 1, 3}), M::kDifferent);
  EXPECT_EQ(row.Judge({1, 2, 0}), M::kDifferent);
  const Row infinite{RoutingRule::Renormalize(), {kInf, 1.0F, kInf, -kInf}, {}};
  EXPECT_EQ(infinite.Judge({0, 2}), M::kEqual);
  EXPECT_EQ(infinite.Judge({2, 0}), M::kTied);
  EXPECT_EQ(infinite.Judge({2, 1}), M::kDifferent);
}

// Groups of two: the second and third group tie, with members far apart.
TEST(JudgeSelection, TiedGroupsMayChangeIdsWithFarScores) {
  RoutingRule rule = RoutingRule::DeepSeekV3(4, 2, 1.0F);
  rule.score = RoutingScore::kLogit;
  const Row row{rule, {5.0F, 5.0F, 4.0F, 0.0F, 2.0F, 2.0F, 1.0F, 1.0F}, {}};
  EXPECT_EQ(row.Judge({0, 1, 2}), M::kEqual);
  EXPECT_EQ(row.Judge({0, 1, 4}), M::kTied);  // the third group instead
  EXPECT_EQ(row.Judge({0, 1, 5}), M::kTied);
  EXPECT_EQ(row.Judge({0, 1, 3}), M::kDifferent);  // 2 is better in the same group
  EXPECT_EQ(row.Judge({0, 1, 6}), M::kDifferent);  // a group below the cut
  EXPECT_EQ(row.Judge({0, 2, 4}), M::kDifferent);  // three groups
}

// Everything that the backend selects passes, with saturated scores and ties between groups too.
TEST(JudgeSelection, AcceptsTheBackend) {
  for (const testing::Method& method : testing::Methods(8, 4)) {
    for (const float scale : {1.0F, 30.0F}) {
      SCOPED_TRACE(ToString(method.rule) + " x " + std::to_string(scale));
      Case c(method.rule, 32, 4, 300);
      for (size_t i = 0; i < c.logits.size(); ++i) {
        c.logits[i] = static_cast<float>((i * 2654435761U >> 7) % 8191) / 1024.0F * scale - scale;
      }
      c.Bind();
      testing::Result result(c.num_tokens, c.top_k);
      RouteCpu(c.rule, c.top_k, c.inputs, result.outputs, 1);
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        const auto first = result.ids.begin() + t * c.top_k;
        std::vector<int32_t> ids(first, first + c.top_k);
        ASSERT_NE(JudgeSelection(c.rule, c.inputs, t, ids), M::kDifferent) << "token " << t;
        ids[0] = ids[1];
        ASSERT_EQ(JudgeSelection(c.rule, c.inputs, t, ids), M::kDifferent) << "token " << t;
      }
    }
  }
}

}  // namespace
}  // namespace hopyard::route
