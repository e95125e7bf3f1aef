// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "device/sm90/dependent.cuh"
#include "device/sm90/numbers.cuh"
#include "stages/2_permute/chunk_sm90.h"

namespace hopyard::permute {
namespace {

constexpr int kThreads = 256;

__global__ void ChunkTokensKernel(const __grid_constant__ ChunkSm90Args args) {
  sm90::TakeTurn();
  const int64_t left = *args.num_tokens - args.token_begin;
  *args.chunk_tokens = static_cast<int32_t>(left < 0                 ? 0
                                            : left > args.max_tokens ? args.max_tokens
                                                                     : left);
}

__global__ void __launch_bounds__(kThreads)
    CopyRowMapKernel(const __grid_constant__ RowMapSm90Args args) {
  sm90::TakeTurn();
  const int64_t slots = sm90::LiveTokens(args.num_tokens, args.max_tokens) * args.slots_per_token;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < slots;
       i += int64_t{gridDim.x} * kThreads) {
    const int32_t row = args.slot_to_row[i];
    args.out[i] = row < 0 ? -1 : static_cast<int32_t>(row + args.row_base);
  }
}

}  // namespace

void ChunkTokensSm90(const ChunkSm90Args& args, const device::Queue& queue) {
  device::Launch(queue, {1, 1}, ChunkTokensKernel, args);
}

void CopyRowMapSm90(const RowMapSm90Args& args, const device::Queue& queue) {
  constexpr int64_t kMaxBlocks = 132 * 8;
  const int64_t slots = args.max_tokens * args.slots_per_token;
  const auto blocks = static_cast<unsigned>(std::min(kMaxBlocks, CeilDiv(slots, kThreads)));
  device::Launch(queue, {blocks, kThreads}, CopyRowMapKernel, args);
}

}  // namespace hopyard::permute
