// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "device/cuda_check.h"
#include "stages/1_route/route_sm90.cuh"

namespace hopyard::route {

void RouteSm90(const RouteSm90Args& args, void* stream) {
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
  RouteKernel<<<static_cast<unsigned>(blocks), 32 * warps, warps * warp_bytes,
                static_cast<cudaStream_t>(stream)>>>(args);
  HOPYARD_CUDA(cudaGetLastError());
}

}  // namespace hopyard::route
