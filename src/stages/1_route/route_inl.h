// SPDX-License-Identifier: Apache-2.0
// Routing of one token, included once by each instruction-set translation unit with that unit's
// `Ops` (score.h). Everything is in an anonymous namespace: code compiled for one instruction set
// must never be linked into another. No allocation; about 20 KiB of stack.
#pragma once

#include <cstdint>

#include "formats/codes.h"
#include "stages/1_route/route_row.h"
#include "stages/1_route/score.h"

namespace hopyard::route {
namespace {

inline constexpr int32_t kSmallestKey = INT32_MIN;  // NaN, padding and experts of dropped groups
inline constexpr int32_t kNanBits = 0x7FC00000;     // every NaN weight has these bits
inline constexpr int32_t kMinusInfinityBits = static_cast<int32_t>(0xFF800000U);

static_assert(kMaxExperts % kSumLanes == 0 && kMaxTopK == kSumLanes);

// One token's logits and keys, padded to whole blocks of kSumLanes.
struct Row {
  alignas(64) float logits[kMaxExperts];  // padding: NaN, which adds nothing to a sum
  alignas(64) int32_t keys[kMaxExperts];  // OrderKey of the biased score
  bool kept[kMaxExperts];                 // groups that may be selected; only with groups
  bool has_nan;
  int padded;
  float max;  // of the softmax over all experts
  float sum;
};

template <class Ops>
typename Ops::F LoadLogits(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kBf16) {
    return Ops::LoadBf16(static_cast<const uint16_t*>(data) + index);
  }
  if (dtype == DType::kFp16) {
    return Ops::LoadFp16(static_cast<const uint16_t*>(data) + index);
  }
  return Ops::Load(static_cast<const float*>(data) + index);
}

// ScalarOps with the loads of 16-bit floats, which only this file needs.
struct ScalarRowOps : ScalarOps {
  static float LoadBf16(const uint16_t* p) {
    return FromBits(static_cast<int32_t>(static_cast<uint32_t>(*p) << 16));
  }
  static float LoadFp16(const uint16_t* p) { return formats::DecodeFp16(*p); }
};

template <class Ops>
void LoadRow(const RowProblem& problem, int64_t token, Row& row) {
  const int num_experts = problem.num_experts;
  const int64_t base = token * num_experts;
  row.padded = (num_experts + kSumLanes - 1) / kSumLanes * kSumLanes;
  int e = 0;
  for (; e + Ops::kLanes <= num_experts; e += Ops::kLanes) {
    Ops::Store(row.logits + e, LoadLogits<Ops>(problem.logits, problem.logits_dtype, base + e));
  }
  for (; e < num_experts; ++e) {
    row.logits[e] = LoadLogits<ScalarRowOps>(problem.logits, problem.logits_dtype, base + e);
  }
  for (; e < row.padded; ++e) {
    row.logits[e] = ScalarOps::FromBits(kNanBits);
  }
  int num_nan = 0;
  for (e = 0; e < row.padded; e += Ops::kLanes) {
    num_nan += __builtin_popcount(Ops::MaskBits(Ops::IsNan(Ops::Load(row.logits + e))));
  }
  row.has_nan = num_nan > row.padded - num_experts;
}

// Largest value, NaN ignored; -inf where there is none. `count` is a multiple of the lanes.
template <class Ops>
float MaxOf(const float* values, int count) {
  typename Ops::F max = Ops::Set(ScalarOps::FromBits(kMinusInfinityBits));
  for (int i = 0; i < count; i += Ops::kLanes) {
    const typename Ops::F value = Ops::Load(values + i);
    max = Ops::Select(Ops::Less(max, value), value, max);
  }
  alignas(64) float lanes[Ops::kLanes];
  Ops::Store(lanes, max);
  float result = lanes[0];
  for (int i = 1; i < Ops::kLanes; ++i) {
    result = result < lanes[i] ? lanes[i] : result;
  }
  return result;
}

// max and sum of the softmax over all experts; leaves the bits of the terms in row.keys.
template <class Ops>
void SoftmaxSum(Row& row) {
  constexpr int kParts = kSumLanes / Ops::kLanes;
  row.max = MaxOf<Ops>(row.logits, row.padded);
  const typename Ops::F max = Ops::Set(row.max);
  typename Ops::F parts[kParts];
  for (int i = 0; i < kParts; ++i) {
    parts[i] = Ops::Set(0.0F);
  }
  for (int e = 0; e < row.padded; e += kSumLanes) {
    for (int i = 0; i < kParts; ++i) {
      const int at = e + i * Ops::kLanes;
      const typename Ops::F term = SoftmaxTerm<Ops>(Ops::Load(row.logits + at), max);
      Ops::StoreInt(row.keys + at, Ops::Bits(term));
      parts[i] = Ops::Add(parts[i], term);
    }
  }
  alignas(64) float lanes[kSumLanes];
  for (int i = 0; i < kParts; ++i) {
    Ops::Store(lanes + i * Ops::kLanes, parts[i]);
  }
  row.sum = ReduceLanes(lanes);
}

// The score of logit z; `term` is SoftmaxTerm(z) where the score is the softmax.
template <class Ops, RoutingScore kScore>
typename Ops::F ScoreOf(typename Ops::F z, typename Ops::F term, typename Ops::F sum) {
  if constexpr (kScore == RoutingScore::kSoftmax) {
    return Ops::Div(term, sum);
  } else if constexpr (kScore == RoutingScore::kSigmoid) {
    return Sigmoid<Ops>(z);
  } else if constexpr (kScore == RoutingScore::kSqrtSoftplus) {
    return SqrtSoftplus<Ops>(z);
  } else {
    return z;
  }
}

template <class Ops, RoutingScore kScore>
void ComputeKeys(const float* bias, Row& row) {
  const typename Ops::F sum = Ops::Set(row.sum);
  for (int e = 0; e < row.padded; e += Ops::kLanes) {
    const typename Ops::F z = Ops::Load(row.logits + e);
    typename Ops::F term = z;
    if constexpr (kScore == RoutingScore::kSoftmax) {
      term = Ops::FromBits(Ops::LoadInt(row.keys + e));
    }
    typename Ops::F score = ScoreOf<Ops, kScore>(z, term, sum);
    if (bias != nullptr) {
      score = Ops::Add(score, Ops::Load(bias + e));
    }
    const typename Ops::I key = OrderKey<Ops>(score);
    Ops::StoreInt(row.keys + e, Ops::SelectInt(Ops::IsNan(z), Ops::SetInt(kSmallestKey), key));
  }
}

template <class Ops>
void ComputeKeys(const RowProblem& problem, Row& row) {
  switch (problem.rule.score) {
    case RoutingScore::kLogit:
      return ComputeKeys<Ops, RoutingScore::kLogit>(problem.bias, row);
    case RoutingScore::kSoftmax:
      return ComputeKeys<Ops, RoutingScore::kSoftmax>(problem.bias, row);
    case RoutingScore::kSigmoid:
      return ComputeKeys<Ops, RoutingScore::kSigmoid>(problem.bias, row);
    case RoutingScore::kSqrtSoftplus:
      return ComputeKeys<Ops, RoutingScore::kSqrtSoftplus>(problem.bias, row);
  }
}

// Best plus second best of a group's biased scores, as a key.
template <class Ops>
int32_t GroupKey(const int32_t* keys, int size) {
  int32_t best = kSmallestKey;
  int32_t second = kSmallestKey;
  for (int i = 0; i < size; ++i) {
    // NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage): ComputeKeys wrote all of row.keys.
    const int32_t smaller = ScalarOps::MinInt(best, keys[i]);
    second = ScalarOps::MaxInt(second, smaller);
    best = ScalarOps::MaxInt(best, keys[i]);
  }
  if (size == 1) {
    return best;
  }
  return OrderKey<ScalarOps>(ScalarOps::Add(FromOrderKey(best), FromOrderKey(second)));
}

// The `rank`-th largest key (rank >= 1), found bit by bit: linear for any number of groups.
template <class Ops>
int32_t RankedKey(const int32_t* keys, int count, int rank) {
  uint32_t found = 0;
  for (uint32_t bit = 1U << 31; bit != 0; bit >>= 1U) {
    const auto candidate = static_cast<int32_t>((found | bit) ^ (1U << 31));
    int at_least = 0;
    for (int i = 0; i < count; ++i) {
      at_least += keys[i] >= candidate ? 1 : 0;
    }
    found |= at_least >= rank ? bit : 0U;
  }
  return static_cast<int32_t>(found ^ (1U << 31));
}

// Marks the kept groups and gives the experts of the others the smallest key.
template <class Ops>
void KeepGroups(const RowProblem& problem, Row& row) {
  const int num_groups = problem.rule.num_groups;
  const int size = problem.num_experts / num_groups;
  int32_t group_keys[kMaxExperts];
  for (int g = 0; g < num_groups; ++g) {
    group_keys[g] = GroupKey<Ops>(row.keys + static_cast<int64_t>(g) * size, size);
  }
  const int32_t threshold = RankedKey<Ops>(group_keys, num_groups, problem.rule.top_groups);
  int ties = problem.rule.top_groups;
  for (int g = 0; g < num_groups; ++g) {
    ties -= group_keys[g] > threshold ? 1 : 0;
  }
  for (int g = 0; g < num_groups; ++g) {
    row.kept[g] = group_keys[g] > threshold || (group_keys[g] == threshold && ties-- > 0);
    for (int i = 0; i < size && !row.kept[g]; ++i) {
      row.keys[g * size + i] = kSmallestKey;
    }
  }
}

// The best slots so far in descending order, as (key, smaller id first) packed into 64 bits.
struct TopList {
  uint64_t packed[kMaxTopK];
  int count;
};

HOPYARD_HOST_DEVICE void Insert(TopList& list, int limit, int32_t key, int id) {
  const uint64_t packed = (static_cast<uint64_t>(static_cast<uint32_t>(key) ^ (1U << 31)) << 32) |
                          (UINT32_MAX - static_cast<uint32_t>(id));
  int at = list.count < limit ? list.count++ : limit - 1;
  for (; at > 0 && list.packed[at - 1] < packed; --at) {
    list.packed[at] = list.packed[at - 1];
  }
  list.packed[at] = packed;
}

// The first top_k candidates enter unseen, so that NaN can be selected; from then on only a key
// above the worst of the list can enter, since on equal keys the earlier, smaller id wins.
template <class Ops>
void SelectTop(const RowProblem& problem, const Row& row, Slots& slots) {
  const int top_k = problem.top_k;
  const bool grouped = problem.rule.num_groups > 1;
  const int group_size = problem.num_experts / problem.rule.num_groups;
  TopList list{};
  int e = 0;
  for (; list.count < top_k; ++e) {
    if (!grouped || row.kept[e / group_size]) {
      // NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage): ComputeKeys wrote all of row.keys.
      Insert(list, top_k, row.keys[e], e);
    }
  }
  const auto worst = [&list, top_k] {
    return static_cast<int32_t>(static_cast<uint32_t>(list.packed[top_k - 1] >> 32) ^ (1U << 31));
  };
  int32_t threshold = worst();
  int block = e / Ops::kLanes * Ops::kLanes;
  uint32_t seen = (1U << (e - block)) - 1U;
  for (; block < row.padded; block += Ops::kLanes) {
    uint32_t mask =
        Ops::MaskBits(Ops::GreaterInt(Ops::LoadInt(row.keys + block), Ops::SetInt(threshold)));
    mask &= ~seen;
    seen = 0;
    for (; mask != 0; mask &= mask - 1) {
      const int id = block + __builtin_ctz(mask);
      if (row.keys[id] > threshold) {
        Insert(list, top_k, row.keys[id], id);
        threshold = worst();
      }
    }
  }
  for (int j = 0; j < top_k; ++j) {
    slots.ids[j] = static_cast<int32_t>(UINT32_MAX - static_cast<uint32_t>(list.packed[j]));
  }
}

// Ids given by the caller, -1 where they name no expert.
template <class Ops>
void ReadIds(const RowProblem& problem, int64_t token, Slots& slots) {
  int64_t table_row = -1;
  if (problem.source == IdSource::kTable) {
    table_row = problem.token_dtype == DType::kInt64
                    ? static_cast<const int64_t*>(problem.token_ids)[token]
                    : static_cast<const int32_t*>(problem.token_ids)[token];
  }
  const bool in_table = table_row >= 0 && table_row < problem.table_rows;
  for (int j = 0; j < problem.top_k; ++j) {
    const int64_t at = token * problem.top_k + j;
    int64_t id = -1;
    if (problem.source == IdSource::kTable) {
      id = in_table ? problem.table[table_row * problem.top_k + j] : -1;
    } else if (problem.forced_dtype == DType::kInt16) {
      id = static_cast<const int16_t*>(problem.forced_ids)[at];
    } else {
      id = static_cast<const int32_t*>(problem.forced_ids)[at];
    }
    slots.ids[j] = id >= 0 && id < problem.num_experts ? static_cast<int32_t>(id) : -1;
  }
}

// Softmax over the logits of the valid slots (the others are NaN and add nothing).
template <class Ops>
void SoftmaxSelected(Slots& slots) {
  const typename Ops::F max = Ops::Set(MaxOf<Ops>(slots.logits, kMaxTopK));
  for (int j = 0; j < kMaxTopK; j += Ops::kLanes) {
    Ops::Store(slots.weights + j, SoftmaxTerm<Ops>(Ops::Load(slots.logits + j), max));
  }
  alignas(64) float lanes[kSumLanes];
  for (int j = 0; j < kMaxTopK; j += Ops::kLanes) {
    Ops::Store(lanes + j, Ops::Add(Ops::Set(0.0F), Ops::Load(slots.weights + j)));
  }
  const typename Ops::F sum = Ops::Set(ReduceLanes(lanes));
  for (int j = 0; j < kMaxTopK; j += Ops::kLanes) {
    Ops::Store(slots.weights + j, Ops::Div(Ops::Load(slots.weights + j), sum));
  }
}

template <class Ops, RoutingScore kScore>
void ScoreSelected(const Row& row, int top_k, Slots& slots) {
  const typename Ops::F max = Ops::Set(row.max);
  const typename Ops::F sum = Ops::Set(row.sum);
  for (int j = 0; j < top_k; j += Ops::kLanes) {
    const typename Ops::F z = Ops::Load(slots.logits + j);
    typename Ops::F term = z;
    if constexpr (kScore == RoutingScore::kSoftmax) {
      term = SoftmaxTerm<Ops>(z, max);
    }
    Ops::Store(slots.weights + j, ScoreOf<Ops, kScore>(z, term, sum));
  }
}

// Weights before renormalisation, always recomputed from the logits and never from a biased score.
template <class Ops>
void UnscaledWeights(const RowProblem& problem, const Row& row, Slots& slots) {
  const RoutingRule& rule = problem.rule;
  if (rule.weight == RoutingWeight::kSoftmaxSelected) {
    return SoftmaxSelected<Ops>(slots);
  }
  const RoutingScore score =
      rule.weight == RoutingWeight::kSigmoidSelected ? RoutingScore::kSigmoid : rule.score;
  switch (score) {
    case RoutingScore::kLogit:
      return ScoreSelected<Ops, RoutingScore::kLogit>(row, problem.top_k, slots);
    case RoutingScore::kSoftmax:
      return ScoreSelected<Ops, RoutingScore::kSoftmax>(row, problem.top_k, slots);
    case RoutingScore::kSigmoid:
      return ScoreSelected<Ops, RoutingScore::kSigmoid>(row, problem.top_k, slots);
    case RoutingScore::kSqrtSoftplus:
      return ScoreSelected<Ops, RoutingScore::kSqrtSoftplus>(row, problem.top_k, slots);
  }
}

template <class Ops>
float Denominator(Renormalise renormalise, const Slots& slots, int top_k) {
  alignas(64) float lanes[kSumLanes];
  for (int j = 0; j < kSumLanes; ++j) {
    lanes[j] = j < top_k && slots.ids[j] >= 0 ? ScalarOps::Add(0.0F, slots.weights[j]) : 0.0F;
  }
  const float sum = ReduceLanes(lanes);
  if (renormalise == Renormalise::kSumPlusEpsilon) {
    return ScalarOps::Add(sum, kSumEpsilon);
  }
  return sum < kSumEpsilon ? kSumEpsilon : sum;
}

template <class Ops>
void WeighSlots(const RowProblem& problem, const Row& row, Slots& slots) {
  for (int j = 0; j < kMaxTopK; ++j) {
    const bool valid = j < problem.top_k && slots.ids[j] >= 0;
    slots.logits[j] = valid ? row.logits[slots.ids[j]] : ScalarOps::FromBits(kNanBits);
  }
  UnscaledWeights<Ops>(problem, row, slots);
  const bool divide = problem.rule.renormalise != Renormalise::kNone;
  const float denominator =
      divide ? Denominator<Ops>(problem.rule.renormalise, slots, problem.top_k) : 1.0F;
  for (int j = 0; j < problem.top_k; ++j) {
    float weight = ScalarOps::Mul(slots.weights[j], problem.rule.scaling_factor);
    weight = divide ? ScalarOps::Div(weight, denominator) : weight;
    weight = row.has_nan || ScalarOps::IsNan(weight) ? ScalarOps::FromBits(kNanBits) : weight;
    slots.weights[j] = slots.ids[j] >= 0 ? weight : 0.0F;
  }
}

template <class Ops>
void RouteRow(const RowProblem& problem, int64_t token, Slots& slots) {
  Row row;
  LoadRow<Ops>(problem, token, row);
  row.max = 0.0F;
  row.sum = 1.0F;
  const bool select = problem.source == IdSource::kSelect;
  const RoutingRule& rule = problem.rule;
  if (rule.score == RoutingScore::kSoftmax && (select || rule.weight == RoutingWeight::kScore)) {
    SoftmaxSum<Ops>(row);
  }
  if (select) {
    ComputeKeys<Ops>(problem, row);
    if (rule.num_groups > 1) {
      KeepGroups<Ops>(problem, row);
    }
    SelectTop<Ops>(problem, row, slots);
  } else {
    ReadIds<Ops>(problem, token, slots);
  }
  WeighSlots<Ops>(problem, row, slots);
}

}  // namespace
}  // namespace hopyard::route
