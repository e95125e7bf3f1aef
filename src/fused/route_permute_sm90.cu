// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "device/sm90/dependent.cuh"
#include "fused/route_permute_sm90.cuh"

namespace hopyard::fused {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / sm90::kWarpSize;
// Of a block without an attribute of its own, less what kernels have statically.
constexpr int kSharedBytes = 48 * 1024 - 256;

// Tokens that one block takes; larger batches are spread over the GPU.
constexpr int64_t kMostTokens = 16;
// Tokens that get a block of several warps each; more of them keep the GPU busy with one warp each.
constexpr int64_t kMostTokenBlocks = 256;
constexpr int kTokenWarps = 8;
// Blocks for each rounding, enough to fill 132 SMs eight deep; more rows are taken in strides.
constexpr int64_t kMostRoundBlocks = 132 * 8;

// Tokens of so many words each that there is shared memory for.
int MostAtATime(const RoutePermuteArgs& args, int words) {
  return std::min(kMaxWarps, (kSharedBytes / 4 - FewSlotsWords(args.permute)) / words);
}

// Tokens that one block can route at a time, by a warp each.
int MostTokenWarps(const RoutePermuteArgs& args) {
  return args.routes ? MostAtATime(args, route::WarpScratchWords(args.route)) : kMaxWarps;
}

// Tokens at a time, by several warps each: all of them, or not so.
int TeamsFor(const RoutePermuteArgs& args) {
  return static_cast<int>(std::clamp<int64_t>(args.permute.max_tokens, 1, kMostTokens));
}

route::TeamLayout TeamsOf(const RoutePermuteArgs& args) {
  if (!args.routes) {
    return {};
  }
  const int tokens = TeamsFor(args);
  const route::TeamLayout layout = route::TeamLayoutOf(args.route, kMaxWarps / tokens);
  return tokens <= MostAtATime(args, layout.words) ? layout : route::TeamLayout{};
}

bool FitsOneBlock(const RoutePermuteArgs& args) {
  const int64_t slots = args.permute.max_tokens * args.permute.slots_per_token;
  return args.permute.max_tokens <= std::min<int64_t>(kMostTokens, MostTokenWarps(args)) &&
         slots <= permute::kFewSlots && 4 * FewSlotsWords(args.permute) <= kSharedBytes;
}

bool FitsTokenBlocks(const RoutePermuteArgs& args) {
  if (!args.routes || args.permute.max_tokens == 0 || args.permute.max_tokens > kMostTokenBlocks) {
    return false;
  }
  const route::TeamLayout layout = route::TeamLayoutOf(args.route, kTokenWarps);
  return layout.warps > 0 && 4 * layout.words <= kSharedBytes;
}

// Routes by teams, or in another way.
template <bool kTeams>
__global__ void __launch_bounds__(kMaxThreads, 1)
    RoutePermuteKernel(const __grid_constant__ RoutePermuteLaunch launch) {
  extern __shared__ uint4 shared[];
  sm90::TakeTurn();
  if (RoundsInstead(launch)) {
    return;
  }
  const permute::PermuteSm90Args& args = launch.args.permute;
  const permute::FewSlots few = permute::FewSlotsIn(shared);
  auto* const words = static_cast<int32_t*>(static_cast<void*>(shared));
  RouteAndPlace<kTeams>(launch, words + FewSlotsWords(args), few);
  // Later barriers are for those that stay.
  if (threadIdx.x < permute::kPermuteThreads) {
    permute::PermuteFewSlots(args, static_cast<int>(permute::LiveSlots(args)), few);
  }
}

__global__ void __launch_bounds__(kTokenWarps* sm90::kWarpSize, 1)
    RouteTokensKernel(const __grid_constant__ RoutePermuteLaunch launch) {
  extern __shared__ uint4 shared[];
  sm90::TakeTurn();
  if (!RoundsInstead(launch)) {
    RouteByTeams(launch, static_cast<int32_t*>(static_cast<void*>(shared)), nullptr);
  }
}

// Blocks of `threads` threads for the roundings; returns how many.
unsigned AddRoundings(const RoutePermuteArgs& args, int threads, RoutePermuteLaunch* launch) {
  unsigned blocks = 0;
  for (int i = 0; i < args.roundings; ++i) {
    const gemm1::RoundRowsArgs& rows = args.rounding[i];
    launch->rounding[i] = gemm1::PrepareRoundRows(rows);
    const bool whole_rows = gemm1::kRowCases[launch->rounding[i].row_case].whole_rows;
    const int64_t tiles = rows.max_rows * CeilDiv(rows.out_pitch, gemm1::kTileCols);
    const int64_t wanted = whole_rows ? rows.max_rows : CeilDiv(tiles, threads / sm90::kWarpSize);
    launch->round_blocks[i] = static_cast<unsigned>(std::min(kMostRoundBlocks, wanted));
    blocks += launch->round_blocks[i];
  }
  return blocks;
}

void RunOneBlock(const RoutePermuteArgs& args, const device::Queue& queue) {
  RoutePermuteLaunch launch;
  launch.args = static_cast<const RoutePermuteCalls&>(args);
  launch.teams = TeamsFor(args);
  launch.team = TeamsOf(args);
  const int team_warps = std::max(1, launch.team.warps);
  launch.team_reciprocal = static_cast<uint32_t>(CeilDiv(1 << 16, team_warps));
  int scratch = launch.team.words;
  if (args.routes && launch.team.warps == 0) {
    scratch = route::WarpScratchWords(args.route);
  }
  const int threads =
      std::max(permute::kPermuteThreads, sm90::kWarpSize * launch.teams * team_warps);
  const int shared_bytes = 4 * (FewSlotsWords(args.permute) + launch.teams * scratch);
  const unsigned blocks = launch.route_blocks + AddRoundings(args, threads, &launch);
  device::Launch(queue, {blocks, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes)},
                 launch.team.warps > 0 ? RoutePermuteKernel<true> : RoutePermuteKernel<false>,
                 launch);
}

