// SPDX-License-Identifier: Apache-2.0
// A million random rows per method: every instruction set against the independent FP32 definition
// (ids, order and weights exact) and against the double oracle.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "stages/1_route/route_testing.h"

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

double UlpAt(double magnitude) {
  return magnitude == 0 || !std::isfinite(magnitude)
             ? 0x1p-149
             : std::ldexp(1.0, std::max(std::ilogb(magnitude) - 23, -149));
}

// One token's scores in double and the ulp of FP32 in which they may be off.
struct DoubleScore {
  double biased = 0;
  double ulp = 0;
};

std::vector<DoubleScore> DoubleScores(const Case& c, const std::vector<float>& z) {
  double max = -kInf;
  for (const float v : z) {
    max = std::fmax(max, v);
  }
  double sum = 0;
  for (const float v : z) {
    sum += std::isnan(v) ? 0.0 : (v == max ? 1.0 : std::exp(v - max));
  }
  std::vector<DoubleScore> scores;
  for (size_t e = 0; e < z.size(); ++e) {
    const double v = z[e];
    double s = v;
    if (c.rule.score == RoutingScore::kSoftmax) {
      s = (v == max ? 1.0 : std::exp(v - max)) / sum;
    } else if (c.rule.score == RoutingScore::kSigmoid) {
      s = 1.0 / (1.0 + std::exp(-v));
    } else if (c.rule.score == RoutingScore::kSqrtSoftplus) {
      s = std::sqrt(v > 30 ? v + std::exp(-v) : std::log1p(std::exp(v)));
    }
    const double bias = c.rule.use_bias && !c.bias.empty() ? c.bias[e] : 0.0;
    const double largest = std::max({std::fabs(s), std::fabs(bias), std::fabs(s + bias)});
    scores.push_back({s + bias, UlpAt(largest)});
  }
  return scores;
}

// Ids may differ from the oracle's only where the scores lie within 4 ulp of each other.
bool WithinFourUlp(const DoubleScore& a, const DoubleScore& b) {
  if (std::isnan(a.biased) || std::isnan(b.biased) || a.biased == b.biased) {
    return std::isnan(a.biased) == std::isnan(b.biased);
  }
  return std::fabs(a.biased - b.biased) <= 4 * std::max(a.ulp, b.ulp);
}

// The same for the sums that rank the groups, of two scores each.
bool GroupsNearlyTie(const Case& c, const std::vector<DoubleScore>& scores) {
  const int size = c.num_experts / c.rule.num_groups;
  std::vector<double> sums;
  double ulp = 0;
  for (int g = 0; g < c.rule.num_groups; ++g) {
    std::vector<double> members;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const DoubleScore& s = scores[static_cast<size_t>(e)];
      members.push_back(std::isnan(s.biased) ? -kInf : s.biased);
      ulp = std::max(ulp, s.ulp);
    }
    std::sort(members.rbegin(), members.rend());
    sums.push_back(members[0] + members[1]);
  }
  std::sort(sums.rbegin(), sums.rend());
  const double last_kept = sums[static_cast<size_t>(c.rule.top_groups) - 1];
  const double first_dropped = sums[static_cast<size_t>(c.rule.top_groups)];
  return last_kept == first_dropped || last_kept - first_dropped <= 8 * ulp;
}

void ExpectNearOracle(const Case& c, const Result& got, const Result& oracle, int64_t token) {
  const std::vector<DoubleScore> scores = DoubleScores(c, c.Row(token));
  const bool loose = c.rule.num_groups > 1 && GroupsNearlyTie(c, scores);
  bool same = true;
  for (int j = 0; j < c.top_k; ++j) {
    const auto at = static_cast<size_t>(token * c.top_k + j);
    const auto a = static_cast<size_t>(got.ids[at]);
    const auto b = static_cast<size_t>(oracle.ids[at]);
    same = same && a == b;
    ASSERT_TRUE(a == b || loose || WithinFourUlp(scores[a], scores[b]))
        << "token " << token << " choice " << j << ": id " << a << " (" << scores[a].biased
        << "), oracle " << b << " (" << scores[b].biased << ")";
  }
  for (int j = 0; same && j < c.top_k; ++j) {
    const auto at = static_cast<size_t>(token * c.top_k + j);
    const double wanted = oracle.weights[at];
    if (std::isnan(wanted) || std::isinf(wanted)) {
      ASSERT_EQ(std::isnan(got.weights[at]), std::isnan(wanted));
      ASSERT_TRUE(std::isnan(wanted) || got.weights[at] == oracle.weights[at]);
    } else {
      ASSERT_NEAR(got.weights[at], wanted, (2e-6 * std::fabs(wanted)) + 1e-20)
          << "token " << token << " choice " << j;
    }
  }
}

void ExpectDefinition(const Case& c, const Result& got, int64_t token) {
  const std::vector<float> z = c.Row(token);
  const std::vector<int> ids = testing::DefSelect(c.rule, c.top_k, z, c.bias);
  const std::vector<float> weights = testing::DefWeights(c.rule, z, ids);
  for (int j = 0; j < c.top_k; ++j) {
    const auto at = static_cast<size_t>(token * c.top_k + j);
    const auto k = static_cast<size_t>(j);
    ASSERT_EQ(got.ids[at], ids[k]) << "token " << token << " choice " << j;
    ASSERT_EQ(std::bit_cast<uint32_t>(got.weights[at]), std::bit_cast<uint32_t>(weights[k]))
        << "token " << token << " choice " << j << ": " << got.weights[at] << " wanted "
        << weights[k];
  }
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
    ExpectDefinition(c, first, token);
    ExpectNearOracle(c, first, oracle, token);
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
