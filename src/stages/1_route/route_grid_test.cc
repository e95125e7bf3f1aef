// SPDX-License-Identifier: Apache-2.0
// Shapes: every size the API promises, the grids of other libraries' tests, expert-parallel shards
// through the permutation, and fused_topk_deepseek.
#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.h"
#include "stages/1_route/route_expect.h"
#include "stages/2_permute/permute.h"

namespace hopyard::route {
namespace {

using testing::Bits;
using testing::Case;
using testing::ExpectDefinition;
using testing::Random;
using testing::Result;

class Sizes : public ::testing::TestWithParam<int> {};

TEST_P(Sizes, EveryTopKAndMethodMatchesOrIsRefused) {
  const int num_experts = GetParam();
  Random random(static_cast<uint64_t>(num_experts));
  for (const int top_k : {1, 2, 4, 6, 8, 10, 16, 22, 32}) {
    for (const int64_t tokens : {0, 1, 17}) {
      for (const testing::Method& method : testing::Methods()) {
        Case c(method.rule, num_experts, top_k, tokens);
        for (float& z : c.logits) {
          z = random.Normal() * 2.0F;
        }
        c.bias.resize(method.rule.use_bias ? static_cast<size_t>(num_experts) : 0);
        for (float& b : c.bias) {
          b = random.Normal() * 0.1F;
        }
        c.Bind();
        Result result(tokens, top_k);
        if (top_k > num_experts) {
          EXPECT_THROW(Route(c.rule, top_k, c.inputs, result.outputs), Error);
          continue;
        }
        Route(c.rule, top_k, c.inputs, result.outputs);
        ExpectDefinition(c, result);
        ASSERT_FALSE(HasFatalFailure()) << method.name << " top_k=" << top_k;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Experts, Sizes,
                         ::testing::Values(1, 7, 8, 60, 64, 102, 128, 160, 256, 257, 384, 512, 896,
                                           1024, 2048));

// Every divisor as a number of groups, also beyond other libraries' limits.
TEST(Groups, AnyDivisorWorks) {
  Random random(11);
  for (const int num_experts : {12, 60, 256, 384, 2048}) {
    for (int groups = 1; groups <= num_experts; ++groups) {
      if (num_experts % groups != 0) {
        continue;
      }
      const int top_groups = 1 + random.Below(groups);
      const int candidates = num_experts / groups * top_groups;
      const int top_k = 1 + random.Below(std::min(candidates, kMaxTopK));
      Case c(RoutingRule::DeepSeekV3(groups, top_groups, 2.5F), num_experts, top_k, 3);
      for (float& z : c.logits) {
        z = random.Normal();
      }
      for (int e = 0; e < num_experts; ++e) {
        c.bias.push_back(random.Normal() - 1.0F);
      }
      c.Bind();
      for (const Isa isa : testing::Isas()) {
        Result result(3, top_k);
        RouteCpuWith(isa, c.rule, top_k, c.inputs, result.outputs, 1);
        ExpectDefinition(c, result);
        ASSERT_FALSE(HasFatalFailure()) << num_experts << '/' << groups << ' ' << ToString(isa);
      }
    }
  }
}

// Rows are permutations of 1 .. E over 32: tie-free, and exact in bf16 up to 256 experts.
void FillTieFree(Random& random, Case& c, int hot) {
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    float* row = c.logits.data() + token * c.num_experts;
    for (int e = 0; e < c.num_experts; ++e) {
      row[e] = static_cast<float>(e + 1) / 32.0F;
    }
    for (int e = c.num_experts - 1; e > 0; --e) {
      std::swap(row[e], row[random.Below(e + 1)]);
    }
    if (hot >= 0) {
      row[hot] += 8.0F;
    }
  }
  if (c.rule.use_bias) {
    c.bias.resize(static_cast<size_t>(c.num_experts));
    for (int e = 0; e < c.num_experts; ++e) {
      c.bias[static_cast<size_t>(e)] =
          -2.0F + (4.0F * static_cast<float>(e) / static_cast<float>(c.num_experts));
    }
  }
}

struct Shard {
  int offset;
  int count;
};

// Ids of the shard's experts become local slots; the rest is remote. Checked by the independent
// checker, dense and padded, with and without clusters.
void CheckShard(const Case& c, const Result& result, Shard shard, int64_t tile) {
  std::vector<int32_t> local;
  for (const int32_t id : result.ids) {
    local.push_back(id >= shard.offset && id < shard.offset + shard.count ? id - shard.offset : -1);
  }
  const auto slots = TensorView::Contiguous(static_cast<const void*>(local.data()), DType::kInt32,
                                            {c.num_tokens, c.top_k});
  const auto num_slots = static_cast<int64_t>(local.size());
  for (const int64_t cluster : {1, 2}) {
    for (const int64_t alignment : {int64_t{1}, tile * cluster}) {
      const PermuteOptions options{shard.count, tile, cluster, alignment};
      const int64_t max_rows = MaxRows(num_slots, options);
      const int64_t max_tiles = MaxTiles(num_slots, options);
      std::vector<int32_t> buffer(static_cast<size_t>((2 * shard.count) + 1 + num_slots +
                                                      (2 * max_rows) + (3 * max_tiles) + 2));
      int32_t* next = buffer.data();
      const auto take = [&next](int64_t size) {
        next += size;
        return TensorView::Contiguous(next - size, DType::kInt32, {size});
      };
      PermuteOutputs outputs;
      outputs.expert_offsets = take(shard.count + 1);
      outputs.expert_counts = take(shard.count);
      outputs.slot_to_row = take(num_slots);
      outputs.row_to_slot = take(max_rows);
      outputs.row_to_token = take(max_rows);
      outputs.tile_expert = take(max_tiles);
      outputs.tile_row_begin = take(max_tiles);
      outputs.tile_row_end = take(max_tiles);
      outputs.num_tiles = take(1);
      outputs.num_rows = take(1);
      Permute(slots, options, outputs);
      ASSERT_EQ(permute::CheckPermutation(slots, options, outputs), "");
    }
  }
}

void CheckTieFree(Case c, int hot, const std::vector<Shard>& shards) {
  Random random(static_cast<uint64_t>((c.num_experts * 100) + c.top_k));
  FillTieFree(random, c, hot);
  c.Bind();
  Result result(c.num_tokens, c.top_k);
  std::vector<int16_t> replay(static_cast<size_t>((c.num_tokens + 5) * c.top_k), -1);
  Route(c.rule, c.top_k, c.inputs, result.outputs);
  Result recorded(c.num_tokens, c.top_k);
  recorded.outputs.replay =
      TensorView::Contiguous(replay.data(), DType::kInt16, {c.num_tokens + 5, c.top_k});
  Route(c.rule, c.top_k, c.inputs, recorded.outputs);
  ASSERT_EQ(recorded.ids, result.ids);
  ASSERT_EQ(Bits(recorded.weights), Bits(result.weights));
  for (size_t i = 0; i < replay.size(); ++i) {
    ASSERT_EQ(replay[i], i < result.ids.size() ? result.ids[i] : -1);
  }
  ExpectDefinition(c, result);
  Result oracle(c.num_tokens, c.top_k);
  RouteRef(c.rule, c.top_k, c.inputs, oracle.outputs);
  ASSERT_EQ(result.ids, oracle.ids) << ToString(c.rule);
  for (const Shard shard : shards) {
    for (const int64_t tile : {8, 32, 12}) {
      CheckShard(c, result, shard, tile);
    }
  }
}

// One method over shapes, batch sizes and dtypes.
std::vector<Case> PlainCases(const RoutingRule& rule) {
  constexpr std::array<std::array<int, 2>, 3> kShapes = {{{16, 1}, {16, 4}, {256, 8}}};
  std::vector<Case> cases;
  for (const auto& shape : kShapes) {
    for (const int64_t tokens : {1, 8, 150}) {
      for (const DType dtype : {DType::kFloat32, DType::kBf16}) {
        cases.emplace_back(rule, shape[0], shape[1], tokens);
        cases.back().logits_dtype = dtype;
      }
    }
  }
  return cases;
}

TEST(TieFree, PlainMethods) {
  for (const testing::Method& method : testing::Methods()) {
    for (const Case& c : PlainCases(method.rule)) {
      for (const int hot : {-1, 3}) {
        CheckTieFree(c, hot, {{0, c.num_experts}});
        ASSERT_FALSE(HasFatalFailure())
            << method.name << " E=" << c.num_experts << " T=" << c.num_tokens;
      }
    }
  }
}

TEST(TieFree, DeepSeekShapesAndTwoBatchSizes) {
  struct Shape {
    int num_experts, groups, top_groups, top_k;
  };
  constexpr std::array<Shape, 9> kShapes = {{{256, 8, 4, 8},
                                             {128, 4, 2, 4},
                                             {96, 1, 1, 8},
                                             {512, 1, 1, 22},
                                             {384, 1, 1, 8},
                                             {160, 1, 1, 8},
                                             {72, 1, 1, 6},
                                             {16, 4, 2, 4},
                                             {1024, 1, 1, 8}}};
  for (const Shape& s : kShapes) {
    for (const int64_t tokens : {8, 150}) {
      Case c(RoutingRule::DeepSeekV3(s.groups, s.top_groups, 2.5F), s.num_experts, s.top_k, tokens);
      const int quarter = s.num_experts / 4;
      CheckTieFree(c, -1, {{0, quarter}, {3 * quarter, quarter}, {quarter, quarter}});
      ASSERT_FALSE(HasFatalFailure()) << s.num_experts << " T=" << tokens;
    }
  }
}

TEST(TieFree, ExpertParallelShards) {
  struct Shape {
    int num_experts, top_k, offset, count;
  };
  constexpr std::array<Shape, 6> kShapes = {{{16, 4, 0, 8},
                                             {16, 4, 8, 8},
                                             {16, 4, 4, 4},
                                             {256, 8, 64, 64},
                                             {256, 8, 192, 64},
                                             {96, 8, 32, 32}}};
  for (const Shape& s : kShapes) {
    for (const int64_t tokens : {8, 150}) {
      CheckTieFree(Case(RoutingRule::Renormalize(), s.num_experts, s.top_k, tokens), -1,
                   {{s.offset, s.count}});
      ASSERT_FALSE(HasFatalFailure()) << s.num_experts;
    }
  }
}

TEST(TieFree, LargeBatch) {
  CheckTieFree(Case(RoutingRule::Renormalize(), 256, 8, 4096), -1, {{0, 256}});
  CheckTieFree(Case(RoutingRule::DeepSeekV3(8, 4, 2.5F), 256, 8, 4096), -1, {{0, 256}});
  CheckTieFree(Case(RoutingRule::SigmoidRenorm(), 16, 4, 70000), 3, {{4, 8}});
}

TEST(TieFree, FusedLayerGrid) {
  for (const int64_t tokens : {8, 300}) {
    for (const auto& [num_experts, top_k] : std::vector<std::pair<int, int>>{{128, 8},
                                                                             {512, 10},
                                                                             {2048, 32},
                                                                             {512, 22},
                                                                             {384, 6},
                                                                             {16, 2},
                                                                             {64, 4},
                                                                             {1024, 8},
                                                                             {896, 16}}) {
      for (const RoutingRule& rule :
           {RoutingRule::Renormalize(), RoutingRule::DeepSeekV3(1, 1, 2.5F), RoutingRule::TopK(),
            RoutingRule::Default(), RoutingRule::TopKSigmoid()}) {
        CheckTieFree(Case(rule, num_experts, top_k, tokens), -1, {});
        ASSERT_FALSE(HasFatalFailure()) << num_experts << '/' << top_k << ' ' << ToString(rule);
      }
    }
  }
}

TEST(TieFree, FusedLayerGridLargeBatch) {
  struct Shape {
    RoutingRule rule;
    int num_experts, top_k;
    DType logits;
  };
  const std::vector<Shape> shapes = {
      {RoutingRule::Renormalize(), 128, 8, DType::kBf16},
      {RoutingRule::Sigmoid(), 128, 8, DType::kFloat32},
      {RoutingRule::TopKSigmoid(), 128, 8, DType::kFloat32},
      {RoutingRule::Llama4(), 128, 1, DType::kBf16},
      {RoutingRule::DeepSeekV3(8, 4, 2.5F), 256, 8, DType::kFloat32},
      {RoutingRule::DeepSeekV3(1, 1, 2.5F), 512, 22, DType::kFloat32}};
  for (const Shape& s : shapes) {
    for (const int64_t tokens : {8, 768, 3072}) {
      Case c(s.rule, s.num_experts, s.top_k, tokens);
      c.logits_dtype = s.logits;
      CheckTieFree(c, -1, {});
      ASSERT_FALSE(HasFatalFailure()) << s.num_experts << '/' << s.top_k << ' ' << ToString(s.rule);
    }
  }
  for (const auto& [num_experts, top_k] : std::vector<std::pair<int, int>>{{512, 10}, {2048, 32}}) {
    CheckTieFree(Case(RoutingRule::Renormalize(), num_experts, top_k, testing::Scaled(3072)), -1,
                 {});
  }
}

TEST(TieFree, TopOneOfLlama4) {
  for (const int num_experts : {16, 128}) {
    for (const int64_t tokens : {1, 8, 150}) {
      for (const DType dtype : {DType::kFloat32, DType::kBf16}) {
        Case c(RoutingRule::Llama4(), num_experts, 1, tokens);
        c.logits_dtype = dtype;
        CheckTieFree(c, 3, {{0, num_experts}, {num_experts / 2, num_experts / 4}});
        ASSERT_FALSE(HasFatalFailure()) << num_experts << " T=" << tokens;
      }
    }
  }
}

// ---- fused_topk_deepseek -----------------------------------------------------------------------

// Values in the dtype of the scores; ids and values equal to Route's, rounded once.
void CheckFused(const RoutingRule& rule, Case& c) {
  c.Bind();
  const int64_t count = c.num_tokens * c.top_k;
  std::vector<int32_t> ids(static_cast<size_t>(count), -3);
  std::vector<uint32_t> values(static_cast<size_t>(count));
  std::vector<int16_t> replay(static_cast<size_t>(count), -1);
  const auto values_view =
      TensorView::Contiguous(values.data(), c.logits_dtype, {c.num_tokens, c.top_k});
  const auto ids_view = TensorView::Contiguous(ids.data(), DType::kInt32, {c.num_tokens, c.top_k});
  const auto replay_view =
      TensorView::Contiguous(replay.data(), DType::kInt16, {c.num_tokens, c.top_k});
  FusedTopkDeepseek(c.inputs.logits, c.inputs.bias, rule, values_view, ids_view, replay_view);
  Result wanted(c.num_tokens, c.top_k);
  Route(rule, c.top_k, c.inputs, wanted.outputs);
  ASSERT_EQ(ids, wanted.ids);
  for (size_t i = 0; i < ids.size(); ++i) {
    ASSERT_EQ(replay[i], ids[i]);
    if (c.logits_dtype == DType::kFloat32) {
      ASSERT_EQ(values[i], std::bit_cast<uint32_t>(wanted.weights[i]));
    } else {
      const uint16_t got = reinterpret_cast<const uint16_t*>(values.data())[i];
      ASSERT_EQ(got, c.logits_dtype == DType::kBf16 ? formats::EncodeBf16(wanted.weights[i])
                                                    : formats::EncodeFp16(wanted.weights[i]));
    }
  }
  ExpectDefinition(c, wanted);
}

std::vector<RoutingRule> GroupRules() {
  std::vector<RoutingRule> rules;
  for (const int groups : {1, 2, 4, 8}) {
    for (int top_groups = 1; top_groups <= groups; top_groups *= 2) {
      rules.push_back(RoutingRule::DeepSeekV3(groups, top_groups, 1.5F));
    }
  }
  return rules;
}

void FillNormal(Random& random, Case& c) {
  for (float& z : c.logits) {
    z = random.Normal();
  }
  c.bias.resize(static_cast<size_t>(c.num_experts));
  for (float& b : c.bias) {
    b = random.Normal();
  }
}

TEST(FusedTopkDeepseek, Grid) {
  constexpr std::array<DType, 3> kTypes = {DType::kFloat32, DType::kFp16, DType::kBf16};
  Random random(21);
  for (const RoutingRule& rule : GroupRules()) {
    for (const int64_t tokens : {1, 8, 16, 64}) {
      for (const auto& [num_experts, top_k] : std::vector<std::pair<int, int>>{
               {256, 1}, {256, 2}, {256, 4}, {256, 8}, {384, 1}, {384, 2}, {384, 4}, {384, 8}}) {
        Case c(rule, num_experts, top_k, tokens);
        c.logits_dtype = kTypes[static_cast<size_t>(random.Below(3))];
        c.bias_dtype = kTypes[static_cast<size_t>(random.Below(3))];
        FillNormal(random, c);
        CheckFused(rule, c);
        ASSERT_FALSE(HasFatalFailure()) << ToString(rule);
      }
    }
  }
}

TEST(FusedTopkDeepseek, EveryPairOfDtypes) {
  Random random(22);
  for (const DType scores : {DType::kFloat32, DType::kFp16, DType::kBf16}) {
    for (const DType bias : {DType::kFloat32, DType::kFp16, DType::kBf16}) {
      Case c(RoutingRule::DeepSeekV3(8, 4, 2.5F), 256, 8, 16);
      c.logits_dtype = scores;
      c.bias_dtype = bias;
      FillNormal(random, c);
      CheckFused(c.rule, c);
    }
  }
}

// FlashInfer stops at top_k 8, 384 experts, 32 experts per group and four kept groups.
TEST(FusedTopkDeepseek, LimitsAreLifted) {
  Random random(23);
  for (const auto& [num_experts, groups, top_groups, top_k] :
       std::vector<std::tuple<int, int, int, int>>{
           {512, 1, 1, 22}, {2048, 16, 8, 32}, {300, 10, 7, 12}, {512, 2, 1, 32}, {64, 8, 8, 32}}) {
    Case c(RoutingRule::DeepSeekV3(groups, top_groups, 1.0F), num_experts, top_k, 9);
    for (float& z : c.logits) {
      z = random.Normal();
    }
    CheckFused(c.rule, c);
  }
}

}  // namespace
}  // namespace hopyard::route
