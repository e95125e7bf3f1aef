// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/parallel.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "stages/5_finalize/finalize.h"

namespace hopyard::finalize {
namespace {

constexpr int64_t kBlock = 256;  // columns at a time: the sums stay in the L1 cache

void FinalizeBlock(const Args& args, int64_t token, int64_t begin, int64_t count) {
  float sum[kBlock] = {};
  for (int s = 0; s < args.slots; ++s) {
    const int64_t slot = token * args.slots + s;
    const int64_t row = args.slot_to_row[slot];
    if (row < 0) {
      continue;
    }
    const float weight = args.weights != nullptr ? args.weights[slot] : 1.0F;
    const uint16_t* y = args.y + row * args.hidden + begin;
    for (int64_t c = 0; c < count; ++c) {
      sum[c] += weight * formats::DecodeBf16(y[c]);
    }
  }
  uint16_t* out = args.output + token * args.width + begin;
  for (int64_t c = 0; c < count; ++c) {
    const float value = args.accumulate ? formats::DecodeBf16(out[c]) + sum[c] : sum[c];
    out[c] = formats::EncodeBf16(value);
  }
}

}  // namespace

void FinalizeCpu(const Args& args) {
  const int64_t blocks = CeilDiv(args.width, kBlock);
  ParallelFor(0, args.tokens * blocks, 8, args.num_threads, [&](int64_t i, int) {
    const int64_t begin = i % blocks * kBlock;
    FinalizeBlock(args, i / blocks, begin, std::min(kBlock, args.width - begin));
  });
}

}  // namespace hopyard::finalize
