// SPDX-License-Identifier: Apache-2.0
// For the routing tests only: a second FP32 definition, written from docs/routing.md as plain
// scalar code and sharing nothing with score.h, and the plumbing to run one case.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "hopyard/routing.h"

#include "core/cpu_features.h"
#include "formats/codes.h"
#include "stages/1_route/route.h"
#include "stages/1_route/route_row.h"

namespace hopyard::route::testing {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// ---- The definition ----------------------------------------------------------------------------

inline float DefExp(float x) {
  if (std::isnan(x)) {
    return x;
  }
  if (x < -105.0F || x > 90.0F) {
    return x < 0 ? 0.0F : kInf;
  }
  const double n = std::nearbyint(static_cast<double>(x) * static_cast<double>(1.44269502F));
  const auto nf = static_cast<float>(n);
  const float exact = std::fma(nf, -0.693147182F, x);
  const float r = std::fma(nf, 1.90465421e-09F, exact);
  const float rounding = std::fma(nf, 1.90465421e-09F, exact - r);
  constexpr std::array<float, 5> kQ = {0.49999994F, 0.166665226F, 0.0416682251F, 0.00836796872F,
                                       0.00138070504F};
  float q = kQ[4];
  for (size_t i = 4; i-- > 0;) {
    q = std::fma(q, r, kQ[i]);
  }
  const float square = r * r;
  return std::ldexp(1.0F + (r + std::fma(q, square, rounding)), static_cast<int>(n));
}

inline float DefLog1p(float u) {
  const float s = u / (2.0F + u);
  const float w = s * s;
  constexpr std::array<float, 4> kL = {0.666666508F, 0.400104344F, 0.28159219F, 0.273187548F};
  float l = kL[3];
  for (size_t i = 3; i-- > 0;) {
    l = std::fma(l, w, kL[i]);
  }
  const float scaled = w * l;
  return std::fma(-s, u - scaled, u);
}

inline float DefSigmoid(float z) {
  const float e = DefExp(-std::fabs(z));
  return (z >= 0 ? 1.0F : e) / (1.0F + e);
}

inline float DefSqrtSoftplus(float z) {
  if (std::isnan(z)) {
    return z;
  }
  if (z < -20.0F) {
    return DefExp(z / 2);
  }
  return std::sqrt(std::max(z, 0.0F) + DefLog1p(DefExp(-std::fabs(z))));
}

inline float DefSum(const std::vector<float>& terms) {
  std::array<float, 32> lanes{};
  for (size_t i = 0; i < terms.size(); ++i) {
    lanes[i % 32] += terms[i];
  }
  for (size_t width = 16; width > 0; width /= 2) {
    for (size_t l = 0; l < width; ++l) {
      lanes[l] += lanes[l + width];
    }
  }
  return lanes[0];
}

// The softmax's numerators; NaN gives 0.
inline std::vector<float> DefSoftmaxTerms(const std::vector<float>& z) {
  float max = -kInf;
  for (const float v : z) {
    max = v > max ? v : max;
  }
  std::vector<float> terms;
  for (const float v : z) {
    if (std::isnan(v)) {
      terms.push_back(0.0F);
    } else if (v == max) {
      terms.push_back(1.0F);
    } else {
      const float hi = v - max;
      // Fast two-sum: the larger magnitude first.
      const float lo = std::fabs(v) > std::fabs(max) ? (v - hi) - max : v - (hi + max);
      const float e = DefExp(hi);
      terms.push_back(hi < -104.0F ? 0.0F : std::fma(e, lo, e));
    }
  }
  return terms;
}

inline std::vector<float> DefScores(RoutingScore score, const std::vector<float>& z) {
  std::vector<float> s = z;
  if (score == RoutingScore::kSoftmax) {
    s = DefSoftmaxTerms(z);
    const float sum = DefSum(s);
    for (size_t e = 0; e < s.size(); ++e) {
      s[e] = std::isnan(z[e]) ? kNan : s[e] / sum;
    }
  } else if (score != RoutingScore::kLogit) {
    for (float& v : s) {
      v = score == RoutingScore::kSigmoid ? DefSigmoid(v) : DefSqrtSoftplus(v);
    }
  }
  return s;
}

// Larger wins; NaN last; -0 < +0; equal values by smaller id.
inline bool DefBeats(float x, int a, float y, int b) {
  const auto rank = [](float v) -> int64_t {
    const auto bits = std::bit_cast<int32_t>(v);
    if (std::isnan(v)) {
      return std::numeric_limits<int64_t>::min();
    }
    return bits >= 0 ? bits : -1 - static_cast<int64_t>(bits & 0x7FFFFFFF);
  };
  return rank(x) != rank(y) ? rank(x) > rank(y) : a < b;
}

// Experts of the kept groups.
inline std::vector<int> DefCandidates(const RoutingRule& rule, const std::vector<float>& biased) {
  const int size = static_cast<int>(biased.size()) / rule.num_groups;
  std::vector<float> best;
  for (int g = 0; g < rule.num_groups; ++g) {
    std::vector<std::pair<float, int>> members;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      members.emplace_back(biased[static_cast<size_t>(e)], e);
    }
    std::sort(members.begin(), members.end(), [](const auto& a, const auto& b) {
      return DefBeats(a.first, a.second, b.first, b.second);
    });
    best.push_back(size == 1 ? members[0].first : members[0].first + members[1].first);
  }
  std::vector<int> candidates;
  for (int g = 0; g < rule.num_groups; ++g) {
    int better = 0;
    for (int h = 0; h < rule.num_groups; ++h) {
      better += DefBeats(best[static_cast<size_t>(h)], h, best[static_cast<size_t>(g)], g) ? 1 : 0;
    }
    for (int e = g * size; better < rule.top_groups && e < (g + 1) * size; ++e) {
      candidates.push_back(e);
    }
  }
  return candidates;
}

