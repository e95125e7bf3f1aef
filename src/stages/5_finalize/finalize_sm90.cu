// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "stages/5_finalize/finalize_sm90.cuh"

namespace hopyard::finalize {

void FinalizeSm90(const FinalizeSm90Args& args, const device::Queue& queue) {
  if (args.max_tokens == 0) {
    return;
  }
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide =
      args.hidden % 8 == 0 && args.width % 8 == 0 && aligned(args.y) && aligned(args.output);
  // Enough blocks to fill 132 SMs sixteen deep; more columns are taken in strides.
  constexpr int64_t kMaxBlocks = 132 * 16;
  const int64_t items = args.max_tokens * args.width / (wide ? 8 : 1);
  const auto blocks =
      static_cast<unsigned>(std::min(kMaxBlocks, CeilDiv(items, int64_t{kFinalizeThreads})));
  device::Launch(queue, {blocks, kFinalizeThreads}, wide ? FinalizeKernel<8> : FinalizeKernel<1>,
                 args);
}

}  // namespace hopyard::finalize
