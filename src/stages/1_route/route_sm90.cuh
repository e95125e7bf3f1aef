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

inline constexpr int32_t kSmallestKeySm90 = INT32_MIN;
inline constexpr uint32_t kNanBitsSm90 = 0x7FC00000U;

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

__device__ inline void ComputeKeysSm90(const RouteSm90Args& args, int64_t token,
                                       const WarpScratch& scratch, const RowStats& stats) {
  const int padded = PaddedTo32(args.num_experts);
  const bool biased = args.rule.use_bias && args.bias != nullptr;
  for (int e = sm90::LaneId(); e < padded; e += 32) {
    const float z = LogitOf(args, token, e);
    const float term = ScalarOps::FromBits(scratch.keys[e]);
    float score = ScoreOfSm90(args.rule.score, z, term, stats.sum);
    if (args.rule.use_bias) {
      const bool real = biased && e < args.num_experts;
      score = ScalarOps::Add(score, real ? LoadFloat(args.bias, args.bias_dtype, e) : 0.0F);
    }
    scratch.keys[e] = ScalarOps::IsNan(z) ? kSmallestKeySm90 : OrderKey<ScalarOps>(score);
  }
  __syncwarp();
}

// The two largest keys of a multiset.
struct BestTwo {
  int32_t best = kSmallestKeySm90;
  int32_t second = kSmallestKeySm90;

  __device__ __forceinline__ void Add(int32_t key) {
    second = max(second, min(best, key));
    best = max(best, key);
  }
};

__device__ __forceinline__ int32_t GroupKeyOf(const BestTwo& two, int size) {
  return size == 1 ? two.best
                   : OrderKey<ScalarOps>(
                         ScalarOps::Add(FromOrderKey(two.best), FromOrderKey(two.second)));
}

// Large groups are reduced by the warp together, small ones by a lane each.
__device__ inline void ComputeGroupKeys(const RouteSm90Args& args, const WarpScratch& scratch) {
  const int lane = sm90::LaneId();
  const int groups = args.rule.num_groups;
  const int size = args.num_experts / groups;
  if (size < 32) {
    for (int g = lane; g < groups; g += 32) {
      BestTwo two;
      for (int i = 0; i < size; ++i) {
        two.Add(scratch.keys[g * size + i]);
      }
      scratch.group_keys[g] = GroupKeyOf(two, size);
    }
  } else {
    for (int g = 0; g < groups; ++g) {
      BestTwo two;
      for (int i = lane; i < size; i += 32) {
        two.Add(scratch.keys[g * size + i]);
      }
      for (int width = 16; width > 0; width /= 2) {
        const int32_t other_best = __shfl_xor_sync(sm90::kAllLanes, two.best, width);
        const int32_t other_second = __shfl_xor_sync(sm90::kAllLanes, two.second, width);
        two.second = max(max(two.second, other_second), min(two.best, other_best));
        two.best = max(two.best, other_best);
      }
      if (lane == 0) {
        scratch.group_keys[g] = GroupKeyOf(two, size);
      }
    }
  }
  __syncwarp();
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
  ComputeGroupKeys(args, scratch);
  const int lane = sm90::LaneId();
  const int groups = args.rule.num_groups;
  const int32_t threshold = RankedGroupKey(scratch, groups, args.rule.top_groups);
  int above = 0;
  for (int g = lane; g < groups; g += 32) {
    above += scratch.group_keys[g] > threshold ? 1 : 0;
  }
  int ties = args.rule.top_groups - sm90::Sum(above);
  for (int base = 0; base < groups; base += 32) {
    const int g = base + lane;
    const int32_t key = g < groups ? scratch.group_keys[g] : kSmallestKeySm90;
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
  int32_t best = kSmallestKeySm90;
  int best_index = -1;
  bool rescan = true;
  for (int j = 0; j < args.top_k; ++j) {
    if (rescan) {
      best_index = -1;
      best = kSmallestKeySm90;
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

// Weight of slot `lane`, recomputed from its logit; 0 for a skipped slot.
__device__ inline float WeighSlotSm90(const RouteSm90Args& args, int64_t token, int32_t id,
                                      const RowStats& stats) {
  const bool valid = id >= 0;
  const float z = valid ? LogitOf(args, token, id) : NanWeight();
  float weight = 0.0F;
  if (args.rule.weight == RoutingWeight::kSoftmaxSelected) {
    const float term = SoftmaxTerm<ScalarOps>(z, sm90::MaxIgnoringNan(z));
    weight = ScalarOps::Div(term, sm90::TreeSum(ScalarOps::Add(0.0F, term)));
  } else {
    const RoutingScore score = args.rule.weight == RoutingWeight::kSigmoidSelected
                                   ? RoutingScore::kSigmoid
                                   : args.rule.score;
    const float term = score == RoutingScore::kSoftmax ? SoftmaxTerm<ScalarOps>(z, stats.max) : z;
    weight = ScoreOfSm90(score, z, term, stats.sum);
  }
  const bool divide = args.rule.renormalise != Renormalise::kNone;
  float denominator = 1.0F;
  if (divide) {
    const float sum = sm90::TreeSum(valid ? ScalarOps::Add(0.0F, weight) : 0.0F);
    denominator = args.rule.renormalise == Renormalise::kSumPlusEpsilon
                      ? ScalarOps::Add(sum, kSumEpsilon)
                      : (sum < kSumEpsilon ? kSumEpsilon : sum);
  }
  weight = ScalarOps::Mul(weight, args.rule.scaling_factor);
  weight = divide ? ScalarOps::Div(weight, denominator) : weight;
  weight = stats.has_nan || ScalarOps::IsNan(weight) ? NanWeight() : weight;
  return valid ? weight : 0.0F;
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

__device__ inline void RouteTokenSm90(const RouteSm90Args& args, int64_t token,
                                      const WarpScratch& scratch) {
  RowStats stats;
  stats.has_nan = RowHasNan(args, token);
  const bool select = args.source == IdSource::kSelect;
  if (args.rule.score == RoutingScore::kSoftmax &&
      (select || args.rule.weight == RoutingWeight::kScore)) {
    SoftmaxStats(args, token, scratch, stats);
  }
  int32_t id = -1;
  if (select) {
    ComputeKeysSm90(args, token, scratch, stats);
    if (args.rule.num_groups > 1) {
      KeepGroupsSm90(args, scratch);
    }
    id = SelectTopSm90(args, scratch);
  } else {
    id = ReadIdSm90(args, token);
  }
  StoreSlotSm90(args, token, id, WeighSlotSm90(args, token, id, stats));
  __syncwarp();
}

}  // namespace hopyard::route
