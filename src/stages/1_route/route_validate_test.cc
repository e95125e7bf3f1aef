// SPDX-License-Identifier: Apache-2.0
// Bad input of routing: error kind, the words of the message, and nothing written.
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/error.h"
#include "hopyard/routing.h"

#include "stages/1_route/route_testing.h"

namespace hopyard {
namespace {

using ::testing::HasSubstr;

constexpr int kTokens = 3;
constexpr int kExperts = 16;
constexpr int kTopK = 4;

// A valid call; tests spoil one thing at a time.
struct Call {
  RoutingRule rule = RoutingRule::DeepSeekV3(4, 2, 1.0F);
  int top_k = kTopK;
  std::vector<float> logits = std::vector<float>(64, 1.0F);
  std::vector<float> bias = std::vector<float>(32, 0.0F);
  std::vector<int32_t> ids = std::vector<int32_t>(64, -77);
  std::vector<float> weights = std::vector<float>(64, -77.0F);
  std::vector<int16_t> replay = std::vector<int16_t>(64, -77);
  std::vector<int64_t> load = std::vector<int64_t>(32, 0);
  std::vector<int64_t> integers = std::vector<int64_t>(64, 0);
  RouteInputs in;
  RouteOutputs out;

  Call() {
    in.logits = TensorView::Contiguous(logits.data(), DType::kFloat32, {kTokens, kExperts});
    in.bias = TensorView::Contiguous(bias.data(), DType::kFloat32, {kExperts});
    out.expert_ids = Ids({kTokens, kTopK});
    out.weights = TensorView::Contiguous(weights.data(), DType::kFloat32, {kTokens, kTopK});
    out.replay = Replay({kTokens, kTopK});
    out.expert_load = TensorView::Contiguous(load.data(), DType::kInt64, {kExperts});
  }
  TensorView Ids(std::initializer_list<int64_t> shape) {
    return TensorView::Contiguous(ids.data(), DType::kInt32, shape);
  }
  TensorView Replay(std::initializer_list<int64_t> shape) {
    return TensorView::Contiguous(replay.data(), DType::kInt16, shape);
  }
  TensorView Integers(DType dtype, std::initializer_list<int64_t> shape) {
    return TensorView::Contiguous(integers.data(), dtype, shape);
  }
};

struct BadCall {
  std::string name;
  std::function<void(Call&)> spoil;
  std::vector<std::string> words;
};

class BadRoute : public ::testing::TestWithParam<BadCall> {};

TEST_P(BadRoute, IsRefusedByNameAndWritesNothing) {
  Call call;
  GetParam().spoil(call);
  try {
    Route(call.rule, call.top_k, call.in, call.out);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
    for (const std::string& word : GetParam().words) {
      EXPECT_THAT(error.message(), HasSubstr(word));
    }
  }
  EXPECT_THAT(call.ids, ::testing::Each(-77));
  EXPECT_THAT(call.weights, ::testing::Each(-77.0F));
  EXPECT_THAT(call.replay, ::testing::Each(-77));
  EXPECT_THAT(call.load, ::testing::Each(0));
}

TensorView Transposed(TensorView view) {
  std::swap(view.strides[0], view.strides[1]);
  view.strides[0] = 1;
  view.strides[1] = view.shape[0];
  return view;
}

std::vector<BadCall> LogitsAndSizes() {
  return {
      {"LogitsMissing", [](Call& c) { c.in.logits = {}; }, {"logits is missing"}},
      {"LogitsDtype",
       [](Call& c) { c.in.logits.dtype = DType::kFloat64; },
       {"logits is f64", "f32 or bf16 or f16"}},
      {"LogitsRank", [](Call& c) { c.in.logits.ndim = 1; }, {"logits has shape [3]"}},
      {"LogitsStrided",
       [](Call& c) { c.in.logits = Transposed(c.in.logits); },
       {"logits ", "is not contiguous"}},
      {"LogitsNull", [](Call& c) { c.in.logits.data = nullptr; }, {"logits ", "null pointer"}},
      {"LogitsOnGpu",
       [](Call& c) {
         c.in.logits.device = {DeviceKind::kCuda, 0};
       },
       {"logits is a CUDA tensor"}},
      {"NoExperts",
       [](Call& c) {
         c.in.logits = TensorView::Contiguous(c.logits.data(), DType::kFloat32, {kTokens, 0});
       },
       {"num_experts=0", "1 .. 2048"}},
      {"TooManyExperts",
       [](Call& c) {
         c.in.logits = TensorView::Contiguous(c.logits.data(), DType::kFloat32, {0, 2049});
       },
       {"2049 experts", "1 .. 2048"}},
      {"TopKZero", [](Call& c) { c.top_k = 0; }, {"top_k=0", "1 .. 32"}},
      {"TopKNegative", [](Call& c) { c.top_k = -1; }, {"top_k=-1"}},
      {"TopKAboveLimit", [](Call& c) { c.top_k = 33; }, {"top_k=33", "1 .. 32"}},
      {"TopKAboveExperts",
       [](Call& c) { c.top_k = 17; },
       {"top_k=17", "between 1 and num_experts=16"}},
  };
}

std::vector<BadCall> Rules() {
  return {
      {"NoGroups", [](Call& c) { c.rule.num_groups = 0; }, {"num_groups=0", "at least 1"}},
      {"ThreeGroups",
       [](Call& c) { c.rule.num_groups = 3; },
       {"num_experts=16 is not divisible by num_groups=3"}},
      {"NoTopGroups",
       [](Call& c) { c.rule.top_groups = 0; },
       {"top_groups=0", "1 .. num_groups=4"}},
      {"MoreTopGroupsThanGroups",
       [](Call& c) {
         c.rule.num_groups = 2;
         c.rule.top_groups = 4;
       },
       {"top_groups=4", "1 .. num_groups=2"}},
      {"TooFewCandidates",
       [](Call& c) {
         c.rule.top_groups = 1;
         c.top_k = 5;
       },
       {"top_k=5 exceeds the 4 experts of top_groups=1", "num_groups=4"}},
      {"UnknownScore",
       [](Call& c) { c.rule.score = static_cast<RoutingScore>(9); },
       {"rule.score=9"}},
      {"UnknownWeight",
       [](Call& c) { c.rule.weight = static_cast<RoutingWeight>(9); },
       {"rule.weight=9"}},
      {"UnknownRenormalise",
       [](Call& c) { c.rule.renormalise = static_cast<Renormalise>(9); },
       {"rule.renormalise=9"}},
      {"ScalingNan",
       [](Call& c) { c.rule.scaling_factor = std::numeric_limits<float>::quiet_NaN(); },
       {"scaling_factor=", "finite"}},
      {"ScalingInfinite",
       [](Call& c) { c.rule.scaling_factor = std::numeric_limits<float>::infinity(); },
       {"scaling_factor=inf"}},
      {"ScalingZero",
       [](Call& c) { c.rule.scaling_factor = 0.0F; },
       {"scaling_factor=0; wanted more than 0"}},
      {"ScalingNegative",
       [](Call& c) { c.rule.scaling_factor = -2.5F; },
       {"scaling_factor=-2.5; wanted more than 0"}},
      {"BiasUnused",
       [](Call& c) { c.rule = RoutingRule::Renormalize(); },
       {"bias is given", "use_bias = false"}},
      {"BiasDtype",
       [](Call& c) { c.in.bias.dtype = DType::kInt32; },
       {"bias is i32", "f32 or bf16"}},
      {"BiasRank",
       [](Call& c) {
         c.in.bias = TensorView::Contiguous(c.bias.data(), DType::kFloat32, {1, kExperts});
       },
       {"bias has shape [1, 16]", "wanted [16]"}},
      {"BiasLength",
       [](Call& c) {
         c.in.bias = TensorView::Contiguous(c.bias.data(), DType::kFloat32, {kExperts + 1});
       },
       {"bias has shape [17]", "wanted [16]"}},
  };
}

std::vector<BadCall> GivenIds() {
  return {
      {"ForcedIds64",
       [](Call& c) {
         c.in.forced_ids = c.Integers(DType::kInt64, {kTokens, kTopK});
       },
       {"forced_ids is i64", "i16 or i32"}},
      {"ForcedIdsRows",
       [](Call& c) {
         c.in.forced_ids = c.Integers(DType::kInt32, {kTokens + 1, kTopK});
       },
       {"forced_ids has shape [4, 4]", "wanted [3, 4]"}},
      {"ForcedIdsColumns",
       [](Call& c) {
         c.in.forced_ids = c.Integers(DType::kInt32, {kTokens, kTopK + 1});
       },
       {"forced_ids has shape [3, 5]", "wanted [3, 4]"}},
      {"ForcedIdsStrided",
       [](Call& c) {
         c.in.forced_ids = Transposed(c.Integers(DType::kInt32, {kTokens, kTopK}));
       },
       {"forced_ids ", "is not contiguous"}},
      {"TwoSourcesOfIds",
       [](Call& c) {
         c.in.forced_ids = c.Integers(DType::kInt32, {kTokens, kTopK});
         c.in.token_ids = c.Integers(DType::kInt64, {kTokens});
         c.in.token_to_experts = c.Integers(DType::kInt32, {8, kTopK});
       },
       {"forced_ids and token_ids", "one source"}},
      {"TokenIdsWithoutTable",
       [](Call& c) { c.in.token_ids = c.Integers(DType::kInt64, {kTokens}); },
       {"token_to_experts is missing"}},
      {"TableWithoutTokenIds",
       [](Call& c) {
         c.in.token_to_experts = c.Integers(DType::kInt32, {8, kTopK});
       },
       {"token_ids is missing"}},
      {"TokenIdsLength",
       [](Call& c) {
         c.in.token_ids = c.Integers(DType::kInt64, {kTokens + 2});
         c.in.token_to_experts = c.Integers(DType::kInt32, {8, kTopK});
       },
       {"token_ids has shape [5]", "wanted [3]"}},
      {"TableColumns",
       [](Call& c) {
         c.in.token_ids = c.Integers(DType::kInt64, {kTokens});
         c.in.token_to_experts = c.Integers(DType::kInt32, {8, kTopK - 1});
       },
       {"token_to_experts has shape [8, 3]", "[*, 4]"}},
      {"TableDtype",
       [](Call& c) {
         c.in.token_ids = c.Integers(DType::kInt64, {kTokens});
         c.in.token_to_experts = c.Integers(DType::kInt64, {8, kTopK});
       },
       {"token_to_experts is i64", "wanted i32"}},
      {"NumTokensTooLarge",
       [](Call& c) {
         c.integers[0] = kTokens + 1;
         c.in.num_tokens = c.Integers(DType::kInt32, {1});
       },
       {"num_tokens holds 4", "0 .. 3"}},
      {"NumTokensDtype",
       [](Call& c) { c.in.num_tokens = c.Integers(DType::kInt64, {1}); },
       {"num_tokens is i64"}},
      {"NumTokensShape",
       [](Call& c) { c.in.num_tokens = c.Integers(DType::kInt32, {2}); },
       {"num_tokens has shape [2]", "wanted [1]"}},
  };
}

std::vector<BadCall> Outputs() {
  return {
      {"IdsMissing", [](Call& c) { c.out.expert_ids = {}; }, {"expert_ids is missing"}},
      {"IdsDtype",
       [](Call& c) { c.out.expert_ids.dtype = DType::kInt64; },
       {"expert_ids is i64", "wanted i32"}},
      {"IdsShape",
       [](Call& c) {
         c.out.expert_ids = c.Ids({kTokens, kTopK + 1});
       },
       {"expert_ids has shape [3, 5]", "wanted [3, 4]"}},
      {"WeightsMissing", [](Call& c) { c.out.weights = {}; }, {"weights is missing"}},
      {"WeightsDtype",
       [](Call& c) { c.out.weights.dtype = DType::kFp16; },
       {"weights is f16", "f32 or bf16"}},
      {"WeightsShape",
       [](Call& c) {
         c.out.weights =
             TensorView::Contiguous(c.weights.data(), DType::kFloat32, {kTopK, kTokens});
       },
       {"weights has shape [4, 3]", "wanted [3, 4]"}},
      {"ReplayDtype",
       [](Call& c) { c.out.replay.dtype = DType::kInt32; },
       {"replay is i32", "wanted i16"}},
      {"ReplayRank",
       [](Call& c) { c.out.replay = c.Replay({kTokens * kTopK}); },
       {"replay has shape [12]", "[*, 4]"}},
      {"ReplayColumns",
       [](Call& c) {
         c.out.replay = c.Replay({kTokens, kTopK - 1});
       },
       {"replay has shape [3, 3]", "[*, 4]"}},
      {"ReplayTooShort",
       [](Call& c) {
         c.out.replay = c.Replay({kTokens - 1, kTopK});
       },
       {"replay has 2 rows", "one per token (3)"}},
      {"ReplayStrided",
       [](Call& c) { c.out.replay = Transposed(c.out.replay); },
       {"replay ", "is not contiguous"}},
      {"ReplayOnGpu",
       [](Call& c) {
         c.out.replay.device = {DeviceKind::kCuda, 0};
       },
       {"replay is a CUDA tensor"}},
      {"LoadDtype",
       [](Call& c) { c.out.expert_load.dtype = DType::kInt16; },
       {"expert_load is i16", "i32 or i64"}},
      {"LoadLength",
       [](Call& c) {
         c.out.expert_load = TensorView::Contiguous(c.load.data(), DType::kInt64, {kExperts - 1});
       },
       {"expert_load has shape [15]", "wanted [16]"}},
  };
}

const auto kCaseName = [](const auto& param) { return param.param.name; };
INSTANTIATE_TEST_SUITE_P(LogitsAndSizes, BadRoute, ::testing::ValuesIn(LogitsAndSizes()),
                         kCaseName);
INSTANTIATE_TEST_SUITE_P(Rules, BadRoute, ::testing::ValuesIn(Rules()), kCaseName);
INSTANTIATE_TEST_SUITE_P(GivenIds, BadRoute, ::testing::ValuesIn(GivenIds()), kCaseName);
INSTANTIATE_TEST_SUITE_P(Outputs, BadRoute, ::testing::ValuesIn(Outputs()), kCaseName);

// The call that the tests spoil is itself accepted, as are all optional parts and no tokens.
TEST(GoodRoute, IsAccepted) {
  Call call;
  EXPECT_NO_THROW(Route(call.rule, call.top_k, call.in, call.out));
  EXPECT_EQ(call.ids[0], 0);
  Call empty;
  empty.in.logits =
      TensorView::Contiguous(static_cast<void*>(nullptr), DType::kBf16, {0, kExperts});
  empty.out.expert_ids =
      TensorView::Contiguous(static_cast<void*>(nullptr), DType::kInt32, {0, kTopK});
  empty.out.weights = TensorView::Contiguous(static_cast<void*>(nullptr), DType::kBf16, {0, kTopK});
  EXPECT_NO_THROW(Route(empty.rule, empty.top_k, empty.in, empty.out));
  EXPECT_THAT(empty.replay, ::testing::Each(-77));
}

// Limits of FlashInfer's launchers that do not exist here.
TEST(GoodRoute, LimitsAreLifted) {
  Call call;
  call.rule.top_groups = 1;
  EXPECT_NO_THROW(Route(call.rule, kTopK, call.in, call.out)) << "top_k == candidates";
  call.in.bias = {};
  call.rule = RoutingRule::Renormalize();
  call.rule.num_groups = 4;
  call.rule.top_groups = 2;
  EXPECT_NO_THROW(Route(call.rule, kTopK, call.in, call.out)) << "groups with any score";
  EXPECT_NO_THROW(Route(RoutingRule::Llama4(), kTopK, call.in, call.out)) << "top_k 4";
}

void ExpectFusedError(Call& call, const RoutingRule& rule, const TensorView& values,
                      const std::string& words) {
  try {
    FusedTopkDeepseek(call.in.logits, call.in.bias, rule, values, call.out.expert_ids,
                      call.out.replay);
    FAIL() << "accepted: " << words;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
    EXPECT_THAT(error.message(), HasSubstr(words));
  }
  EXPECT_THAT(call.ids, ::testing::Each(-77));
}

TEST(FusedTopkDeepseek, BadInput) {
  Call call;
  const RoutingRule rule = call.rule;
  ExpectFusedError(call, RoutingRule::Renormalize(), call.out.weights,
                   "fused_topk_deepseek wants RoutingRule::DeepSeekV3");
  TensorView half = call.out.weights;
  half.dtype = DType::kBf16;
  ExpectFusedError(call, rule, half, "topk_values is bf16; wanted the dtype of scores, f32");
  ExpectFusedError(call, RoutingRule::DeepSeekV3(4, 5, 1.0F), call.out.weights, "top_groups=5");
  ExpectFusedError(call, RoutingRule::DeepSeekV3(3, 1, 1.0F), call.out.weights, "not divisible");
  ExpectFusedError(call, RoutingRule::DeepSeekV3(16, 2, 1.0F), call.out.weights,
                   "top_k=4 exceeds the 2 experts");
  call.out.replay = call.Replay({kTokens - 1, kTopK});
  ExpectFusedError(call, rule, call.out.weights, "replay has 2 rows");
  call.out.replay = {};
  call.out.expert_ids.dtype = DType::kInt64;
  ExpectFusedError(call, rule, call.out.weights, "is i64");
  call.out.expert_ids = call.Ids({kTokens * kTopK});
  ExpectFusedError(call, rule, call.out.weights, "topk_indices has shape [12]");
  call.out.expert_ids = {};
  ExpectFusedError(call, rule, call.out.weights, "topk_indices");
}

}  // namespace
}  // namespace hopyard
