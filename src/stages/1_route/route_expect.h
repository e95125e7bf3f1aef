// SPDX-License-Identifier: Apache-2.0
// For the routing tests only: what a routed token is judged by. route_expect_test.cc plants faults
// that each judge must find.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "stages/1_route/route_testing.h"

namespace hopyard::route::testing {

// ---- The FP32 definition: ids, order and bits of the weights -----------------------------------

inline void ExpectDefinition(const Case& c, const Result& got, int64_t token) {
  const std::vector<float> z = c.Row(token);
  const std::vector<int> ids = DefSelect(c.rule, c.top_k, z, c.bias);
  const std::vector<float> weights = DefWeights(c.rule, z, ids);
  for (int j = 0; j < c.top_k; ++j) {
    const auto at = static_cast<size_t>(token * c.top_k + j);
    const auto k = static_cast<size_t>(j);
    ASSERT_EQ(got.ids[at], ids[k]) << "token " << token << " choice " << j;
    ASSERT_EQ(std::bit_cast<uint32_t>(got.weights[at]), std::bit_cast<uint32_t>(weights[k]))
        << "token " << token << " choice " << j << ": " << got.weights[at] << " wanted "
        << weights[k];
  }
}

inline void ExpectDefinition(const Case& c, const Result& got) {
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    ASSERT_NO_FATAL_FAILURE(ExpectDefinition(c, got, token));
  }
}

// ---- The double oracle: FP32 may decide otherwise only between scores within 4 ulp -------------

inline double UlpAt(double magnitude) {
  return magnitude == 0 || !std::isfinite(magnitude)
             ? 0x1p-149
             : std::ldexp(1.0, std::max(std::ilogb(magnitude) - 23, -149));
}

// One token's scores in double and the ulp of FP32 in which they may be off.
struct DoubleScore {
  double biased = 0;
  double ulp = 0;
};

inline std::vector<DoubleScore> DoubleScores(const Case& c, const std::vector<float>& z) {
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

// By more than FP32 could get wrong. NaN loses to every number.
inline bool ClearlyBeats(const DoubleScore& a, const DoubleScore& b) {
  if (std::isnan(a.biased) || std::isnan(b.biased)) {
    return !std::isnan(a.biased);
  }
  return a.biased > b.biased && !(a.biased - b.biased <= 4 * std::max(a.ulp, b.ulp));
}

// What FP32 may do with a group.
enum class Fate : uint8_t { kKept, kEither, kDropped };

// Groups are ranked by the sums of their two best scores; sums within 8 ulp of the cut may fall on
// either side of it.
inline std::vector<Fate> FatesOfGroups(const Case& c, const std::vector<DoubleScore>& scores) {
  const auto groups = static_cast<size_t>(c.rule.num_groups);
  const auto top = static_cast<size_t>(c.rule.top_groups);
  if (top == groups) {
    return std::vector<Fate>(groups, Fate::kKept);
  }
  const size_t size = scores.size() / groups;
  std::vector<double> sums;
  double ulp = 0;
  for (size_t g = 0; g < groups; ++g) {
    std::vector<double> members;
    for (size_t e = g * size; e < (g + 1) * size; ++e) {
      members.push_back(std::isnan(scores[e].biased) ? -kInf : scores[e].biased);
      ulp = std::max(ulp, scores[e].ulp);
    }
    std::sort(members.rbegin(), members.rend());
    sums.push_back(size == 1 ? members[0] : members[0] + members[1]);
  }
  std::vector<double> sorted = sums;
  std::sort(sorted.rbegin(), sorted.rend());
  std::vector<Fate> fates;
  for (const double sum : sums) {
    const bool may_stay = sum == sorted[top - 1] || sorted[top - 1] - sum <= 8 * ulp;
    const bool may_go = sum == sorted[top] || sum - sorted[top] <= 8 * ulp;
    fates.push_back(!may_go ? Fate::kKept : (may_stay ? Fate::kEither : Fate::kDropped));
  }
  return fates;
}

// Marks the groups that `ids` come from as kept. False: more groups than are kept, or a dropped
// one.
inline bool KeepGroupsOf(const Case& c, const std::vector<int>& ids, std::vector<Fate>* fates) {
  const int size = c.num_experts / c.rule.num_groups;
  for (const int id : ids) {
    Fate& fate = (*fates)[static_cast<size_t>(id / size)];
    if (fate == Fate::kDropped) {
      return false;
    }
    fate = Fate::kKept;
  }
  return std::count(fates->begin(), fates->end(), Fate::kKept) <= c.rule.top_groups;
}

// Whether an expert of group `g` that was not selected clearly beats the last one selected.
inline bool GroupHidesABetter(const Case& c, const std::vector<DoubleScore>& scores,
                              const std::vector<int>& ids, size_t g) {
  const int size = c.num_experts / c.rule.num_groups;
  const int begin = static_cast<int>(g) * size;
  for (int e = begin; e < begin + size; ++e) {
    if (std::find(ids.begin(), ids.end(), e) == ids.end() &&
        ClearlyBeats(scores[static_cast<size_t>(e)], scores[static_cast<size_t>(ids.back())])) {
      return true;
    }
  }
  return false;
}

// Whether FP32 may select these distinct experts in this order.
inline bool MayBeSelected(const Case& c, const std::vector<DoubleScore>& scores,
                          const std::vector<int>& ids) {
  for (size_t j = 0; j < ids.size(); ++j) {
    for (size_t i = 0; i < j; ++i) {
      if (ids[i] == ids[j] ||
          ClearlyBeats(scores[static_cast<size_t>(ids[j])], scores[static_cast<size_t>(ids[i])])) {
        return false;
      }
    }
  }
  std::vector<Fate> fates = FatesOfGroups(c, scores);
  if (!KeepGroupsOf(c, ids, &fates)) {
    return false;
  }
  // Groups on the cut fill up the kept ones: those that hide a better expert cannot be among them.
  int64_t kept = 0;
  int64_t harmless = 0;
  for (size_t g = 0; g < fates.size(); ++g) {
    const bool hides = fates[g] != Fate::kDropped && GroupHidesABetter(c, scores, ids, g);
    if (fates[g] == Fate::kKept && hides) {
      return false;
    }
    kept += fates[g] == Fate::kKept ? 1 : 0;
    harmless += fates[g] == Fate::kEither && !hides ? 1 : 0;
  }
  return kept + harmless >= c.rule.top_groups;
}

inline std::vector<int> IdsOf(const Case& c, const Result& result, int64_t token) {
  const auto begin = result.ids.begin() + token * c.top_k;
  return {begin, begin + c.top_k};
}

inline void ExpectNearWeights(const Case& c, const Result& got, const Result& oracle,
                              int64_t token) {
  for (int j = 0; j < c.top_k; ++j) {
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

// Ids equal to the oracle's, with its weights, or ids between which FP32 may decide otherwise.
inline void ExpectNearOracle(const Case& c, const Result& got, const Result& oracle,
                             int64_t token) {
  const std::vector<int> ids = IdsOf(c, got, token);
  if (ids == IdsOf(c, oracle, token)) {
    ExpectNearWeights(c, got, oracle, token);
    return;
  }
  for (const int id : ids) {
    ASSERT_TRUE(id >= 0 && id < c.num_experts) << "token " << token << ": id " << id;
  }
  ASSERT_TRUE(MayBeSelected(c, DoubleScores(c, c.Row(token)), ids))
      << "token " << token << ": ids " << ::testing::PrintToString(ids) << ", the oracle's "
      << ::testing::PrintToString(IdsOf(c, oracle, token));
}

}  // namespace hopyard::route::testing
