// SPDX-License-Identifier: Apache-2.0
// Weighted sum of a token's rows in slot order: products and sums each rounded to FP32, the bits of
// FinalizeCpu. One thread owns its columns, so no atomics are needed.
#pragma once

#include <cstdint>

#include "device/sm90/dependent.cuh"
#include "device/sm90/numbers.cuh"
#include "stages/5_finalize/finalize_sm90.h"

namespace hopyard::finalize {

inline constexpr int kFinalizeThreads = 128;

// kColumns bf16 columns: 8 as one 16-byte access, or 1.
template <int kColumns>
struct Columns {
  uint16_t bits[kColumns];

  __device__ __forceinline__ static Columns Load(const uint16_t* p) {
    Columns c;
    if constexpr (kColumns == 8) {
      const uint4 words = *static_cast<const uint4*>(static_cast<const void*>(p));
      const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        c.bits[i] = static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2)));
      }
    } else {
      c.bits[0] = *p;
    }
    return c;
  }
  __device__ __forceinline__ void Store(uint16_t* p) const {
    if constexpr (kColumns == 8) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = bits[2 * i] | uint32_t{bits[2 * i + 1]} << 16;
      }
      *static_cast<uint4*>(static_cast<void*>(p)) = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
      *p = bits[0];
    }
  }
};

template <int kColumns>
__device__ inline void FinalizeColumns(const FinalizeSm90Args& args, int64_t token, int64_t begin) {
  float sum[kColumns] = {};
  for (int s = 0; s < args.slots; ++s) {
    const int64_t slot = token * args.slots + s;
    const int64_t row = args.slot_to_row[slot];
    if (row < 0) {
      continue;
    }
    const float weight = args.weights != nullptr ? args.weights[slot] : 1.0F;
    const auto y = Columns<kColumns>::Load(args.y + row * args.hidden + begin);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, sm90::WidenBf16(y.bits[i])));
    }
  }
  uint16_t* out = args.output + token * args.width + begin;
  Columns<kColumns> result;
  if (args.accumulate) {
    result = Columns<kColumns>::Load(out);
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const float value =
        args.accumulate ? __fadd_rn(sm90::WidenBf16(result.bits[i]), sum[i]) : sum[i];
    result.bits[i] = sm90::NarrowBf16(value);
  }
  result.Store(out);
}

template <int kColumns>
__global__ void __launch_bounds__(kFinalizeThreads)
    FinalizeKernel(const __grid_constant__ FinalizeSm90Args args) {
  sm90::TakeTurn();
  const int64_t tokens = sm90::LiveTokens(args.num_tokens, args.max_tokens);
  const int64_t groups = args.width / kColumns;
  const int64_t step = int64_t{gridDim.x} * kFinalizeThreads;
  for (int64_t i = int64_t{blockIdx.x} * kFinalizeThreads + threadIdx.x; i < tokens * groups;
       i += step) {
    FinalizeColumns<kColumns>(args, i / groups, i % groups * kColumns);
  }
}

}  // namespace hopyard::finalize
