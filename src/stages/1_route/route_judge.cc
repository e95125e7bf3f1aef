// SPDX-License-Identifier: Apache-2.0
#include "stages/1_route/route_judge.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "stages/1_route/route.h"

namespace hopyard::route {
namespace {

// FP32 rounds what a score is made of, so an ulp is one of its largest part; below the smallest
// normal number it is 2^-149 whatever the number.
constexpr double kUlps = 4.0;
constexpr double kRelativeUlp = 0x1.0p-23;
constexpr double kSmallestUlp = 0x1.0p-149;

struct Score {
  double value = 0.0;
  double magnitude = 0.0;  // of its largest part
};

bool Tied(const Score& a, const Score& b) {
  if (!std::isfinite(a.value) || !std::isfinite(b.value)) {
    return a.value == b.value;
  }
  const double ulp = std::max(a.magnitude, b.magnitude) * kRelativeUlp;
  return std::abs(a.value - b.value) <= kUlps * (ulp + kSmallestUlp);
}

bool AtLeast(const Score& a, const Score& b) {
  return a.value >= b.value || Tied(a, b);
}

bool Above(const Score& a, const Score& b) {
  return a.value > b.value && !Tied(a, b);
}

std::vector<Score> ScoresOf(const SelectionScores& scores) {
  std::vector<Score> result;
  for (size_t e = 0; e < scores.plain.size(); ++e) {
    const double bias = scores.biased[e] - scores.plain[e];
    result.push_back({scores.biased[e], std::max({std::abs(scores.plain[e]), std::abs(bias),
                                                  std::abs(scores.biased[e])})});
  }
  return result;
}

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

// Sum of the two best scores of each group (the one where there is one).
std::vector<Score> GroupScores(const RoutingRule& rule, const std::vector<Score>& scores) {
  const size_t size = scores.size() / Index(rule.num_groups);
  std::vector<Score> groups;
  for (size_t begin = 0; begin < scores.size(); begin += size) {
    std::vector<Score> members(scores.begin() + static_cast<std::ptrdiff_t>(begin),
                               scores.begin() + static_cast<std::ptrdiff_t>(begin + size));
    std::sort(members.begin(), members.end(),
              [](const Score& a, const Score& b) { return a.value > b.value; });
    Score group = members[0];
    if (size > 1) {
      group = {group.value + members[1].value,
               std::max(group.magnitude, members[1].magnitude) * 2.0};
    }
    groups.push_back(group);
  }
  return groups;
}

// The kept groups that make `ids` as right as they can be: those above the cut, those that hold an
// id, then those of the tied rest whose experts are the weakest. Empty: no choice of groups does.
std::vector<bool> KeptGroups(const RoutingRule& rule, const std::vector<Score>& scores,
                             const std::vector<int32_t>& ids) {
  const auto count = Index(rule.num_groups);
  const size_t size = scores.size() / count;
  const std::vector<Score> groups = GroupScores(rule, scores);
  if (std::any_of(groups.begin(), groups.end(),
                  [](const Score& group) { return std::isnan(group.value); })) {
    return {};  // infinities of both signs: no ties there either
  }
  std::vector<Score> sorted = groups;
  std::sort(sorted.begin(), sorted.end(),
            [](const Score& a, const Score& b) { return a.value > b.value; });
  const Score cut = sorted[Index(rule.top_groups - 1)];
  std::vector<bool> kept(count);
  for (size_t g = 0; g < count; ++g) {
    kept[g] = Above(groups[g], cut);
  }
  for (const int32_t id : ids) {
    const size_t g = Index(id) / size;
    if (!AtLeast(groups[g], cut)) {
      return {};
    }
    kept[g] = true;
  }
  const auto best_of = [&](size_t g) {
    double best = -HUGE_VAL;
    for (size_t e = g * size; e < (g + 1) * size; ++e) {
      best = std::max(best, scores[e].value);
    }
    return best;
  };
  std::vector<size_t> rest;
  for (size_t g = 0; g < count; ++g) {
    if (!kept[g] && AtLeast(groups[g], cut)) {
      rest.push_back(g);
    }
  }
  std::sort(rest.begin(), rest.end(), [&](size_t a, size_t b) { return best_of(a) < best_of(b); });
  auto taken = static_cast<int>(std::count(kept.begin(), kept.end(), true));
  for (const size_t g : rest) {
    if (taken < rule.top_groups) {
      kept[g] = true;
      ++taken;
    }
  }
  return taken == rule.top_groups ? kept : std::vector<bool>{};
}

bool IsTopK(const RoutingRule& rule, const std::vector<Score>& scores,
            const std::vector<int32_t>& ids) {
  const std::vector<bool> groups = KeptGroups(rule, scores, ids);
  if (groups.empty()) {
    return false;
  }
  const size_t size = scores.size() / groups.size();
  std::vector<bool> selected(scores.size());
  for (size_t k = 0; k < ids.size(); ++k) {
    if (selected[Index(ids[k])] ||
        (k > 0 && !AtLeast(scores[Index(ids[k - 1])], scores[Index(ids[k])]))) {
      return false;
    }
    selected[Index(ids[k])] = true;
  }
  for (size_t e = 0; e < scores.size(); ++e) {
    if (!selected[e] && groups[e / size] && !AtLeast(scores[Index(ids.back())], scores[e])) {
      return false;
    }
  }
  return true;
}

std::vector<int32_t> OracleIds(const RoutingRule& rule, const RouteInputs& inputs, int64_t token,
                               int top_k) {
  const int64_t num_experts = inputs.logits.shape[1];
  RouteInputs one;
  one.logits = inputs.logits;
  one.logits.data = inputs.logits.as<uint8_t>() + token * num_experts * SizeOf(inputs.logits.dtype);
  one.logits.shape[0] = 1;
  one.bias = inputs.bias;
  std::vector<int32_t> ids(Index(top_k));
  std::vector<float> weights(Index(top_k));
  RouteOutputs outputs;
  outputs.expert_ids = TensorView::Contiguous(ids.data(), DType::kInt32, {1, top_k});
  outputs.weights = TensorView::Contiguous(weights.data(), DType::kFloat32, {1, top_k});
  RouteRef(rule, top_k, one, outputs);
  return ids;
}

}  // namespace

SelectionMatch JudgeSelection(const RoutingRule& rule, const RouteInputs& inputs, int64_t token,
                              const std::vector<int32_t>& ids) {
  if (OracleIds(rule, inputs, token, static_cast<int>(ids.size())) == ids) {
    return SelectionMatch::kEqual;
  }
  const auto num_experts = static_cast<int32_t>(inputs.logits.shape[1]);
  const auto is_expert = [&](int32_t id) { return id >= 0 && id < num_experts; };
  const std::vector<Score> scores = ScoresOf(SelectionScoresRef(rule, inputs, token));
  const bool has_nan = std::any_of(scores.begin(), scores.end(),
                                   [](const Score& score) { return std::isnan(score.value); });
  const bool right =
      !has_nan && std::all_of(ids.begin(), ids.end(), is_expert) && IsTopK(rule, scores, ids);
  return right ? SelectionMatch::kTied : SelectionMatch::kDifferent;
}

}  // namespace hopyard::route
