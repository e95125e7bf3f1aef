// SPDX-License-Identifier: Apache-2.0
// A consumer's tile of 64 features on its way to memory: staged as [tokens][64] BF16 in shared
// memory, then written in wide pieces, valid rows and features only.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "gemm/sm90/pipeline.cuh"

namespace hopyard::gemm::sm90 {

// Where a consumer's 64 features of a tile of tokens go. What follows from the thread is not kept:
// registers are short here.
template <class Row>
struct OutputTile {
  int expert;
  int64_t row_begin;
  int num_rows;
  int64_t feature_begin;
  uint32_t base;  // of shared memory

  __device__ __forceinline__ static int consumer() {
    return static_cast<int>(threadIdx.x) / 128 - 1;
  }
  __device__ __forceinline__ uint32_t staging() const { return staging(consumer()); }
  __device__ __forceinline__ uint32_t staging(int of_consumer) const {
    return base + Shared<Row>::kStaging +
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
  __device__ __forceinline__ static void Barrier() {
    hopyard::sm90::NamedBarrier(1 + consumer(), 128);
  }
};

// Two BF16 values, the first in the low half; round to nearest even.
__device__ __forceinline__ uint32_t PackBf16(float first, float second) {
  uint32_t bits = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// Four 8x8 matrices of 16-bit values, transposed on the way: lane 8 * m + i names row i of matrix
// m.
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

// Writes the staged tile [num_rows][64] of this warpgroup.
template <class Row>
__device__ inline void StoreNatural(const RowsOut& rows, const OutputTile<Row>& tile) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int piece = thread % 8;
  const int64_t feature = tile.feature_begin + piece * 8;
  const int64_t left = rows.features - feature;
  const bool whole =
      left >= 8 && rows.pitch % 8 == 0 && reinterpret_cast<uintptr_t>(rows.out) % 16 == 0;
  for (int n = thread / 8; n < tile.num_rows && left > 0; n += 16) {
    const uint4 values = LoadPiece(tile.staging() + StagedAt(n, piece * 8));
    uint16_t* const target = rows.out + (tile.row_begin + n) * rows.pitch + feature;
    if (whole) {
      *static_cast<uint4*>(static_cast<void*>(target)) = values;
    } else {
      const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) {
          target[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
        }
      }
    }
  }
}

// The same in KOrder::kBf16Decoded: half a group of 128, which holds 4 neighbours of every 8. Piece
// p = 4 j + 2 c + i of k_order.h has codes (q, h) = (0, 0), (0, 1), (1, 0), (1, 1) of the half.
template <class Row>
__device__ inline void StoreOrdered(const RowsOut& rows, const OutputTile<Row>& tile) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int piece = thread % 16;
  const int first = piece / 4 * 8 + piece / 2 % 2 * 2 + piece % 2;
  const int64_t group = tile.feature_begin / kKGroup * kKGroup;
  const int64_t at = group + piece * 8 + (tile.feature_begin - group) / 16;
  if (tile.feature_begin >= rows.features) {
    return;
  }
  for (int n = thread / 16; n < tile.num_rows; n += 8) {
    const auto code = [&](int f) { return LoadHalf(tile.staging() + StagedAt(n, first + f)); };
    const uint2 values{code(0) | code(4) << 16, code(32) | code(36) << 16};
    *static_cast<uint2*>(static_cast<void*>(rows.out + (tile.row_begin + n) * rows.pitch + at)) =
        values;
  }
}

}  // namespace hopyard::gemm::sm90
