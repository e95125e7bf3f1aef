// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/cuda_check.h"
#include "stages/2_permute/permute_sm90.cuh"

namespace hopyard::permute {

int64_t PermuteScratchInts(int64_t num_slots, const PermuteOptions& options) {
  return std::max<int64_t>(1, CeilDiv(num_slots, kPermuteChunk)) * options.num_local_experts;
}

void PermuteSm90(const PermuteSm90Args& args, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t max_slots = args.max_tokens * args.slots_per_token;
  // 32.5 KiB at 2048 routed and 32 shared experts.
  const size_t shared_bytes = sizeof(uint16_t) * kPermuteWarps * args.options.num_local_experts;
  if (max_slots <= kPermuteChunk) {
    PermuteSmallKernel<<<1, kPermuteThreads, shared_bytes, cuda_stream>>>(args);
    HOPYARD_CUDA(cudaGetLastError());
    return;
  }
  // Blocks beyond this many take further chunks in strides.
  constexpr int64_t kMaxBlocks = 132 * 8;
  const auto blocks =
      static_cast<unsigned>(std::min(kMaxBlocks, CeilDiv(max_slots, kPermuteChunk)));
  CountKernel<<<blocks, kPermuteThreads, shared_bytes, cuda_stream>>>(args);
  HOPYARD_CUDA(cudaGetLastError());
  LayOutKernel<<<1, kPermuteThreads, 0, cuda_stream>>>(args);
  HOPYARD_CUDA(cudaGetLastError());
  RankKernel<<<blocks, kPermuteThreads, shared_bytes, cuda_stream>>>(args);
  HOPYARD_CUDA(cudaGetLastError());
}

}  // namespace hopyard::permute
