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

// More would make ranking them slower than taking one after the other.
inline constexpr int kMostTeamCandidates = 256;
inline constexpr int kMostTeamWarps = 32;

// Of every 32 experts 1 << CandidateShift are candidates: at least top_k, and whole groups of 4.
__host__ __device__ inline int CandidateShift(int top_k) {
  int shift = 2;
  while (1 << shift < top_k) {
    ++shift;
  }
  return shift;
}

__host__ __device__ inline int TeamCandidates(const RouteSm90Args& args) {
  return PaddedTo32(args.num_experts) / 32 << CandidateShift(args.top_k);
}

// Whether RouteByTeam is meant for this rule.
__host__ __device__ inline bool SuitsTeams(const RouteSm90Args& args) {
  return TeamCandidates(args) <= kMostTeamCandidates && args.rule.num_groups <= 32;
}

// Shared memory of one team, 16-byte aligned.
struct TeamScratch {
  int32_t* keys;        // [padded experts] order keys of the biased scores, or softmax terms
  float* values;        // [padded experts] what WeighSlotSm90 takes
  int32_t* best;        // [TeamCandidates] of every 32 experts the best keys, in order
  int32_t* group_keys;  // [32]
  int32_t* chosen;      // [32] experts by slot; ahead of that, largest logits by warp
  int32_t* has_nan;     // [kMostTeamWarps] whether a logit of the warp's share is NaN
  int16_t* best_ids;    // [TeamCandidates] whose the best keys are
};

__host__ __device__ inline int TeamScratchWords(const RouteSm90Args& args) {
  const int candidates = TeamCandidates(args);
  return 2 * PaddedTo32(args.num_experts) + candidates + 64 + kMostTeamWarps +
         (candidates / 2 + 3) / 4 * 4;
}

// That of team `team`; `shared` has TeamScratchWords for each.
__device__ inline TeamScratch TeamScratchOf(const RouteSm90Args& args, int32_t* shared, int team) {
  const int padded = PaddedTo32(args.num_experts);
  TeamScratch scratch;
  scratch.keys = shared + team * TeamScratchWords(args);
  scratch.values = static_cast<float*>(static_cast<void*>(scratch.keys + padded));
  scratch.best = scratch.keys + 2 * padded;
  scratch.group_keys = scratch.best + TeamCandidates(args);
  scratch.chosen = scratch.group_keys + 32;
  scratch.has_nan = scratch.chosen + 32;
  scratch.best_ids = static_cast<int16_t*>(static_cast<void*>(scratch.has_nan + kMostTeamWarps));
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

// How many of `count` keys come ahead of the one at `place`: larger ones, and equal ones at smaller
// places. `keys` is 16-byte aligned, `count` a multiple of 4, no key is below kExcludedKey.
__device__ __forceinline__ int RankAmong(const int32_t* keys, int count, int place) {
  const auto* fours = static_cast<const int4*>(static_cast<const void*>(keys));
  const int32_t key = keys[place];
  const int own = place / 4;
  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < count / 4; ++i) {
    const int4 four = fours[i];
    const int32_t bound = i < own ? key - 1 : key;
    rank += (four.x > bound ? 1 : 0) + (four.y > bound ? 1 : 0);
    rank += (four.z > bound ? 1 : 0) + (four.w > bound ? 1 : 0);
  }
  const int4 four = fours[own];
  rank += place % 4 > 0 && four.x == key ? 1 : 0;
  rank += place % 4 > 1 && four.y == key ? 1 : 0;
  rank += place % 4 > 2 && four.z == key ? 1 : 0;
  return rank;
}

// The best of every 32 experts of the warp's share. `kept` has a bit per group.
__device__ inline void RankShare(const RouteSm90Args& args, const Team& team, int end,
                                 uint32_t kept, const TeamScratch& scratch) {
  const int shift = CandidateShift(args.top_k);
#pragma unroll 1
  for (int e = team.First(); e < end; e += team.Step()) {
    if (args.rule.num_groups > 1 && e < args.num_experts) {
      const int group = e / (args.num_experts / args.rule.num_groups);
      if ((kept >> group & 1U) == 0) {
        scratch.keys[e] = kExcludedKey;
      }
    }
    __syncwarp();
    const int lane = sm90::LaneId();
    const int rank = RankAmong(scratch.keys + (e - lane), sm90::kWarpSize, lane);
    if (rank >> shift == 0) {
      const int at = (e / sm90::kWarpSize << shift) + rank;
      scratch.best[at] = scratch.keys[e];
      scratch.best_ids[at] = static_cast<int16_t>(e);
    }
  }
}

// The first top_k of the best.
__device__ inline void RankBest(const RouteSm90Args& args, const Team& team, int candidates,
                                const TeamScratch& scratch) {
#pragma unroll 1
  for (int i = team.First(); i < candidates; i += team.Step()) {
    const int rank = RankAmong(scratch.best, candidates, i);
    if (rank < args.top_k) {
      scratch.chosen[rank] = scratch.best_ids[i];
    }
  }
}

// Leaves the ids of the slots in scratch.chosen, where a team's first warp can read them. All
// threads of the block call; `end` is 0 for a team without a token, which leaves `scratch` alone.
__device__ inline void SelectByTeam(const RouteSm90Args& args, const Team& team, int end,
                                    const TeamScratch& scratch) {
  uint32_t kept = 0;
  if (args.rule.num_groups > 1) {
    __syncthreads();
    if (end > 0) {
      ComputeGroupKeys(args, team, scratch.keys, scratch.group_keys);
    }
    __syncthreads();
    kept = end > 0 ? KeptOfFewGroups(args, scratch.group_keys) : 0;
  }
  RankShare(args, team, end, kept, scratch);
  __syncthreads();
  const int candidates = TeamCandidates(args);
  RankBest(args, team, end > 0 ? candidates : 0, scratch);
  if (candidates > sm90::kWarpSize) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// Routes a token, or none where `live` is false, and writes what RouteSm90 writes. All threads of
// the block call, and meet before `scratch` is used again. The team's first warp receives slot
// `lane`.
__device__ inline RoutedSlot RouteByTeam(const RouteSm90Args& args, int64_t token, bool live,
                                         const Team& team, const TeamScratch& scratch) {
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
    SelectByTeam(args, team, end, scratch);
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
