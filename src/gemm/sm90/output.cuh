// SPDX-License-Identifier: Apache-2.0
// A consumer's tile of 64 features on its way to memory: staged as [tokens][64] BF16 in shared
// memory, then written in wide pieces, valid rows and features only.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/warp.cuh"
#include "gemm/sm90/pipeline.cuh"

namespace hopyard::gemm::sm90 {

// Both consumer warpgroups.
__device__ __forceinline__ void ConsumersBarrier() {
  constexpr int kBarrier = 3;
  hopyard::sm90::NamedBarrier(kBarrier, 256);
}

// Where a consumer's 64 features of a tile of tokens go. What follows from the thread is not kept:
// registers are short here.
template <class Row>
struct OutputTile {
  int expert;
  int64_t row_begin;
  int num_rows;
  int64_t feature_begin;
  uint32_t base;    // of shared memory
  uint32_t staged;  // where tokens are M: the stage's weights that staging takes the place of

  __device__ __forceinline__ static int consumer() {
    return static_cast<int>(threadIdx.x) / 128 - 1;
  }
  __device__ __forceinline__ uint32_t staging() const { return staging(consumer()); }
  __device__ __forceinline__ uint32_t staging(int of_consumer) const {
    return (Row::kConfig.tokens_are_m ? staged : base + Shared<Row>::kStaging) +
           static_cast<uint32_t>(of_consumer * Row::kConfig.tokens * kTileRows * 2);
  }
  // One per token.
  __device__ __forceinline__ uint32_t factors() const {
    return base + Shared<Row>::kFactors +
           static_cast<uint32_t>(consumer() * Row::kConfig.tokens * 4);
  }
  __device__ __forceinline__ uint32_t delta_rows() const {
    return factors() + static_cast<uint32_t>(Row::kConfig.consumers * Row::kConfig.tokens * 4);
  }
  // Where tokens are M: factor and bias of every weight row.
  __device__ __forceinline__ uint32_t terms() const {
    return base + Shared<Row>::kFactors +
           static_cast<uint32_t>(Row::kConfig.consumers * Row::kConfig.tokens * 8);
  }
  // Those meet that stage the same features: a warpgroup, or all consumers where tokens are M.
  __device__ __forceinline__ static void Barrier() {
    if constexpr (Row::kConfig.tokens_are_m) {
      ConsumersBarrier();
    } else {
      hopyard::sm90::NamedBarrier(1 + consumer(), 128);
    }
  }
};

// Two BF16 values, the first in the low half; round to nearest even.
__device__ __forceinline__ uint32_t PackBf16(float first, float second) {
  uint32_t bits = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// Four 8x8 matrices of 16-bit values: lane 8 * m + i names row i of matrix m.
__device__ __forceinline__ void StoreMatrices(uint32_t shared, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}
// The same, transposed on the way.
__device__ __forceinline__ void StoreTransposed(uint32_t shared, const uint32_t (&values)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
      : "memory");
}

struct RowsOut {
  uint16_t* out;
  int64_t pitch;
  int64_t features;  // that are written: whole groups of 128 where an order asks for it
};

// Token n, feature r of a staged tile: rows of 128 bytes whose 16-byte pieces are exchanged by n,
// so that neither the writes nor the reads below meet in a bank.
__device__ __forceinline__ uint32_t StagedAt(int n, int r) {
  return static_cast<uint32_t>(n * 128 + (((r / 8) ^ (n % 8)) << 4) + (r % 8) * 2);
}

__device__ __forceinline__ uint4 LoadPiece(uint32_t shared) {
  uint4 values;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
               : "r"(shared)
               : "memory");
  return values;
}
__device__ __forceinline__ uint32_t LoadHalf(uint32_t shared) {
  uint16_t value = 0;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(shared) : "memory");
  return value;
}

// Features 8 * piece .. + 7 of token n of those staged from `staging` on, in whichever rows of the
// tile they are.
template <class Row>
__device__ __forceinline__ uint4 LoadFeatures(uint32_t staging, int n, int piece) {
  if constexpr (!Row::kConfig.interleaved) {
    return LoadPiece(staging + StagedAt(n, piece * 8));
  }
  // Every other of 16 rows.
  const int row = piece % 4 * 16;
  const uint4 low = LoadPiece(staging + StagedAt(n, row));
  const uint4 high = LoadPiece(staging + StagedAt(n, row + 8));
  const uint32_t which = piece < 4 ? 0x5410U : 0x7632U;
  return make_uint4(__byte_perm(low.x, low.y, which), __byte_perm(low.z, low.w, which),
                    __byte_perm(high.x, high.y, which), __byte_perm(high.z, high.w, which));
}
// FeatureOfRow, the other way round.
__device__ __forceinline__ int RowOfFeature(bool interleaved, int feature) {
  constexpr int kHalf = kTileRows / 2;
  return interleaved ? feature % kHalf * 2 + feature / kHalf : feature;
}

