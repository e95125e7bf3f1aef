// SPDX-License-Identifier: Apache-2.0
// The CPU grouped GEMM's inner step: dot products of a few stored weight rows with FP32
// activations.
//
// Definition, the same bits on every instruction set, batch size and thread count: 16 lanes; lane l
// holds acc = fma(w[k], x[k], acc) over k = l, l + 16, ... ascending, with w[k] = decode(code) *
// block scale rounded once to FP32; lanes are added as a tree (8, 4, 2, 1); the sum is multiplied
// by the row's scale.
#pragma once

#include <cstdint>

#include "hopyard/spec.h"

#include "core/cpu_features.h"

namespace hopyard::gemm::cpu {

inline constexpr int kLanes = 16;
// Weight rows that one register tile takes; rows are handed over in groups of at most this many.
inline constexpr int kRowGroup = 4;
// Features (rows of one matrix) per task: one vector in the epilogue.
inline constexpr int kFeatureBlock = kLanes;

// How the codes of a row are stored, K-contiguous.
enum class Code { kF32, kBf16, kE4m3, kE2m1, kInt4 };
inline constexpr int kNumCodes = 5;
// Codes that are multiplied by a block scale; where a format has none, one block of scale 1.
constexpr bool HasBlockScales(Code code) {
  return code != Code::kF32 && code != Code::kBf16;
}

struct RowRef {
  const void* codes = nullptr;    // any alignment; nothing beyond ceil(k) elements is read
  const float* scales = nullptr;  // one per block, see ScaleBlocks; unused without block scales
  float scale = 1.0F;
};

// Step s of 16 weights has scales[(s + first_step) >> shift].
struct ScaleBlocks {
  int shift = 62;  // log2 of the steps per block; 62: the whole row is one block
  int64_t first_step = 0;
  [[nodiscard]] int64_t At(int64_t step) const { return (step + first_step) >> shift; }
};

struct DotArgs {
  const RowRef* rows = nullptr;
  int num_rows = 0;                 // 1 .. kRowGroup
  const float* const* x = nullptr;  // num_tokens rows of RoundUp(k, 16) floats, zero beyond k
  int num_tokens = 0;
  int64_t k = 0;
  ScaleBlocks blocks;
  int64_t prefetch_bytes = 0;  // how far ahead of the running step codes are prefetched
  float* out = nullptr;        // out[t * out_stride + r]
  int64_t out_stride = 0;
  float* panel = nullptr;  // scratch: kRowGroup * RoundUp(k, 16) floats, 64-byte aligned
};

using DotFn = void (*)(const DotArgs&);

// Epilogue of GEMM1 for one token and kFeatureBlock features: scale, bias and delta were added.
struct ActivateArgs {
  ActivationKind kind = ActivationKind::kSwiGlu;
  float alpha = 1.0F;
  float beta = 0.0F;
  float limit = 0.0F;
  const float* gate = nullptr;  // [16]; x of activations that are not gated
  const float* up = nullptr;    // [16]; unused when not gated
  float* out = nullptr;         // [16]
};
using ActivateFn = void (*)(const ActivateArgs&);

// Gathers 16 columns of a 2-byte matrix stored [k][columns] into 16 rows of k elements: the copy
// that MN-major weights need.
struct GatherArgs {
  const uint8_t* source = nullptr;  // first column at k = 0, any alignment
  int64_t stride = 0;               // bytes from k to k + 1
  int step = 1;                     // columns from one gathered column to the next, 1 or 2
  int offset = 0;                   // 0 .. step - 1: columns that `source` lies behind a step
  int64_t k = 0;
  uint16_t* out = nullptr;  // out[column * pitch + k]
  int64_t pitch = 0;
};
using GatherFn = void (*)(const GatherArgs&);

struct KernelTable {
  DotFn dot[kNumCodes];
  ActivateFn activate;
  GatherFn gather;
};

// Kernels of one instruction set; the caller has checked that the machine runs it.
[[nodiscard]] const KernelTable& Kernels(Isa isa);

namespace scalar {
const KernelTable& Table();
}
namespace avx2 {
const KernelTable& Table();
}
namespace avx512 {
const KernelTable& Table();
}

}  // namespace hopyard::gemm::cpu
