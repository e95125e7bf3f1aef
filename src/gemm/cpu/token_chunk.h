// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/cpu/dot.h"

namespace hopyard::gemm::cpu {

// The tokens of an expert are taken in chunks, so that their activations stay in the L2 cache while
// a block of weight rows passes over them. Lives in a thread's scratch.
struct TokenChunk {
  static constexpr int64_t kMaxTokens = 192;
  // Half of a 2 MiB L2 for activations; the rest holds the decoded panel and the outputs.
  static constexpr int64_t kCacheBytes = int64_t{1} << 20;

  // Tokens per chunk for rows of `cols` floats: whole register tiles of 6, at least 24.
  static int64_t Size(int64_t cols) {
    const int64_t fit = kCacheBytes / (4 * cols) / 6 * 6;
    return std::clamp<int64_t>(fit, 24, kMaxTokens);
  }

  static constexpr int64_t kPointerFloats = kMaxTokens * static_cast<int64_t>(sizeof(void*)) / 4;
  static constexpr int64_t kFloats = kPointerFloats + 2 * kMaxTokens * kFeatureBlock;

  explicit TokenChunk(float* scratch)
      : x(static_cast<const float**>(static_cast<void*>(scratch))),
        first(scratch + kPointerFloats),
        second(first + kMaxTokens * kFeatureBlock) {}

  const float** x;  // [kMaxTokens]
  float* first;     // [kMaxTokens][kFeatureBlock]
  float* second;
};

}  // namespace hopyard::gemm::cpu
