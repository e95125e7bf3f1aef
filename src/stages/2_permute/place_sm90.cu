// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "device/sm90/dependent.cuh"
#include "stages/2_permute/place_sm90.cuh"

namespace hopyard::permute {
namespace {

constexpr int kPlaceThreads = 128;

// One thread per slot: a thread keeps its place within a token and strides over tokens.
// Precondition: at most kPlaceThreads slots a token.
__global__ void __launch_bounds__(kPlaceThreads)
    PlaceKernel(const __grid_constant__ PlaceSm90Args args) {
  sm90::TakeTurn();
  const int slots = args.top_k + args.shared;
  const int tokens_per_block = kPlaceThreads / slots;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= tokens_per_block * slots) {
    return;
  }
  const int slot = thread % slots;
  const int64_t tokens = sm90::LiveTokens(args.num_tokens, args.max_tokens);
  const int64_t step = int64_t{gridDim.x} * tokens_per_block;
  for (int64_t token = int64_t{blockIdx.x} * tokens_per_block + thread / slots; token < tokens;
       token += step) {
    PlaceSlot(args, token, slot);
  }
}

}  // namespace

void PlaceSm90(const PlaceSm90Args& args, const device::Queue& queue) {
  const int slots = args.top_k + args.shared;
  HOPYARD_INTERNAL(slots >= 1 && slots <= kPlaceThreads) << "slots per token: " << slots;
  if (args.max_tokens == 0) {
    return;
  }
  // Enough blocks to fill 132 SMs sixteen deep; more tokens are taken in strides.
  constexpr int64_t kMaxBlocks = 132 * 16;
  const int64_t tokens_per_block = kPlaceThreads / slots;
  const int64_t blocks = std::min(kMaxBlocks, CeilDiv(args.max_tokens, tokens_per_block));
  device::Launch(queue, {static_cast<unsigned>(blocks), kPlaceThreads}, PlaceKernel, args);
}

}  // namespace hopyard::permute
