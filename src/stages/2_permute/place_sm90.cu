// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/cuda_check.h"
#include "stages/2_permute/place_sm90.cuh"

namespace hopyard::permute {

void PlaceSm90(const PlaceSm90Args& args, void* stream) {
  const int slots = args.top_k + args.shared;
  HOPYARD_INTERNAL(slots >= 1 && slots <= kPlaceThreads) << "slots per token: " << slots;
  if (args.max_tokens == 0) {
    return;
  }
  // Enough blocks to fill 132 SMs sixteen deep; more tokens are taken in strides.
  constexpr int64_t kMaxBlocks = 132 * 16;
  const int64_t tokens_per_block = kPlaceThreads / slots;
  const int64_t blocks = std::min(kMaxBlocks, CeilDiv(args.max_tokens, tokens_per_block));
  PlaceKernel<<<static_cast<unsigned>(blocks), kPlaceThreads, 0,
                static_cast<cudaStream_t>(stream)>>>(args);
  HOPYARD_CUDA(cudaGetLastError());
}

}  // namespace hopyard::permute
