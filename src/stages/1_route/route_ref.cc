// SPDX-License-Identifier: Apache-2.0
// The oracle: the formulas of docs/routing.md in double, one token after the other, full sorts. It
// shares nothing with the backends but the decoding of 16-bit floats.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "formats/codes.h"
#include "stages/1_route/route.h"
#include "stages/1_route/route_judge.h"

namespace hopyard::route {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double ReadFloat(const TensorView& tensor, int64_t index) {
  if (tensor.dtype == DType::kBf16) {
    return formats::DecodeBf16(tensor.as<const uint16_t>()[index]);
  }
  if (tensor.dtype == DType::kFp16) {
    return formats::DecodeFp16(tensor.as<const uint16_t>()[index]);
  }
  return tensor.as<const float>()[index];
}

int64_t ReadInt(const TensorView& tensor, int64_t index) {
  if (tensor.dtype == DType::kInt16) {
    return tensor.as<const int16_t>()[index];
  }
  if (tensor.dtype == DType::kInt64) {
    return tensor.as<const int64_t>()[index];
  }
  return tensor.as<const int32_t>()[index];
}

double SigmoidOf(double z) {
  return z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z));
}

std::vector<double> SoftmaxOf(const std::vector<double>& z) {
  double max = -kInfinity;
  for (const double value : z) {
    max = std::fmax(max, value);
  }
  std::vector<double> p;
  double sum = 0;
  for (const double value : z) {
    p.push_back(value == max ? 1 : std::exp(value - max));
    sum += std::isnan(value) ? 0 : p.back();
  }
  for (double& value : p) {
    value /= sum;
  }
  return p;
}

std::vector<double> ScoresOf(RoutingScore score, const std::vector<double>& z) {
  if (score == RoutingScore::kSoftmax) {
    return SoftmaxOf(z);
  }
  std::vector<double> s = z;
  for (double& value : s) {
    if (score == RoutingScore::kSigmoid) {
      value = SigmoidOf(value);
    } else if (score == RoutingScore::kSqrtSoftplus) {
      value = std::sqrt(std::fmax(value, 0) + std::log1p(std::exp(-std::fabs(value))) +
                        (std::isnan(value) ? kNan : 0));
    }
  }
  return s;
}

// Strict order of ranking: NaN below everything, -0 below +0, equal values by smaller index.
bool Beats(const std::vector<double>& value, int a, int b) {
  const double x = value[static_cast<size_t>(a)];
  const double y = value[static_cast<size_t>(b)];
  if (std::isnan(x) != std::isnan(y)) {
    return std::isnan(y);
  }
  if (x != y && !std::isnan(x)) {
    return x > y;
  }
  if (!std::isnan(x) && std::signbit(x) != std::signbit(y)) {
    return std::signbit(y);
  }
  return a < b;
}

void SortBest(const std::vector<double>& value, std::vector<int>& indices) {
  std::sort(indices.begin(), indices.end(), [&](int a, int b) { return Beats(value, a, b); });
}

