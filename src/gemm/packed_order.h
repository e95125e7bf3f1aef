// SPDX-License-Identifier: Apache-2.0
// The order in which kernels for packed weights read 4-bit codes and their block scales: one after
// the other what a consumer warpgroup needs of a stage, so that one copy brings it. Made from any
// layout when Weights are constructed, for host and device.
//
// An expert's matrix is [units of rows][groups of K] units. A unit is 128 rows, of a gated GEMM1 64
// rows of gate and the same 64 of up, by 128 of K:
//   scales  [words of a row][32][2 tiles][2][4 bytes]: row r of a tile is entry r % 16 / 8 of
//           r / 16 * 8 + r % 8, so that the four rows of a thread lie together (decode.cuh)
//   codes   [2 halves of K][2 tiles][64 rows][32 bytes]: row r of the second half is entry r ^ 2
//           so that the lanes that read two rows at a time meet no bank of shared memory twice
// Rows and columns that fill up a unit are zero; so is one more unit of rows where their number is
// odd, for kernels with two consumers. The last unit of a row whose K ends in its first half is
// read up to there.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace hopyard::gemm {

inline constexpr int64_t kPackedTileRows = 64;
inline constexpr int64_t kPackedRowBytes = 64;  // 128 codes
inline constexpr int64_t kPackedHalfRowBytes = kPackedRowBytes / 2;
inline constexpr int64_t kPackedHalfTileBytes = kPackedTileRows * kPackedHalfRowBytes;
inline constexpr int64_t kPackedHalfBytes = 2 * kPackedHalfTileBytes;  // of both tiles
inline constexpr int64_t kPackedPlaneBytes = 2 * kPackedTileRows * 4;

// One expert's matrix: gate, up, or a GEMM's only one.
struct PackedOrder {
  uint8_t* base = nullptr;  // of the expert's units; null: not packed
  int64_t groups = 0;       // of 128 of K
  int32_t scale_bytes = 0;  // of a row and such a group: 4 or 8
  bool paired = false;      // gate and up share units
  bool second = false;      // up

  friend constexpr bool operator==(const PackedOrder&, const PackedOrder&) = default;
};

[[nodiscard]] HOPYARD_HOST_DEVICE int64_t PackedScaleBytes(int32_t scale_bytes) {
  return scale_bytes / 4 * kPackedPlaneBytes;
}
[[nodiscard]] HOPYARD_HOST_DEVICE int64_t PackedUnitBytes(int32_t scale_bytes) {
  return PackedScaleBytes(scale_bytes) + 2 * kPackedHalfBytes;
}
// Where row `row` of a tile begins in half `half` of the tile's codes.
[[nodiscard]] HOPYARD_HOST_DEVICE int64_t PackedRowInHalf(int64_t row, int64_t half) {
  return (row ^ (2 * half)) * kPackedHalfRowBytes;
}
// Rows are those of one matrix.
[[nodiscard]] HOPYARD_HOST_DEVICE int64_t PackedExpertBytes(const PackedOrder& order,
                                                            int64_t rows) {
  const int64_t unit_rows = order.paired ? kPackedTileRows : 2 * kPackedTileRows;
  const int64_t units = (rows + 2 * unit_rows - 1) / (2 * unit_rows) * 2;
  return units * order.groups * PackedUnitBytes(order.scale_bytes);
}

// Where a natural row's part of a unit lies.
struct PackedPlace {
  uint8_t* unit;
  int64_t tile;
  int64_t row;  // of the tile
};
[[nodiscard]] HOPYARD_HOST_DEVICE PackedPlace PlaceInPacked(const PackedOrder& order, int64_t row,
                                                            int64_t group) {
  const int64_t tile = row / kPackedTileRows;
  const int64_t unit = order.paired ? tile : tile / 2;
  return {order.base + (unit * order.groups + group) * PackedUnitBytes(order.scale_bytes),
          order.paired ? int64_t{order.second} : tile % 2, row % kPackedTileRows};
}
// Byte `byte` of a natural row's codes.
[[nodiscard]] HOPYARD_HOST_DEVICE uint8_t* PackedCode(const PackedOrder& order, int64_t row,
                                                      int64_t byte) {
  const PackedPlace at = PlaceInPacked(order, row, byte / kPackedRowBytes);
  const int64_t half = byte % kPackedRowBytes / kPackedHalfRowBytes;
  return at.unit + PackedScaleBytes(order.scale_bytes) + half * kPackedHalfBytes +
         at.tile * kPackedHalfTileBytes + PackedRowInHalf(at.row, half) +
         byte % kPackedHalfRowBytes;
}
// Byte `byte` of its block scales.
[[nodiscard]] HOPYARD_HOST_DEVICE uint8_t* PackedScale(const PackedOrder& order, int64_t row,
                                                       int64_t byte) {
  const PackedPlace at = PlaceInPacked(order, row, byte / order.scale_bytes);
  const int64_t in_group = byte % order.scale_bytes;
  const int64_t entry = at.row / 16 * 8 + at.row % 8;
  return at.unit + in_group / 4 * kPackedPlaneBytes + entry * 16 + at.tile * 8 +
         at.row % 16 / 8 * 4 + in_group % 4;
}

}  // namespace hopyard::gemm
