// SPDX-License-Identifier: Apache-2.0
// Routing of a token by several warps of a block, for so few tokens that a call waits for one
// warp's chain of instructions. Of every 32 experts the best come first, then of all these; an
// expert's place is how many are better, so that no step waits for the one before. The bits of
// RouteTokenSm90: sums are added up in the same order.
#pragma once

#include <cstdint>

#include "device/sm90/warp.cuh"
#include "stages/1_route/route_sm90.cuh"

namespace hopyard::route {

// Of every 32 experts 1 << shift are candidates; what follows from the rule, made by the host.
struct TeamLayout {
  int warps = 0;       // of a team; 0: the rule does not suit teams
  int shift = 0;       // of candidates: at least top_k
  int candidates = 0;  // of a token
  int padded = 0;      // the same in whole groups of 32
  int words = 0;       // of shared memory for a team
};

// `most_warps` is at most 32.
inline TeamLayout TeamLayoutOf(const RouteSm90Args& args, int most_warps) {
  // More would make ranking them slower than taking one after the other.
  constexpr int kMostCandidates = 256;
  TeamLayout layout;
  layout.shift = 3;
  while (1 << layout.shift < args.top_k) {
    ++layout.shift;
  }
  const int padded_experts = PaddedTo32(args.num_experts);
  layout.candidates = padded_experts / 32 << layout.shift;
  layout.padded = PaddedTo32(layout.candidates);
  layout.words = 2 * padded_experts + layout.padded + 3 * 32 + layout.padded / 2;
  const bool suits = layout.candidates <= kMostCandidates && args.rule.num_groups <= 32;
  layout.warps = suits ? (padded_experts / 32 < most_warps ? padded_experts / 32 : most_warps) : 0;
  return layout;
}

// Shared memory of one team, 16-byte aligned.
struct TeamScratch {
  int32_t* keys;        // [padded experts] order keys of the biased scores, or softmax terms
  float* values;        // [padded experts] what WeighSlotSm90 takes
  int32_t* best;        // [padded] of every 32 experts the best keys, in order
  int32_t* group_keys;  // [32]
  int32_t* chosen;      // [32] experts by slot; ahead of that, largest logits by warp
  int32_t* has_nan;     // [32] by warp, whether a logit of its share is NaN
  int16_t* best_ids;    // [padded] whose the best keys are
};

// `base` has TeamLayout::words.
__device__ inline TeamScratch TeamScratchOf(const RouteSm90Args& args, const TeamLayout& layout,
                                            int32_t* base) {
  const int padded = PaddedTo32(args.num_experts);
  TeamScratch scratch;
  scratch.keys = base;
  scratch.values = static_cast<float*>(static_cast<void*>(base + padded));
  scratch.best = base + 2 * padded;
  scratch.group_keys = scratch.best + layout.padded;
  scratch.chosen = scratch.group_keys + 32;
  scratch.has_nan = scratch.chosen + 32;
  scratch.best_ids = static_cast<int16_t*>(static_cast<void*>(scratch.has_nan + 32));
  return scratch;
}

// Softmax terms of experts below `end` into keys (as bits), their maximum and sum. All threads of
// the block call.
__device__ inline void TeamSoftmaxStats(const RouteSm90Args& args, int64_t token, const Team& team,
                                        int end, const TeamScratch& scratch, RowStats& stats) {
  const int lane = sm90::LaneId();
  float max = -INFINITY;
#pragma unroll 1
  for (int e = team.First(); e < end; e += team.Step()) {
    const float z = LogitOf(args, token, e);
    max = max < z ? z : max;
  }
  max = sm90::MaxIgnoringNan(max);
  if (end > 0 && lane == 0) {
    scratch.chosen[team.warp] = ScalarOps::Bits(max);
  }
  __syncthreads();
  stats.max = sm90::MaxIgnoringNan(
      end > 0 && lane < team.warps ? ScalarOps::FromBits(scratch.chosen[lane]) : -INFINITY);
#pragma unroll 1
  for (int e = team.First(); e < end; e += team.Step()) {
    scratch.keys[e] = ScalarOps::Bits(SoftmaxTerm<ScalarOps>(LogitOf(args, token, e), stats.max));
  }
  __syncthreads();
  // Every warp adds all of them: the order of the sum is that of one warp.
  float part = 0.0F;
#pragma unroll 1
  for (int e = lane; e < end; e += sm90::kWarpSize) {
    part = ScalarOps::Add(part, ScalarOps::FromBits(scratch.keys[e]));
  }
  stats.sum = sm90::TreeSum(part);
  __syncthreads();
}

// Keys and values of the warp's share, and whether it has a NaN.
__device__ inline void ScoreShare(const RouteSm90Args& args, int64_t token, const Team& team,
                                  int end, const RowStats& stats, const TeamScratch& scratch) {
  const bool keeps_score = args.rule.weight == RoutingWeight::kScore;
  bool nan = false;
#pragma unroll 1
  for (int e = team.First(); e < end; e += team.Step()) {
    const float z = LogitOf(args, token, e);
    const float bias = BiasOf(args, e);
    const float term = ScalarOps::FromBits(scratch.keys[e]);
    const float score = ScoreOfSm90(args.rule.score, z, term, stats.sum);
    const bool real = e < args.num_experts;
    nan = nan || (real && ScalarOps::IsNan(z));
    scratch.values[e] = keeps_score ? score : z;
    const float biased = args.rule.use_bias ? ScalarOps::Add(score, bias) : score;
    scratch.keys[e] = real ? KeyOf(biased, z) : kExcludedKey;
  }
  const bool any = __any_sync(sm90::kAllLanes, nan) != 0;
  if (end > 0 && sm90::LaneId() == 0) {
    scratch.has_nan[team.warp] = any ? 1 : 0;
  }
}

// How many of 32 * blocks keys come ahead of the one at `place`: larger ones, and equal ones at
// smaller places. `keys` is 16-byte aligned, no key is below kExcludedKey.
__device__ __forceinline__ int RankAmong(const int32_t* keys, int blocks, int place) {
  const auto* fours = static_cast<const int4*>(static_cast<const void*>(keys));
  const int32_t key = keys[place];
  const int own = place / 4;
  // Four sums, so that one addition does not wait for the next.
  int4 larger = {0, 0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < 8 * blocks; i += 8) {
#pragma unroll
    for (int j = i; j < i + 8; ++j) {
      const int4 four = fours[j];
      const int32_t bound = j < own ? key - 1 : key;
      larger.x += four.x > bound ? 1 : 0;
      larger.y += four.y > bound ? 1 : 0;
      larger.z += four.z > bound ? 1 : 0;
      larger.w += four.w > bound ? 1 : 0;
    }
  }
  int rank = larger.x + larger.y + (larger.z + larger.w);
  const int4 four = fours[own];
  rank += place % 4 > 0 && four.x == key ? 1 : 0;
  rank += place % 4 > 1 && four.y == key ? 1 : 0;
  rank += place % 4 > 2 && four.z == key ? 1 : 0;
  return rank;
}

// Takes what groups without a bit in `kept` hold, and what lies beyond the candidates, out of the
// ranking.
__device__ inline void ExcludeShare(const RouteSm90Args& args, const TeamLayout& layout,
                                    const Team& team, int end, uint32_t kept,
                                    const TeamScratch& scratch) {
  const int unused = layout.candidates + sm90::LaneId();
  if (end > 0 && team.warp == 0 && unused < layout.padded) {
    scratch.best[unused] = kExcludedKey;
  }
  if (args.rule.num_groups > 1) {
    const auto size = static_cast<uint32_t>(args.num_experts / args.rule.num_groups);
#pragma unroll 1
    for (int e = team.First(); e < end; e += team.Step()) {
      if (e < args.num_experts && (kept >> (static_cast<uint32_t>(e) / size) & 1U) == 0) {
        scratch.keys[e] = kExcludedKey;
      }
    }
  }
  __syncwarp();
}

// First the best of every 32 experts of the warp's share, then the first top_k of all of those. One
// piece of code for both.
__device__ inline void RankShare(const RouteSm90Args& args, const TeamLayout& layout,
                                 const Team& team, int end, const TeamScratch& scratch) {
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool experts = pass == 0;
    const int count = experts ? end : (end > 0 ? layout.candidates : 0);
    const int wanted = experts ? 1 << layout.shift : args.top_k;
#pragma unroll 1
    for (int i = team.First(); i < count; i += team.Step()) {
      const int ahead = experts ? i - sm90::LaneId() : 0;
      const int blocks = experts ? 1 : layout.padded / 32;
      const int32_t* keys = experts ? scratch.keys : scratch.best;
      const int rank = RankAmong(keys + ahead, blocks, i - ahead);
      if (rank < wanted && experts) {
        const int at = (i / 32 << layout.shift) + rank;
        scratch.best[at] = keys[i];
        scratch.best_ids[at] = static_cast<int16_t>(i);
      } else if (rank < wanted) {
        scratch.chosen[rank] = scratch.best_ids[i];
      }
    }
    // Up to 32 candidates are ranked by the team's first warp alone.
    if (experts || layout.padded > 32) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
}

// Leaves the ids of the slots in scratch.chosen, where a team's first warp can read them. All
// threads of the block call; `end` is 0 for a team without a token, which leaves `scratch` alone.
__device__ inline void SelectByTeam(const RouteSm90Args& args, const TeamLayout& layout,
                                    const Team& team, int end, const TeamScratch& scratch) {
  uint32_t kept = 0;
  if (args.rule.num_groups > 1) {
    __syncthreads();
    if (end > 0) {
      ComputeGroupKeys(args, team, scratch.keys, scratch.group_keys);
    }
    __syncthreads();
    kept = end > 0 ? KeptOfFewGroups(args, scratch.group_keys) : 0;
  }
  ExcludeShare(args, layout, team, end, kept, scratch);
  RankShare(args, layout, team, end, scratch);
}

// Routes a token, or none where `live` is false, and writes what RouteSm90 writes. All threads of
// the block call, and meet before `scratch` is used again. The team's first warp receives slot
// `lane`.
__device__ inline RoutedSlot RouteByTeam(const RouteSm90Args& args, const TeamLayout& layout,
                                         int64_t token, bool live, const Team& team,
                                         const TeamScratch& scratch) {
  const int end = live ? PaddedTo32(args.num_experts) : 0;
  const bool select = args.source == IdSource::kSelect;
  const bool first = live && team.warp == 0;
  RoutedSlot slot;
  if (first && !select) {
    slot.id = ReadIdSm90(args, token);
  }
  RowStats stats;
  if (NeedsRowStats(args)) {
    TeamSoftmaxStats(args, token, team, end, scratch, stats);
  }
  ScoreShare(args, token, team, end, stats, scratch);
  if (select) {
    SelectByTeam(args, layout, team, end, scratch);
  } else {
    __syncthreads();
  }
  if (!first) {
    return slot;
  }
  const int lane = sm90::LaneId();
  if (select && lane < args.top_k) {
    slot.id = scratch.chosen[lane];
  }
  const bool row_has_nan =
      __any_sync(sm90::kAllLanes, lane < team.warps && scratch.has_nan[lane] != 0) != 0;
  const bool valid = slot.id >= 0;
  const float value = valid ? scratch.values[slot.id] : NanWeight();
  slot.weight = WeighSlotSm90(args, valid, value, row_has_nan);
  StoreSlotSm90(args, token, slot.id, slot.weight);
  return slot;
}

}  // namespace hopyard::route
