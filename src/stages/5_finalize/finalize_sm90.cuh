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
// Slots whose rows a thread asks for at a time: a token's usual choices and a shared expert or two
// are one wait for memory instead of one each.
inline constexpr int kFinalizeBatch = 10;

// kColumns bf16 columns: 8 as one 16-byte access, or 1.
template <int kColumns>
struct Columns {
  static constexpr int kWords = (kColumns + 1) / 2;
  uint32_t words[kWords] = {};

  __device__ __forceinline__ static Columns Load(const uint16_t* p) {
    Columns c;
    if constexpr (kColumns == 8) {
      const uint4 v = *static_cast<const uint4*>(static_cast<const void*>(p));
      c.words[0] = v.x;
      c.words[1] = v.y;
      c.words[2] = v.z;
      c.words[3] = v.w;
    } else {
      c.words[0] = *p;
    }
    return c;
  }
  __device__ __forceinline__ void Store(uint16_t* p) const {
    if constexpr (kColumns == 8) {
      *static_cast<uint4*>(static_cast<void*>(p)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      *p = static_cast<uint16_t>(words[0]);
    }
  }
  [[nodiscard]] __device__ __forceinline__ float At(int i) const {
    const uint32_t word = words[i / 2];
    return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xFFFF0000U);
  }
  // Into a column that is still zero.
  __device__ __forceinline__ void Put(int i, float value) {
    words[i / 2] |= uint32_t{sm90::NarrowBf16(value)} << (16 * (i % 2));
  }
};

// Adds the rows of slots [first, first + kFinalizeBatch) of the token, as far as it has them.
template <int kColumns>
__device__ __forceinline__ void AddSlots(const FinalizeSm90Args& args, int64_t token, int first,
                                         int64_t begin, float (&sum)[kColumns]) {
  const int64_t slot = token * args.slots + first;
  int32_t rows[kFinalizeBatch];
  float weights[kFinalizeBatch];
  Columns<kColumns> y[kFinalizeBatch];
#pragma unroll
  for (int i = 0; i < kFinalizeBatch; ++i) {
    const bool real = first + i < args.slots;
    rows[i] = real ? args.slot_to_row[slot + i] : -1;
    weights[i] = real && args.weights != nullptr ? args.weights[slot + i] : 1.0F;
  }
#pragma unroll
  for (int i = 0; i < kFinalizeBatch; ++i) {
    if (rows[i] >= 0) {
      y[i] = Columns<kColumns>::Load(args.y + rows[i] * args.hidden + begin);
    }
  }
#pragma unroll
  for (int i = 0; i < kFinalizeBatch; ++i) {
    if (rows[i] >= 0) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sum[c] = __fadd_rn(sum[c], __fmul_rn(weights[i], y[i].At(c)));
      }
    }
  }
}

template <int kColumns>
__device__ inline void FinalizeColumns(const FinalizeSm90Args& args, int64_t token, int64_t begin) {
  float sum[kColumns] = {};
#pragma unroll 1
  for (int first = 0; first < args.slots; first += kFinalizeBatch) {
    AddSlots<kColumns>(args, token, first, begin, sum);
  }
  uint16_t* out = args.output + token * args.width + begin;
  if (args.accumulate) {
    const auto before = Columns<kColumns>::Load(out);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = __fadd_rn(before.At(c), sum[c]);
    }
  }
  Columns<kColumns> result;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    result.Put(c, sum[c]);
  }
  result.Store(out);
}

template <int kColumns>
__global__ void __launch_bounds__(kFinalizeThreads)
    FinalizeKernel(const __grid_constant__ FinalizeSm90Args args) {
  sm90::TakeTurn();
  const int64_t tokens = sm90::LiveTokens(args.num_tokens, args.max_tokens);
  const auto groups = static_cast<uint32_t>(args.width / kColumns);
  const uint32_t first = blockIdx.x * kFinalizeThreads + threadIdx.x;
  const uint32_t step = gridDim.x * kFinalizeThreads;
  // Token and columns advance without a division in the loop.
  const uint32_t token_step = step / groups;
  const uint32_t group_step = step % groups;
  int64_t token = first / groups;
  uint32_t group = first % groups;
  while (token < tokens) {
    FinalizeColumns<kColumns>(args, token, int64_t{group} * kColumns);
    const bool wraps = group + group_step >= groups;
    group += wraps ? group_step - groups : group_step;
    token += token_step + (wraps ? 1U : 0U);
  }
}

}  // namespace hopyard::finalize
