// SPDX-License-Identifier: Apache-2.0
// Routing of one token by one warp: lane l takes experts l, l + 32, ..., which is the order of
// partial sums that the definition prescribes, so the bits are those of the CPU. Keys live in
// shared memory.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include "device/sm90/numbers.cuh"
#include "device/sm90/warp.cuh"
#include "stages/1_route/route_sm90.h"
#include "stages/1_route/score.h"

namespace hopyard::route {

// Order keys of what cannot be selected, and of NaN, which comes next. One less than any key is a
// number too.
inline constexpr int32_t kExcludedKey = INT32_MIN + 1;
inline constexpr int32_t kNanKey = INT32_MIN + 2;
inline constexpr uint32_t kNanBitsSm90 = 0x7FC00000U;

// A warp's number among those that route a token together; each takes its share of the experts.
struct Team {
  int warp = 0;
  int warps = 1;

  // The lane's first expert, and from one to its next.
  [[nodiscard]] __device__ __forceinline__ int First() const {
    return sm90::kWarpSize * warp + sm90::LaneId();
  }
  [[nodiscard]] __device__ __forceinline__ int Step() const { return sm90::kWarpSize * warps; }
};

// Shared memory of one warp.
struct WarpScratch {
  int32_t* keys;        // [padded experts] order keys of the biased scores, or softmax terms
  int32_t* group_keys;  // [num_groups]
  uint32_t* kept;       // [ceil(num_groups / 32)] bit per group
};

__host__ __device__ inline int PaddedTo32(int count) {
  return (count + 31) / 32 * 32;
}

__host__ __device__ inline int WarpScratchWords(const RouteSm90Args& args) {
  const int groups = args.rule.num_groups > 1 ? PaddedTo32(args.rule.num_groups) : 0;
  return PaddedTo32(args.num_experts) + groups + groups / 32;
}

// The part of warp `warp`; `shared` has WarpScratchWords for each.
__device__ inline WarpScratch WarpScratchOf(const RouteSm90Args& args, int32_t* shared, int warp) {
  int32_t* base = shared + warp * WarpScratchWords(args);
  WarpScratch scratch{base, base + PaddedTo32(args.num_experts), nullptr};
  if (args.rule.num_groups > 1) {
    int32_t* kept = scratch.group_keys + PaddedTo32(args.rule.num_groups);
    scratch.kept = static_cast<uint32_t*>(static_cast<void*>(kept));
  }
  return scratch;
}

// What the softmax over all experts needs.
struct RowStats {
  float max = 0.0F;
  float sum = 1.0F;
  bool has_nan = false;
};

__device__ __forceinline__ float LoadFloat(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) {
    return static_cast<const float*>(data)[index];
  }
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBf16 ? sm90::WidenBf16(bits) : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ float NanWeight() {
  return __uint_as_float(kNanBitsSm90);
}

__device__ __forceinline__ float LogitOf(const RouteSm90Args& args, int64_t token, int expert) {
  return expert < args.num_experts
             ? LoadFloat(args.logits, args.logits_dtype, token * args.num_experts + expert)
             : NanWeight();
}

// Softmax terms of all experts into keys (as bits), their maximum and sum.
__device__ inline void SoftmaxStats(const RouteSm90Args& args, int64_t token,
                                    const WarpScratch& scratch, RowStats& stats) {
  const int lane = sm90::LaneId();
  const int padded = PaddedTo32(args.num_experts);
  float max = -INFINITY;
  for (int e = lane; e < padded; e += 32) {
    const float z = LogitOf(args, token, e);
    max = max < z ? z : max;
  }
  stats.max = sm90::MaxIgnoringNan(max);
  float part = 0.0F;
  for (int e = lane; e < padded; e += 32) {
    const float term = SoftmaxTerm<ScalarOps>(LogitOf(args, token, e), stats.max);
    scratch.keys[e] = ScalarOps::Bits(term);
    part = ScalarOps::Add(part, term);
  }
  stats.sum = sm90::TreeSum(part);
}

// The score of logit z; `term` is SoftmaxTerm(z) where the score is the softmax.
__device__ __forceinline__ float ScoreOfSm90(RoutingScore score, float z, float term, float sum) {
  switch (score) {
    case RoutingScore::kSoftmax:
      return ScalarOps::Div(term, sum);
    case RoutingScore::kSigmoid:
      return Sigmoid<ScalarOps>(z);
    case RoutingScore::kSqrtSoftplus:
      return SqrtSoftplus<ScalarOps>(z);
    case RoutingScore::kLogit:
      break;
  }
  return z;
}

// Of a biased score and the logit that it comes from.
__device__ __forceinline__ int32_t KeyOf(float biased, float z) {
  return ScalarOps::IsNan(z) ? kNanKey : max(OrderKey<ScalarOps>(biased), kNanKey);
}

__device__ __forceinline__ float BiasOf(const RouteSm90Args& args, int expert) {
  const bool has = args.rule.use_bias && args.bias != nullptr && expert < args.num_experts;
  return has ? LoadFloat(args.bias, args.bias_dtype, expert) : 0.0F;
}

__device__ inline void ComputeKeysSm90(const RouteSm90Args& args, int64_t token,
                                       const WarpScratch& scratch, const RowStats& stats) {
  const int padded = PaddedTo32(args.num_experts);
  for (int e = sm90::LaneId(); e < padded; e += 32) {
    const float z = LogitOf(args, token, e);
    const float bias = BiasOf(args, e);
    const float term = ScalarOps::FromBits(scratch.keys[e]);
    const float score = ScoreOfSm90(args.rule.score, z, term, stats.sum);
    scratch.keys[e] = KeyOf(args.rule.use_bias ? ScalarOps::Add(score, bias) : score, z);
  }
  __syncwarp();
}

// The two largest keys of a multiset.
struct BestTwo {
  int32_t best = INT32_MIN;
  int32_t second = INT32_MIN;