inline std::vector<int> DefSelect(const RoutingRule& rule, int top_k, const std::vector<float>& z,
                                  const std::vector<float>& bias) {
  std::vector<float> biased = DefScores(rule.score, z);
  for (size_t e = 0; rule.use_bias && e < z.size(); ++e) {
    biased[e] += bias.empty() ? 0.0F : bias[e];
  }
  std::vector<int> ids(z.size());
  std::iota(ids.begin(), ids.end(), 0);
  if (rule.num_groups > 1) {
    ids = DefCandidates(rule, biased);
  }
  std::partial_sort(ids.begin(), ids.begin() + top_k, ids.end(), [&](int a, int b) {
    return DefBeats(biased[static_cast<size_t>(a)], a, biased[static_cast<size_t>(b)], b);
  });
  ids.resize(static_cast<size_t>(top_k));
  return ids;
}

inline std::vector<float> DefWeights(const RoutingRule& rule, const std::vector<float>& z,
                                     const std::vector<int>& ids) {
  const bool has_nan = std::any_of(z.begin(), z.end(), [](float v) { return std::isnan(v); });
  std::vector<float> selected;
  for (const int id : ids) {
    selected.push_back(id < 0 ? kNan : z[static_cast<size_t>(id)]);
  }
  std::vector<float> w;
  if (rule.weight == RoutingWeight::kSoftmaxSelected) {
    w = DefScores(RoutingScore::kSoftmax, selected);
  } else if (rule.weight == RoutingWeight::kSigmoidSelected) {
    w = DefScores(RoutingScore::kSigmoid, selected);
  } else {
    const std::vector<float> scores =
        rule.score == RoutingScore::kSoftmax ? DefScores(rule.score, z) : std::vector<float>();
    w = scores.empty() ? DefScores(rule.score, selected) : selected;
    for (size_t j = 0; j < ids.size() && !scores.empty(); ++j) {
      w[j] = ids[j] < 0 ? 0.0F : scores[static_cast<size_t>(ids[j])];
    }
  }
  for (size_t j = 0; j < ids.size(); ++j) {
    w[j] = ids[j] < 0 ? 0.0F : w[j];
  }
  const float sum = DefSum(w);
  for (size_t j = 0; j < ids.size(); ++j) {
    w[j] = w[j] * rule.scaling_factor;
    if (rule.renormalise == Renormalise::kSumPlusEpsilon) {
      w[j] = w[j] / (sum + 1e-20F);
    } else if (rule.renormalise == Renormalise::kSumAtLeast) {
      w[j] = w[j] / (sum < 1e-20F ? 1e-20F : sum);
    }
    w[j] = has_nan || std::isnan(w[j]) ? kNan : w[j];
    w[j] = ids[j] < 0 ? 0.0F : w[j];
  }
  return w;
}

// ---- Cases -------------------------------------------------------------------------------------

// SplitMix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    state_ += 0x9E3779B97F4A7C15U;
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return x ^ (x >> 31);
  }
  int Below(int n) { return static_cast<int>(Next() % static_cast<uint64_t>(n)); }
  float Uniform() { return static_cast<float>(Next() >> 40) * 0x1p-24F; }  // [0, 1)
  float Normal() {                                                         // near enough
    float sum = -6.0F;
    for (int i = 0; i < 12; ++i) {
      sum += Uniform();
    }
    return sum;
  }

 private:
  uint64_t state_;
};

// Logits of many kinds: normal, tied, saturating, equal, with special values among them.
inline constexpr int kLogitKinds = 5;
inline void Fill(Random* random, int kind, std::vector<float>* values) {
  constexpr float kSpecial[] = {kNan, kInf, -kInf, 0.0F, -0.0F, 1e-40F};
  for (float& value : *values) {
    switch (kind) {
      case 0:
        value = random->Normal();
        break;
      case 1:
        value = static_cast<float>(random->Below(5)) - 2.0F;
        break;
      case 2:
        value = 80.0F * random->Normal();
        break;
      case 3:
        value = -1.0F;
        break;
      default:
        value = random->Below(8) == 0 ? kSpecial[random->Below(6)] : random->Normal();
    }
  }
}

