// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "device/sm90/dependent.cuh"
#include "fused/route_permute_sm90.cuh"

namespace hopyard::fused {
namespace {

constexpr int kMaxThreads = 1024;
// Of a block without an attribute of its own.
constexpr int kSharedBytes = 48 * 1024;

// Tokens that one block takes; larger batches go to the separate launches, which spread them over
// the GPU. On an H100 (bench_route, 128 experts, top 8, 2026-11) one block took 8.5, 9.6 and 11.2
// us for 1, 8 and 16 tokens, three launches 10.2, 11.2 and 12.1.
constexpr int64_t kMostTokens = 16;

constexpr int kMaxWarps = kMaxThreads / sm90::kWarpSize;

// Tokens of so many words each that there is shared memory for.
int MostAtATime(const RoutePermuteArgs& args, int words) {
  return std::min(kMaxWarps, (kSharedBytes / 4 - FewSlotsWords(args.permute)) / words);
}

// Tokens that can be routed at a time, by a warp each.
int MostTokenWarps(const RoutePermuteArgs& args) {
  return args.routes ? MostAtATime(args, route::WarpScratchWords(args.route)) : kMaxWarps;
}

// Several warps a token where all tokens are then routed at a time.
route::TeamLayout TeamsOf(const RoutePermuteArgs& args, int tokens) {
  if (!args.routes) {
    return {};
  }
  const route::TeamLayout layout = route::TeamLayoutOf(args.route, kMaxWarps / tokens);
  return tokens <= MostAtATime(args, layout.words) ? layout : route::TeamLayout{};
}

// Routes by teams, or in another way.
template <bool kTeams>
__global__ void __launch_bounds__(kMaxThreads, 1)
    RoutePermuteKernel(const __grid_constant__ RoutePermuteLaunch launch) {
  extern __shared__ uint4 shared[];
  sm90::TakeTurn();
  const permute::PermuteSm90Args& args = launch.args.permute;
  const permute::FewSlots few = permute::FewSlotsIn(shared);
  auto* const words = static_cast<int32_t*>(static_cast<void*>(shared));
  RouteAndPlace<kTeams>(launch, words + FewSlotsWords(args), few);
  // Later barriers are for those that stay.
  if (threadIdx.x < permute::kPermuteThreads) {
    permute::PermuteFewSlots(args, static_cast<int>(permute::LiveSlots(args)), few);
  }
}

}  // namespace

bool FitsOneBlock(const RoutePermuteArgs& args) {
  const int64_t slots = args.permute.max_tokens * args.permute.slots_per_token;
  return args.permute.max_tokens <= std::min<int64_t>(kMostTokens, MostTokenWarps(args)) &&
         slots <= permute::kFewSlots && 4 * FewSlotsWords(args.permute) <= kSharedBytes;
}

void RoutePermuteSm90(const RoutePermuteArgs& args, const device::Queue& queue) {
  HOPYARD_INTERNAL(FitsOneBlock(args)) << args.permute.max_tokens << " tokens for one block";
  RoutePermuteLaunch launch{args};
  launch.teams =
      static_cast<int>(std::clamp<int64_t>(args.permute.max_tokens, 1, MostTokenWarps(args)));
  launch.team = TeamsOf(args, launch.teams);
  const int team_warps = std::max(1, launch.team.warps);
  launch.team_reciprocal = static_cast<uint32_t>(CeilDiv(1 << 16, team_warps));
  int scratch = launch.team.words;
  if (args.routes && launch.team.warps == 0) {
    scratch = route::WarpScratchWords(args.route);
  }
  const int threads =
      std::max(permute::kPermuteThreads, sm90::kWarpSize * launch.teams * team_warps);
  const int shared_bytes = 4 * (FewSlotsWords(args.permute) + launch.teams * scratch);
  device::Launch(queue, {1, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes)},
                 launch.team.warps > 0 ? RoutePermuteKernel<true> : RoutePermuteKernel<false>,
                 launch);
}

}  // namespace hopyard::fused