  __device__ __forceinline__ void Add(int32_t key) {
    second = max(second, min(best, key));
    best = max(best, key);
  }
};

__device__ __forceinline__ int32_t GroupKeyOf(int32_t best, int32_t second, int size) {
  const float sum = ScalarOps::Add(FromOrderKey(best), FromOrderKey(second));
  return size == 1 ? best : max(OrderKey<ScalarOps>(sum), kExcludedKey);
}

// Large groups are reduced by a warp together, small ones by a lane each.
__device__ inline void ComputeGroupKeys(const RouteSm90Args& args, const Team& team,
                                        const int32_t* keys, int32_t* group_keys) {
  const int lane = sm90::LaneId();
  const int groups = args.rule.num_groups;
  const int size = args.num_experts / groups;
  if (size < 32) {
#pragma unroll 1
    for (int g = team.First(); g < groups; g += team.Step()) {
      BestTwo two;
#pragma unroll 2
      for (int i = 0; i < size; ++i) {
        two.Add(keys[g * size + i]);
      }
      group_keys[g] = GroupKeyOf(two.best, two.second, size);
    }
    return;
  }
#pragma unroll 1
  for (int g = team.warp; g < groups; g += team.warps) {
    BestTwo two;
#pragma unroll 2
    for (int i = lane; i < size; i += 32) {
      two.Add(keys[g * size + i]);
    }
    const int32_t best = sm90::Max(two.best);
    // Of the lanes that have the best key one gives it away.
    const unsigned holders = __ballot_sync(sm90::kAllLanes, two.best == best);
    const bool gives = __ffs(static_cast<int>(holders)) - 1 == lane;
    const int32_t second = sm90::Max(gives ? two.second : two.best);
    if (lane == 0) {
      group_keys[g] = GroupKeyOf(best, second, size);
    }
  }
}

// One bit per kept group, of at most 32; of equal groups the first ones are kept.
__device__ inline uint32_t KeptOfFewGroups(const RouteSm90Args& args, const int32_t* group_keys) {
  const int lane = sm90::LaneId();
  const int groups = args.rule.num_groups;
  const int32_t key = lane < groups ? group_keys[lane] : kExcludedKey;
  int better = 0;
#pragma unroll 2
  for (int g = 0; g < groups; ++g) {
    better += group_keys[g] > (g < lane ? key - 1 : key) ? 1 : 0;
  }
  return __ballot_sync(sm90::kAllLanes, lane < groups && better < args.rule.top_groups);
}

// The `rank`-th largest group key, found bit by bit.
__device__ inline int32_t RankedGroupKey(const WarpScratch& scratch, int groups, int rank) {
  uint32_t found = 0;
  for (uint32_t bit = 1U << 31; bit != 0; bit >>= 1U) {
    const auto candidate = static_cast<int32_t>((found | bit) ^ (1U << 31));
    int at_least = 0;
    for (int g = sm90::LaneId(); g < groups; g += 32) {
      at_least += scratch.group_keys[g] >= candidate ? 1 : 0;
    }
    found |= sm90::Sum(at_least) >= rank ? bit : 0U;
  }
  return static_cast<int32_t>(found ^ (1U << 31));
}

// One bit per kept group; of equal groups at the threshold the first ones are kept.
__device__ inline void KeepGroupsSm90(const RouteSm90Args& args, const WarpScratch& scratch) {
  ComputeGroupKeys(args, Team{}, scratch.keys, scratch.group_keys);
  __syncwarp();
  const int lane = sm90::LaneId();
  const int groups = args.rule.num_groups;
  if (groups <= 32) {
    const uint32_t kept = KeptOfFewGroups(args, scratch.group_keys);
    if (lane == 0) {
      scratch.kept[0] = kept;
    }
    __syncwarp();
    return;
  }
  const int32_t threshold = RankedGroupKey(scratch, groups, args.rule.top_groups);
  int above = 0;
  for (int g = lane; g < groups; g += 32) {
    above += scratch.group_keys[g] > threshold ? 1 : 0;
  }
  int ties = args.rule.top_groups - sm90::Sum(above);
  for (int base = 0; base < groups; base += 32) {
    const int g = base + lane;
    const int32_t key = g < groups ? scratch.group_keys[g] : kExcludedKey;
    const bool equal = g < groups && key == threshold;
    const unsigned equals = __ballot_sync(sm90::kAllLanes, equal);
    const int before = __popc(equals & ((1U << lane) - 1U));
    const bool keep = g < groups && (key > threshold || (equal && before < ties));
    const unsigned word = __ballot_sync(sm90::kAllLanes, keep);
    if (lane == 0) {
      scratch.kept[base / 32] = word;
    }
    ties -= __popc(equals);
  }
  __syncwarp();
}

// Bit i: expert i * 32 + lane may be selected.
__device__ inline uint64_t Candidates(const RouteSm90Args& args, const WarpScratch& scratch) {
  const int size = args.num_experts / args.rule.num_groups;
  uint64_t open = 0;
  for (int e = sm90::LaneId(), i = 0; e < args.num_experts; e += 32, ++i) {
    const int group = e / size;
    const bool kept =
        args.rule.num_groups == 1 || ((scratch.kept[group / 32] >> (group % 32)) & 1U) != 0;
    open |= static_cast<uint64_t>(kept) << i;
  }
  return open;
}

// Slot j's expert goes to lane j: largest key first, smaller id among equals.
__device__ inline int32_t SelectTopSm90(const RouteSm90Args& args, const WarpScratch& scratch) {
  const int lane = sm90::LaneId();
  uint64_t open = Candidates(args, scratch);
  int32_t result = -1;
  int32_t best = INT32_MIN;
  int best_index = -1;
  bool rescan = true;
  for (int j = 0; j < args.top_k; ++j) {
    if (rescan) {
      best_index = -1;
      best = INT32_MIN;
      for (uint64_t left = open; left != 0; left &= left - 1) {
        const int i = __ffsll(static_cast<int64_t>(left)) - 1;
        const int32_t key = scratch.keys[i * 32 + lane];
        if (best_index < 0 || key > best) {
          best = key;
          best_index = i;
        }
      }
    }
    const int32_t top = sm90::Max(best);
    const bool mine = best_index >= 0 && best == top;
    const unsigned winner =
        sm90::Min(mine ? static_cast<unsigned>(best_index * 32 + lane) : UINT32_MAX);
    result = lane == j ? static_cast<int32_t>(winner) : result;
    rescan = static_cast<int>(winner % 32) == lane;
    if (rescan) {
      open &= ~(uint64_t{1} << (winner / 32));
    }
  }
  return result;
}

// The id that the caller gives slot `lane`, -1 where it names no expert.
__device__ inline int32_t ReadIdSm90(const RouteSm90Args& args, int64_t token) {
  const int lane = sm90::LaneId();
  if (lane >= args.top_k) {
    return -1;
  }
  int64_t id = -1;
  if (args.source == IdSource::kTable) {
    const int64_t row = args.token_dtype == DType::kInt64
                            ? static_cast<const int64_t*>(args.token_ids)[token]
                            : static_cast<const int32_t*>(args.token_ids)[token];
    id = row >= 0 && row < args.table_rows ? args.table[row * args.top_k + lane] : -1;
  } else {
    const int64_t at = token * args.top_k + lane;
    id = args.forced_dtype == DType::kInt16 ? static_cast<const int16_t*>(args.forced_ids)[at]
                                            : static_cast<const int32_t*>(args.forced_ids)[at];
  }
  return id >= 0 && id < args.num_experts ? static_cast<int32_t>(id) : -1;
}

// The sum over the warp's slots; lanes beyond them have +0.
__device__ __forceinline__ float SumSlots(const RouteSm90Args& args, float value) {
  const int widest = args.top_k > 1 ? 1 << (31 - __clz(args.top_k - 1)) : 0;
  return sm90::TreeSum(value, widest);
}

// Weight of slot `lane`, 0 for a skipped one. `value` is the expert's score where that is what is
// weighed, else its logit; NaN for a skipped slot.
__device__ inline float WeighSlotSm90(const RouteSm90Args& args, bool valid, float value,
                                      bool row_has_nan) {
  float weight = value;
  if (args.rule.weight == RoutingWeight::kSoftmaxSelected) {
    const float term = SoftmaxTerm<ScalarOps>(value, sm90::MaxIgnoringNan(value));
    const float sum = SumSlots(args, ScalarOps::Add(0.0F, term));
    weight = ScalarOps::Div(valid ? term : 1.0F, sum);
  } else if (args.rule.weight == RoutingWeight::kSigmoidSelected) {
    weight = Sigmoid<ScalarOps>(valid ? value : 1.0F);
  }
  // Zeros and NaN would send lanes without a slot the long way through a division.
  weight = valid ? weight : 1.0F;
  const bool divide = args.rule.renormalise != Renormalise::kNone;
  float denominator = 1.0F;
  if (divide) {
    const float sum = SumSlots(args, valid ? ScalarOps::Add(0.0F, weight) : 0.0F);
    denominator = args.rule.renormalise == Renormalise::kSumPlusEpsilon
                      ? ScalarOps::Add(sum, kSumEpsilon)
                      : (sum < kSumEpsilon ? kSumEpsilon : sum);
  }
  weight = ScalarOps::Mul(weight, args.rule.scaling_factor);
  weight = divide ? ScalarOps::Div(weight, denominator) : weight;
  weight = row_has_nan || ScalarOps::IsNan(weight) ? NanWeight() : weight;
  return valid ? weight : 0.0F;
}

// The `value` of WeighSlotSm90, from the logit of the slot's expert.
__device__ inline float SlotValueSm90(const RouteSm90Args& args, int64_t token, int32_t id,
                                      const RowStats& stats) {
  const float z = id >= 0 ? LogitOf(args, token, id) : NanWeight();
  if (args.rule.weight != RoutingWeight::kScore) {
    return z;
  }
  const bool softmax = args.rule.score == RoutingScore::kSoftmax;
  const float term = softmax ? SoftmaxTerm<ScalarOps>(z, stats.max) : z;
  return ScoreOfSm90(args.rule.score, z, term, stats.sum);
}

__device__ inline void StoreSlotSm90(const RouteSm90Args& args, int64_t token, int32_t id,
                                     float weight) {
  const int lane = sm90::LaneId();
  if (lane >= args.top_k) {
    return;
  }
  const int64_t at = token * args.top_k + lane;
  args.ids[at] = id;
  const bool nan = ScalarOps::IsNan(weight);
  if (args.weights_dtype == DType::kFloat32) {
    static_cast<float*>(args.weights)[at] = weight;
  } else if (args.weights_dtype == DType::kBf16) {
    static_cast<uint16_t*>(args.weights)[at] = sm90::NarrowBf16(weight);
  } else {
    static_cast<uint16_t*>(args.weights)[at] =
        nan ? uint16_t{0x7E00} : __half_as_ushort(__float2half_rn(weight));
  }
  if (args.replay != nullptr) {
    args.replay[at] = static_cast<int16_t>(id);
  }
  // Integer sums: any order gives the same counters.
  if (args.load != nullptr && id >= 0) {
    if (args.load_dtype == DType::kInt64) {
      atomicAdd(static_cast<unsigned long long*>(args.load) + id, 1ULL);
    } else {
      atomicAdd(static_cast<int32_t*>(args.load) + id, 1);
    }
  }
}

__device__ inline bool RowHasNan(const RouteSm90Args& args, int64_t token) {
  bool nan = false;
  for (int e = sm90::LaneId(); e < args.num_experts; e += 32) {
    nan = nan || ScalarOps::IsNan(LogitOf(args, token, e));
  }
  return __any_sync(sm90::kAllLanes, nan) != 0;
}

// Whether the softmax over all experts plays a part.
__device__ __forceinline__ bool NeedsRowStats(const RouteSm90Args& args) {
  return args.rule.score == RoutingScore::kSoftmax &&
         (args.source == IdSource::kSelect || args.rule.weight == RoutingWeight::kScore);
}

// Slot `lane` of a token: expert (-1: skipped) and weight.
struct RoutedSlot {
  int32_t id = -1;
  float weight = 0.0F;
};

__device__ inline RoutedSlot RouteTokenSm90(const RouteSm90Args& args, int64_t token,
                                            const WarpScratch& scratch) {
  RowStats stats;
  stats.has_nan = RowHasNan(args, token);
  if (NeedsRowStats(args)) {
    SoftmaxStats(args, token, scratch, stats);
  }
  RoutedSlot slot;
  if (args.source == IdSource::kSelect) {
    ComputeKeysSm90(args, token, scratch, stats);
    if (args.rule.num_groups > 1) {
      KeepGroupsSm90(args, scratch);
    }
    slot.id = SelectTopSm90(args, scratch);
  } else {
    slot.id = ReadIdSm90(args, token);
  }
  const float value = SlotValueSm90(args, token, slot.id, stats);
  slot.weight = WeighSlotSm90(args, slot.id >= 0, value, stats.has_nan);
  StoreSlotSm90(args, token, slot.id, slot.weight);
  __syncwarp();
  return slot;
}

}  // namespace hopyard::route
