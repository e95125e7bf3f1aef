// SPDX-License-Identifier: Apache-2.0
// A warp per token routes it and places its slots; then the first warps rank the slots of all
// tokens.
#pragma once

#include <cstdint>

#include "device/sm90/numbers.cuh"
#include "device/sm90/warp.cuh"
#include "fused/route_permute_sm90.h"
#include "stages/1_route/route_sm90.cuh"
#include "stages/2_permute/permute_sm90.cuh"
#include "stages/2_permute/place_sm90.cuh"

namespace hopyard::fused {

struct RoutePermuteLaunch {
  RoutePermuteArgs args;
  int token_warps = 0;  // of the block's warps: those with shared memory to route
};

// Ahead of the memory that routing takes.
__host__ __device__ inline int FewSlotsWords(const permute::PermuteSm90Args& args) {
  return permute::FewSlotsBytes(args) / 4;
}

// Leaves the segments of all slots in `few`.
__device__ inline void RouteAndPlace(const RoutePermuteLaunch& launch, int32_t* shared,
                                     const permute::FewSlots& few) {
  const RoutePermuteArgs& args = launch.args;
  const int warp = static_cast<int>(threadIdx.x) / sm90::kWarpSize;
  if (warp >= launch.token_warps) {
    return;
  }
  const route::WarpScratch scratch = route::WarpScratchOf(args.route, shared, warp);
  const int slots = args.place.top_k + args.place.shared;
  const int64_t tokens = sm90::LiveTokens(args.place.num_tokens, args.place.max_tokens);
  for (int64_t token = warp; token < tokens; token += launch.token_warps) {
    if (args.routes) {
      // Lane j writes slot j, and reads it again just below.
      route::RouteTokenSm90(args.route, token, scratch);
    }
    for (int slot = sm90::LaneId(); slot < slots; slot += sm90::kWarpSize) {
      few.segments[token * slots + slot] =
          permute::ValidSegment(args.permute, permute::PlaceSlot(args.place, token, slot));
    }
  }
}

}  // namespace hopyard::fused