// Where rows cannot be written in pieces of 16 bytes: the end of a row, or odd pitches.
template <class Row>
__device__ inline void StoreElements(const RowsOut& rows, const OutputTile<Row>& tile,
                                     int64_t feature, int64_t left) {
  const int thread = static_cast<int>(hopyard::sm90::ThreadHere()) % 128;
  const int piece = thread % 8;
#pragma unroll 1
  for (int n = thread / 8; n < tile.num_rows; n += 16) {
    uint16_t* const target = rows.out + (tile.row_begin + n) * rows.pitch + feature;
#pragma unroll 1
    for (int i = 0; i < 8 && i < left; ++i) {
      const int row = RowOfFeature(Row::kConfig.interleaved, piece * 8 + i);
      target[i] = static_cast<uint16_t>(LoadHalf(tile.staging() + StagedAt(n, row)));
    }
  }
}

// Writes the staged tile [num_rows][64] of this warpgroup.
template <class Row>
__device__ __forceinline__ void StoreNatural(const RowsOut& rows, const OutputTile<Row>& tile) {
  const int thread = static_cast<int>(hopyard::sm90::ThreadHere()) % 128;
  const int piece = thread % 8;
  const int first = thread / 8;
  const int64_t feature = tile.feature_begin + piece * 8;
  const int64_t left = rows.features - feature;
  if constexpr (Row::kPlain) {
    if (left <= 0) {
      return;
    }
  } else if (left < 8 || rows.pitch % 8 != 0 || reinterpret_cast<uintptr_t>(rows.out) % 16 != 0) {
    return StoreElements(rows, tile, feature, left);
  }
  // Reads of several rows are under way before the first is stored.
  constexpr int kTurns = Row::kConfig.tokens / 16;
  constexpr int kBatch = kTurns % 4 == 0 ? 4 : (kTurns % 3 == 0 ? 3 : kTurns);
  uint16_t* target = rows.out + (tile.row_begin + first) * rows.pitch + feature;
#pragma unroll
  for (int begin = 0; begin < kTurns; begin += kBatch) {
    uint4 values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      // 16 tokens are 2048 bytes, and the swizzle is the same.
      const uint32_t tokens = tile.staging() + 2048U * static_cast<uint32_t>(begin + i);
      values[i] = LoadFeatures<Row>(tokens, first, piece);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + 16 * (begin + i) < tile.num_rows) {
        *static_cast<uint4*>(static_cast<void*>(target)) = values[i];
      }
      target += 16 * rows.pitch;
    }
  }
}

// The same in KOrder::kBf16Decoded: half a group of 128, which holds 4 neighbours of every 8. Piece
// 4 * b + e of k_order.h has codes 8 * b + e, + 4, + 32 and + 36 of the half.
template <class Row>
__device__ __forceinline__ void StoreOrdered(const RowsOut& rows, const OutputTile<Row>& tile) {
  static_assert(!Row::kConfig.interleaved, "BF16 rows have their natural order");
  const int thread = static_cast<int>(hopyard::sm90::ThreadHere()) % 128;
  const int b = thread % 4;
  const int64_t group = tile.feature_begin / kKGroup * kKGroup;
  const int64_t at = group + b * 32 + (tile.feature_begin - group) / 16;
  if (tile.feature_begin >= rows.features) {
    return;
  }
#pragma unroll 1
  for (int n = thread / 4; n < tile.num_rows; n += 32) {
    const uint4 low = LoadPiece(tile.staging() + StagedAt(n, 8 * b));
    const uint4 high = LoadPiece(tile.staging() + StagedAt(n, 8 * b + 32));
    uint16_t* const target = rows.out + (tile.row_begin + n) * rows.pitch + at;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t which = e % 2 == 0 ? 0x5410U : 0x7632U;
      const uint2 values =
          e < 2 ? uint2{__byte_perm(low.x, low.z, which), __byte_perm(high.x, high.z, which)}
                : uint2{__byte_perm(low.y, low.w, which), __byte_perm(high.y, high.w, which)};
      *static_cast<uint2*>(static_cast<void*>(target + 8 * e)) = values;
    }
  }
}

}  // namespace hopyard::gemm::sm90
