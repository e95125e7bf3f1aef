// SPDX-License-Identifier: Apache-2.0
// Several warps route a token, or one where its rule wants that, and the first of them places its
// slots; in one block the first warps then rank the slots of all tokens. Further blocks round.
#pragma once

#include <cstdint>

#include "device/sm90/numbers.cuh"
#include "device/sm90/warp.cuh"
#include "fused/route_permute_sm90.h"
#include "stages/1_route/route_sm90.cuh"
#include "stages/1_route/route_team_sm90.cuh"
#include "stages/2_permute/permute_sm90.cuh"
#include "stages/2_permute/place_sm90.cuh"
#include "stages/3_gemm1/rows_sm90.cuh"

namespace hopyard::fused {

struct RoutePermuteLaunch {
  RoutePermuteCalls args;
  unsigned route_blocks = 1;  // the first ones
  int teams = 0;              // tokens that a block routes at a time: those with shared memory
  // Of several warps a token; 0 warps: one, which takes its slots one after the other.
  route::TeamLayout team;
  uint32_t team_reciprocal = 0;  // 2^16 / team.warps, rounded up: divides any of a block's warps
  unsigned round_blocks[kMaxRoundings] = {};
  gemm1::RoundRowsLaunch rounding[kMaxRoundings];
};

// Ahead of the memory that routing takes.
__host__ __device__ inline int FewSlotsWords(const permute::PermuteSm90Args& args) {
  return permute::FewSlotsBytes(args) / 4;
}

// Whether this block rounds, and then does.
__device__ inline bool RoundsInstead(const RoutePermuteLaunch& launch) {
  if (blockIdx.x < launch.route_blocks) {
    return false;
  }
  unsigned block = blockIdx.x - launch.route_blocks;
  int which = 0;
  if (block >= launch.round_blocks[0]) {
    block -= launch.round_blocks[0];
    which = 1;
  }
  gemm1::RoundByBlock(launch.rounding[which], block, launch.round_blocks[which]);
  return true;
}

// The slots of a token that this warp routed; their segments go to `segments` too, unless null.
__device__ inline void PlaceRouted(const RoutePermuteCalls& args, int64_t token,
                                   const route::RoutedSlot& routed, int32_t* segments) {
  const int slots = args.place.top_k + args.place.shared;
#pragma unroll 1
  for (int slot = sm90::LaneId(); slot < slots; slot += sm90::kWarpSize) {
    // A token chooses at most as many experts as a warp has lanes.
    const permute::Choice choice = slot < args.place.top_k
                                       ? permute::Choice{routed.id, routed.weight}
                                       : permute::ChoiceOf(args.place, token, slot);
    const int32_t local = permute::PutSlot(args.place, token, slot, choice);
    if (segments != nullptr) {
      segments[token * slots + slot] = permute::ValidSegment(args.permute, local);
    }
  }
}

// The tokens of this block, its first one being `block`, in strides of all blocks' teams.
__device__ inline void RouteByTeams(const RoutePermuteLaunch& launch, int32_t* shared,
                                    int32_t* segments) {
  const RoutePermuteCalls& args = launch.args;
  const int warp = static_cast<int>(threadIdx.x) / sm90::kWarpSize;
  const int mine = static_cast<int>(static_cast<uint32_t>(warp) * launch.team_reciprocal >> 16);
  const route::Team team{warp - mine * launch.team.warps, launch.team.warps};
  const route::TeamScratch scratch =
      route::TeamScratchOf(args.route, launch.team, shared + mine * launch.team.words);
  const int64_t tokens = sm90::LiveTokens(args.place.num_tokens, args.place.max_tokens);
  const int64_t step = int64_t{launch.route_blocks} * launch.teams;
  for (int64_t first = int64_t{blockIdx.x} * launch.teams; first < tokens; first += step) {
    const int64_t token = first + mine;
    const bool live = mine < launch.teams && token < tokens;
    const route::RoutedSlot routed =
        route::RouteByTeam(args.route, launch.team, token, live, team, scratch);
    if (live && team.warp == 0) {
      PlaceRouted(args, token, routed, segments);
    }
    __syncthreads();
  }
}

__device__ inline void RouteByWarps(const RoutePermuteLaunch& launch, int32_t* shared,
                                    int32_t* segments) {
  const RoutePermuteCalls& args = launch.args;
  const int warp = static_cast<int>(threadIdx.x) / sm90::kWarpSize;
  if (warp >= launch.teams) {
    return;
  }
  const route::WarpScratch scratch = route::WarpScratchOf(args.route, shared, warp);
  const int64_t tokens = sm90::LiveTokens(args.place.num_tokens, args.place.max_tokens);
  for (int64_t token = warp; token < tokens; token += launch.teams) {
    PlaceRouted(args, token, route::RouteTokenSm90(args.route, token, scratch), segments);
  }
}

// A thread per slot that the caller chose.
__device__ inline void PlaceGiven(const RoutePermuteCalls& args, int32_t* segments) {
  const int slots = args.place.top_k + args.place.shared;
  const auto live = static_cast<int>(permute::LiveSlots(args.permute));
  for (int i = static_cast<int>(threadIdx.x); i < live; i += static_cast<int>(blockDim.x)) {
    segments[i] =
        permute::ValidSegment(args.permute, permute::PlaceSlot(args.place, i / slots, i % slots));
  }
}

// Leaves the segments of all slots in `few`. All threads of the block call and have met.
template <bool kTeams>
__device__ inline void RouteAndPlace(const RoutePermuteLaunch& launch, int32_t* shared,
                                     const permute::FewSlots& few) {
  if (threadIdx.x < permute::kPermuteThreads) {
    permute::ClearFewSlots(launch.args.permute, few);
  }
  if constexpr (kTeams) {
    // Teams meet before they place.
    RouteByTeams(launch, shared, few.segments);
  } else {
    __syncthreads();
    if (launch.args.routes) {
      RouteByWarps(launch, shared, few.segments);
    } else {
      PlaceGiven(launch.args, few.segments);
    }
    __syncthreads();
  }
}

}  // namespace hopyard::fused
