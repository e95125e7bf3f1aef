// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "device/sm90/dependent.cuh"
#include "stages/2_permute/permute_sm90.cuh"

namespace hopyard::permute {
namespace {

__global__ void __launch_bounds__(kPermuteThreads, 4)
    CountKernel(const __grid_constant__ PermuteSm90Args args) {
  extern __shared__ uint16_t counts[];
  sm90::TakeTurn();
  const int64_t live = LiveSlots(args);
  for (int64_t chunk = blockIdx.x; chunk * kPermuteChunk < live; chunk += gridDim.x) {
    CountByWarp(args, chunk, live, counts);
    SumWarps(args, chunk, counts);
  }
}

__global__ void __launch_bounds__(kPermuteThreads, 4)
    LayOutKernel(const __grid_constant__ PermuteSm90Args args) {
  __shared__ RowsAndTiles shared[kPermuteWarps];
  sm90::TakeTurn();
  LayOutSegments(args, LiveSlots(args), shared);
}

__global__ void __launch_bounds__(kPermuteThreads, 4)
    RankKernel(const __grid_constant__ PermuteSm90Args args) {
  extern __shared__ uint16_t counts[];
  sm90::TakeTurn();
  const int64_t live = LiveSlots(args);
  for (int64_t chunk = blockIdx.x; chunk * kPermuteChunk < live; chunk += gridDim.x) {
    CountByWarp(args, chunk, live, counts);
    RankCounted(args, chunk, live, counts);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kPermuteThreads, 4)
    PermuteChunkKernel(const __grid_constant__ PermuteSm90Args args) {
  extern __shared__ int32_t words[];
  __shared__ RowsAndTiles shared[kPermuteWarps];
  sm90::TakeTurn();
  PermuteOneChunk(args, words, shared);
}

__global__ void __launch_bounds__(kPermuteThreads, 4)
    PermuteFewKernel(const __grid_constant__ PermuteSm90Args args) {
  extern __shared__ uint4 memory[];
  sm90::TakeTurn();
  const FewSlots few = FewSlotsIn(memory);
  const auto live = static_cast<int>(LiveSlots(args));
  ClearFewSlots(args, few);
  few.segments[threadIdx.x] = SegmentOf(args, threadIdx.x, live);
  __syncthreads();
  PermuteFewSlots(args, live, few);
}

}  // namespace

int64_t PermuteScratchInts(int64_t num_slots, int segments) {
  return std::max<int64_t>(1, CeilDiv(num_slots, kPermuteChunk)) * segments;
}

void PermuteSm90(const PermuteSm90Args& args, const device::Queue& queue) {
  const int64_t max_slots = args.max_tokens * args.slots_per_token;
  const auto shared_bytes = static_cast<size_t>(PermuteSharedBytes(args));
  if (max_slots <= kFewSlots) {
    device::Launch(queue, {1, kPermuteThreads, static_cast<size_t>(FewSlotsBytes(args))},
                   PermuteFewKernel, args);
    return;
  }
  if (max_slots <= kPermuteChunk) {
    device::Launch(queue, {1, kPermuteThreads, static_cast<size_t>(ChunkSharedBytes(args))},
                   PermuteChunkKernel, args);
    return;
  }
  // Blocks beyond this many take further chunks in strides.
  constexpr int64_t kMaxBlocks = 132 * 8;
  const auto blocks =
      static_cast<unsigned>(std::min(kMaxBlocks, CeilDiv(max_slots, kPermuteChunk)));
  device::Launch(queue, {blocks, kPermuteThreads, shared_bytes}, CountKernel, args);
  device::Launch(queue, {1, kPermuteThreads}, LayOutKernel, args);
  device::Launch(queue, {blocks, kPermuteThreads, shared_bytes}, RankKernel, args);
}

}  // namespace hopyard::permute