std::vector<int> Candidates(const RoutingRule& rule, const std::vector<double>& biased) {
  const int num_experts = static_cast<int>(biased.size());
  const int group_size = num_experts / rule.num_groups;
  if (rule.num_groups == 1) {
    std::vector<int> all(biased.size());
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  std::vector<double> group_scores;
  for (int g = 0; g < rule.num_groups; ++g) {
    std::vector<int> members(static_cast<size_t>(group_size));
    std::iota(members.begin(), members.end(), g * group_size);
    SortBest(biased, members);
    double score = biased[static_cast<size_t>(members[0])];
    if (group_size > 1) {
      score += biased[static_cast<size_t>(members[1])];
    }
    group_scores.push_back(score);
  }
  std::vector<int> groups(static_cast<size_t>(rule.num_groups));
  std::iota(groups.begin(), groups.end(), 0);
  SortBest(group_scores, groups);
  std::vector<int> candidates;
  for (int i = 0; i < rule.top_groups; ++i) {
    for (int m = 0; m < group_size; ++m) {
      candidates.push_back(groups[static_cast<size_t>(i)] * group_size + m);
    }
  }
  return candidates;
}

std::vector<double> BiasedScores(const RoutingRule& rule, const RouteInputs& inputs,
                                 const std::vector<double>& z) {
  std::vector<double> biased = ScoresOf(rule.score, z);
  for (size_t e = 0; e < z.size(); ++e) {
    if (rule.use_bias) {
      biased[e] += inputs.bias.defined() ? ReadFloat(inputs.bias, static_cast<int64_t>(e)) : 0.0;
    }
    biased[e] = std::isnan(z[e]) ? kNan : biased[e];
  }
  return biased;
}

std::vector<int> SelectIds(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
                           const std::vector<double>& z) {
  const std::vector<double> biased = BiasedScores(rule, inputs, z);
  std::vector<int> ids = Candidates(rule, biased);
  SortBest(biased, ids);
  ids.resize(static_cast<size_t>(top_k));
  return ids;
}

std::vector<int> GivenIds(int top_k, int num_experts, const RouteInputs& inputs, int64_t token) {
  std::vector<int> ids;
  ids.reserve(static_cast<size_t>(top_k));
  for (int j = 0; j < top_k; ++j) {
    int64_t id = -1;
    if (inputs.forced_ids.defined()) {
      id = ReadInt(inputs.forced_ids, token * top_k + j);
    } else {
      const int64_t row = ReadInt(inputs.token_ids, token);
      if (row >= 0 && row < inputs.token_to_experts.shape[0]) {
        id = ReadInt(inputs.token_to_experts, row * top_k + j);
      }
    }
    ids.push_back(id >= 0 && id < num_experts ? static_cast<int>(id) : -1);
  }
  return ids;
}

std::vector<double> WeightsOf(const RoutingRule& rule, const std::vector<double>& z,
                              const std::vector<int>& ids) {
  std::vector<double> selected;
  selected.reserve(ids.size());
  for (const int id : ids) {
    selected.push_back(id < 0 ? kNan : z[static_cast<size_t>(id)]);
  }
  std::vector<double> w;
  if (rule.weight == RoutingWeight::kSoftmaxSelected) {
    w = SoftmaxOf(selected);
  } else if (rule.weight == RoutingWeight::kSigmoidSelected) {
    w = ScoresOf(RoutingScore::kSigmoid, selected);
  } else {
    const std::vector<double> scores = ScoresOf(rule.score, z);
    for (const int id : ids) {
      w.push_back(id < 0 ? kNan : scores[static_cast<size_t>(id)]);
    }
  }
  double sum = 0;
  for (size_t j = 0; j < ids.size(); ++j) {
    w[j] = ids[j] < 0 ? 0 : w[j];
    sum += w[j];
  }
  const bool has_nan = std::any_of(z.begin(), z.end(), [](double v) { return std::isnan(v); });
  for (size_t j = 0; j < ids.size(); ++j) {
    w[j] *= rule.scaling_factor;
    if (rule.renormalise == Renormalise::kSumPlusEpsilon) {
      w[j] /= sum + 1e-20;
    } else if (rule.renormalise == Renormalise::kSumAtLeast) {
      w[j] /= sum < 1e-20 ? 1e-20 : sum;
    }
    w[j] = has_nan ? kNan : w[j];
    w[j] = ids[j] < 0 ? 0 : w[j];
  }
  return w;
}

void Write(const RouteOutputs& outputs, int64_t index, int id, double weight) {
  outputs.expert_ids.as<int32_t>()[index] = id;
  const auto rounded = static_cast<float>(weight);
  if (outputs.weights.dtype == DType::kFloat32) {
    outputs.weights.as<float>()[index] = rounded;
  } else if (outputs.weights.dtype == DType::kBf16) {
    outputs.weights.as<uint16_t>()[index] = formats::EncodeBf16(rounded);
  } else {
    outputs.weights.as<uint16_t>()[index] = formats::EncodeFp16(rounded);
  }
  if (outputs.replay.defined()) {
    outputs.replay.as<int16_t>()[index] = static_cast<int16_t>(id);
  }
  if (outputs.expert_load.defined() && id >= 0) {
    if (outputs.expert_load.dtype == DType::kInt64) {
      outputs.expert_load.as<int64_t>()[id] += 1;
    } else {
      outputs.expert_load.as<int32_t>()[id] += 1;
    }
  }
}

std::vector<double> ReadLogits(const RouteInputs& inputs, int64_t token) {
  const int64_t num_experts = inputs.logits.shape[1];
  std::vector<double> z;
  for (int64_t e = 0; e < num_experts; ++e) {
    z.push_back(ReadFloat(inputs.logits, token * num_experts + e));
  }
  return z;
}

}  // namespace

SelectionScores SelectionScoresRef(const RoutingRule& rule, const RouteInputs& inputs,
                                   int64_t token) {
  const std::vector<double> z = ReadLogits(inputs, token);
  RoutingRule unbiased = rule;
  unbiased.use_bias = false;
  return {BiasedScores(unbiased, inputs, z), BiasedScores(rule, inputs, z)};
}

void RouteRef(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
              const RouteOutputs& outputs) {
  const int64_t num_experts = inputs.logits.shape[1];
  int64_t num_tokens = inputs.logits.shape[0];
  if (inputs.num_tokens.defined()) {
    num_tokens = std::clamp<int64_t>(ReadInt(inputs.num_tokens, 0), 0, num_tokens);
  }
  const bool given = inputs.forced_ids.defined() || inputs.token_ids.defined();
  for (int64_t token = 0; token < num_tokens; ++token) {
    const std::vector<double> z = ReadLogits(inputs, token);
    const std::vector<int> ids = given
                                     ? GivenIds(top_k, static_cast<int>(num_experts), inputs, token)
                                     : SelectIds(rule, top_k, inputs, z);
    const std::vector<double> weights = WeightsOf(rule, z, ids);
    for (int j = 0; j < top_k; ++j) {
      const auto at = static_cast<size_t>(j);
      Write(outputs, token * top_k + j, ids[at], weights[at]);
    }
  }
}

}  // namespace hopyard::route
