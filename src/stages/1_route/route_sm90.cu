// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "device/launch.cuh"
#include "device/sm90/dependent.cuh"
#include "stages/1_route/route_sm90.cuh"

namespace hopyard::route {
namespace {

__global__ void __launch_bounds__(256) RouteKernel(const __grid_constant__ RouteSm90Args args) {
  extern __shared__ int32_t shared[];
  sm90::TakeTurn();
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const WarpScratch scratch = WarpScratchOf(args, shared, warp);
  const int64_t tokens = sm90::LiveTokens(args.num_tokens, args.max_tokens);
  const int64_t step = int64_t{gridDim.x} * warps;
  for (int64_t token = int64_t{blockIdx.x} * warps + warp; token < tokens; token += step) {
    RouteTokenSm90(args, token, scratch);
  }
}

}  // namespace

void RouteSm90(const RouteSm90Args& args, const device::Queue& queue) {
  if (args.max_tokens == 0) {
    return;
  }
  // At most 48 KiB of shared memory, which needs no attribute; at 2048 experts in as many groups a
  // warp takes 16.3 KiB.
  constexpr int kSharedBytes = 48 * 1024;
  const int warp_bytes = 4 * WarpScratchWords(args);
  const int warps = std::clamp(kSharedBytes / warp_bytes, 1, 4);
  // Enough blocks to fill 132 SMs sixteen deep; more tokens are taken in strides.
  constexpr int64_t kMaxBlocks = 132 * 16;
  const auto blocks = std::min<int64_t>((args.max_tokens + warps - 1) / warps, kMaxBlocks);
  device::Launch(queue,
                 {static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps),
                  static_cast<size_t>(warps * warp_bytes)},
                 RouteKernel, args);
}

}  // namespace hopyard::route
