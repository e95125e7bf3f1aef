// SPDX-License-Identifier: Apache-2.0
// A million random rows per method: every instruction set against the independent FP32 definition
// (ids, order and weights exact) and against the double oracle.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "stages/1_route/route_expect.h"

namespace hopyard::route {
namespace {

using testing::Bits;
using testing::Case;
using testing::kInf;
using testing::kNan;
using testing::Random;
using testing::Result;

constexpr int kRowsPerCase = 500;

// What a row of logits looks like; a case mixes all kinds.
void FillRow(Random& random, float* row, int count) {
  constexpr std::array<float, 5> kScales = {0.1F, 1.0F, 4.0F, 20.0F, 200.0F};
  const int kind = random.Below(12);
  const float scale = kScales[static_cast<size_t>(random.Below(5))];
  for (int e = 0; e < count; ++e) {
    row[e] = random.Normal() * scale;
  }
  const int at = random.Below(count);
  switch (kind) {
    case 0:  // all negative
      for (int e = 0; e < count; ++e) {
        row[e] = -std::fabs(row[e]) - 1.0F;
      }
      break;
    case 1:  // all equal
      std::fill_n(row, count, row[0]);
      break;
    case 2:  // ties on the bf16 grid
      for (int e = 0; e < count; ++e) {
        row[e] = formats::RoundToBf16(std::round(row[e] * 4.0F) / 4.0F);
      }
      break;
    case 3:  // saturating
      for (int e = 0; e < count; ++e) {
        row[e] = 15.0F + (random.Uniform() * 30.0F);
      }
      break;
    case 4:
      row[at] = random.Below(2) == 0 ? kInf : -kInf;
      row[random.Below(count)] = kInf;
      break;
    case 5:
      row[at] = kNan;
      row[random.Below(count)] = -kInf;
      break;
    case 6:  // mostly -inf, as a mask would leave it
      for (int e = 0; e < count; ++e) {
        row[e] = random.Below(4) == 0 ? row[e] : -kInf;
      }
      break;
    case 7:  // neighbours one ulp apart
      for (int e = 0; e < count; ++e) {
        row[e] = 1.0F + (static_cast<float>(random.Below(6)) * 0x1p-23F);
      }
      break;
    default:
      break;
  }
}

Case MakeCase(const RoutingRule& rule, Random& random) {
  constexpr std::array<std::array<int, 2>, 6> kShapes = {
      {{16, 4}, {16, 4}, {64, 6}, {16, 2}, {64, 6}, {128, 8}}};
  const auto shape = kShapes[static_cast<size_t>(random.Below(6))];
  Case c(rule, shape[0], shape[1], kRowsPerCase);
  if (random.Below(32) == 0) {
    c.num_experts = 256;
    c.top_k = 8;
    c.logits.resize(256 * kRowsPerCase);
  }
  for (int64_t row = 0; row < kRowsPerCase; ++row) {
    FillRow(random, c.logits.data() + row * c.num_experts, c.num_experts);
  }
  if (rule.use_bias && random.Below(8) != 0) {
    const float scale = random.Below(4) == 0 ? 12.0F : 0.3F;
    const bool quantised = random.Below(2) == 0;
    for (int e = 0; e < c.num_experts; ++e) {
      const float b = (random.Uniform() - 0.7F) * scale;
      c.bias.push_back(quantised ? std::round(b * 8.0F) / 8.0F : b);
    }
  }
  constexpr std::array<DType, 4> kTypes = {DType::kFloat32, DType::kFloat32, DType::kBf16,
                                           DType::kFp16};
  c.logits_dtype = kTypes[static_cast<size_t>(random.Below(4))];
  c.bias_dtype = kTypes[static_cast<size_t>(random.Below(4))];
  return c;
}

void CheckCase(const RoutingRule& rule, uint64_t seed) {
  Random random(seed);
  Case c = MakeCase(rule, random);
  c.Bind();
  Result first(c.num_tokens, c.top_k);
  RouteCpuWith(testing::Isas().back(), rule, c.top_k, c.inputs, first.outputs, 1);
  for (const Isa isa : testing::Isas()) {
    Result other(c.num_tokens, c.top_k);
    RouteCpuWith(isa, rule, c.top_k, c.inputs, other.outputs, 1);
    ASSERT_EQ(other.ids, first.ids) << ToString(isa);
    ASSERT_EQ(Bits(other.weights), Bits(first.weights)) << ToString(isa);
  }
  // Writing the replay changes nothing, and feeding it back gives the same bits.
  std::vector<int16_t> replay(first.ids.size(), -9);
  Result recorded(c.num_tokens, c.top_k);
  recorded.outputs.replay =
      TensorView::Contiguous(replay.data(), DType::kInt16, {c.num_tokens, c.top_k});
  RouteCpu(rule, c.top_k, c.inputs, recorded.outputs, 1);
  ASSERT_EQ(recorded.ids, first.ids);
  ASSERT_EQ(Bits(recorded.weights), Bits(first.weights));
  Result replayed(c.num_tokens, c.top_k);
  RouteInputs forced = c.inputs;
  forced.forced_ids = recorded.outputs.replay;
  RouteCpu(rule, c.top_k, forced, replayed.outputs, 1);
  ASSERT_EQ(replayed.ids, first.ids);
  ASSERT_EQ(Bits(replayed.weights), Bits(first.weights));
  Result oracle(c.num_tokens, c.top_k);
  RouteRef(rule, c.top_k, c.inputs, oracle.outputs);
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    testing::ExpectDefinition(c, first, token);
    testing::ExpectNearOracle(c, first, oracle, token);
    if (::testing::Test::HasFatalFailure()) {
      FAIL() << ToString(rule) << " seed " << seed << " experts " << c.num_experts;
    }
  }
}

class RandomRows : public ::testing::TestWithParam<testing::Method> {};

TEST_P(RandomRows, MatchTheDefinitionAndTheOracle) {
  const int64_t cases = testing::Scaled(1'000'000) / kRowsPerCase;
  const RoutingRule& rule = GetParam().rule;
  ParallelFor(0, cases, 1, MaxThreads(), [&](int64_t i, int /*thread*/) {
    if (!HasFatalFailure()) {
      CheckCase(rule, static_cast<uint64_t>(i) + 1);
    }
  });
}

std::vector<testing::Method> AllMethods() {
  std::vector<testing::Method> methods = testing::Methods(1, 1);
  methods.push_back({"DeepSeekV3Grouped", RoutingRule::DeepSeekV3(4, 2, 2.5F)});
  methods.push_back({"DeepSeekV3EightGroups", RoutingRule::DeepSeekV3(8, 4, 1.0F)});
  return methods;
}

INSTANTIATE_TEST_SUITE_P(Methods, RandomRows, ::testing::ValuesIn(AllMethods()),
                         [](const auto& method) { return method.param.name; });

}  // namespace
}  // namespace hopyard::route