void RunTokenBlocks(const RoutePermuteArgs& args, const device::Queue& queue) {
  RoutePermuteLaunch launch;
  launch.args = static_cast<const RoutePermuteCalls&>(args);
  launch.route_blocks = static_cast<unsigned>(args.permute.max_tokens);
  launch.teams = 1;
  launch.team = route::TeamLayoutOf(args.route, kTokenWarps);
  launch.team_reciprocal = static_cast<uint32_t>(CeilDiv(1 << 16, launch.team.warps));
  const int threads = sm90::kWarpSize * kTokenWarps;
  const unsigned blocks = launch.route_blocks + AddRoundings(args, threads, &launch);
  device::Launch(
      queue, {blocks, static_cast<unsigned>(threads), static_cast<size_t>(4 * launch.team.words)},
      RouteTokensKernel, launch);
  permute::PermuteSm90(args.permute, queue);
}

void RunApart(const RoutePermuteArgs& args, const device::Queue& queue) {
  if (args.routes) {
    route::RouteSm90(args.route, queue);
  }
  permute::PlaceSm90(args.place, queue);
  permute::PermuteSm90(args.permute, queue);
  for (int i = 0; i < args.roundings; ++i) {
    gemm1::RoundRowsSm90(args.rounding[i], queue);
  }
}

}  // namespace

RoutePermuteWay WayFor(const RoutePermuteArgs& args) {
  const bool token_blocks = FitsTokenBlocks(args);
  // One warp a token takes longer than a second launch.
  if (FitsOneBlock(args) && (!token_blocks || TeamsOf(args).warps > 0)) {
    return RoutePermuteWay::kOneBlock;
  }
  return token_blocks ? RoutePermuteWay::kTokenBlock : RoutePermuteWay::kApart;
}

void RoutePermuteSm90(const RoutePermuteArgs& args, RoutePermuteWay way,
                      const device::Queue& queue) {
  HOPYARD_INTERNAL(way == RoutePermuteWay::kApart || way == WayFor(args))
      << args.permute.max_tokens << " tokens, way " << static_cast<int>(way);
  switch (way) {
    case RoutePermuteWay::kOneBlock:
      return RunOneBlock(args, queue);
    case RoutePermuteWay::kTokenBlock:
      return RunTokenBlocks(args, queue);
    case RoutePermuteWay::kApart:
      return RunApart(args, queue);
  }
}

}  // namespace hopyard::fused