struct Method {
  std::string name;
  RoutingRule rule;
};

// Every named method; DeepSeekV3 with the given groups.
inline std::vector<Method> Methods(int num_groups = 1, int top_groups = 1) {
  return {{"Default", RoutingRule::Default()},
          {"Renormalize", RoutingRule::Renormalize()},
          {"RenormalizeNaive", RoutingRule::RenormalizeNaive()},
          {"DeepSeekV3", RoutingRule::DeepSeekV3(num_groups, top_groups, 2.5F)},
          {"Llama4", RoutingRule::Llama4()},
          {"TopK", RoutingRule::TopK()},
          {"SigmoidRenorm", RoutingRule::SigmoidRenorm()},
          {"SigmoidNoRenorm", RoutingRule::SigmoidRenorm(false)},
          {"MiniMax2", RoutingRule::MiniMax2(1.5F)},
          {"Sigmoid", RoutingRule::Sigmoid()},
          {"TopKSigmoid", RoutingRule::TopKSigmoid()},
          {"SqrtSoftplus", RoutingRule::SqrtSoftplus(1.5F)}};
}

inline std::vector<Isa> Isas() {
  std::vector<Isa> isas = {Isa::kScalar};
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= BestIsa()) {
      isas.push_back(isa);
    }
  }
  return isas;
}

// One call's data, floats stored in the dtype asked for (values are rounded to it).
class Case {
 public:
  Case(const RoutingRule& the_rule, int experts, int chosen, int64_t tokens)
      : rule(the_rule), num_experts(experts), top_k(chosen), num_tokens(tokens) {
    logits.resize(static_cast<size_t>(tokens * experts));
  }

  static float Round(DType dtype, float value) {
    if (dtype == DType::kBf16) {
      return formats::RoundToBf16(value);
    }
    return dtype == DType::kFp16 ? formats::DecodeFp16(formats::EncodeFp16(value)) : value;
  }
  // Rounds the floats to their dtypes and builds the views; call it after every change.
  const RouteInputs& Bind() {
    view_logits_ = Store(logits, logits_dtype);
    view_bias_ = Store(bias, bias_dtype);
    inputs.logits =
        TensorView::Contiguous(view_logits_.data(), logits_dtype, {num_tokens, num_experts});
    inputs.bias = bias.empty()
                      ? TensorView{}
                      : TensorView::Contiguous(view_bias_.data(), bias_dtype, {num_experts});
    return inputs;
  }
  [[nodiscard]] std::vector<float> Row(int64_t token) const {
    const auto begin = logits.begin() + token * num_experts;
    return {begin, begin + num_experts};
  }

  RoutingRule rule;
  int num_experts;
  int top_k;
  int64_t num_tokens;
  std::vector<float> logits;
  std::vector<float> bias;
  DType logits_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  RouteInputs inputs;

 private:
  static std::vector<uint8_t> Store(std::vector<float>& values, DType dtype) {
    const auto size = static_cast<size_t>(SizeOf(dtype));
    std::vector<uint8_t> bytes((values.size() + 1) * size);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = Round(dtype, values[i]);
      const uint16_t half =
          dtype == DType::kBf16 ? formats::EncodeBf16(values[i]) : formats::EncodeFp16(values[i]);
      if (dtype == DType::kFloat32) {
        std::memcpy(bytes.data() + i * size, &values[i], size);
      } else {
        std::memcpy(bytes.data() + i * size, &half, size);
      }
    }
    return bytes;
  }
  std::vector<uint8_t> view_logits_;
  std::vector<uint8_t> view_bias_;
};

struct Result {
  std::vector<int32_t> ids;
  std::vector<float> weights;
  RouteOutputs outputs;

  Result(int64_t num_tokens, int top_k)
      : ids(static_cast<size_t>(num_tokens * top_k), -77),
        weights(static_cast<size_t>(num_tokens * top_k), -77.0F) {
    outputs.expert_ids = TensorView::Contiguous(ids.data(), DType::kInt32, {num_tokens, top_k});
    outputs.weights = TensorView::Contiguous(weights.data(), DType::kFloat32, {num_tokens, top_k});
  }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
};

// Bits, so that NaN equals NaN and -0 differs from +0.
inline std::vector<uint32_t> Bits(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (const float v : values) {
    bits.push_back(std::bit_cast<uint32_t>(v));
  }
  return bits;
}

// HOPYARD_TEST_SCALE=small divides the number of random rows by 50.
inline int64_t Scaled(int64_t rows) {
  const char* scale = std::getenv("HOPYARD_TEST_SCALE");
  return scale != nullptr && std::string_view(scale) == "small" ? rows / 50 : rows;
}

}  // namespace hopyard::route::testing
