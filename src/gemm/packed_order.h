// SPDX-License-Identifier: Apache-2.0
// The order in which kernels for packed weights read 4-bit codes and their block scales: one after
// the other what a consumer warpgroup needs of a stage, so that one copy brings it. Made from any
// layout when Weights are constructed, for host and device.
//
// An expert's matrix is [units of rows][groups of K] units. A unit is 128 rows, of a gated GEMM1 64
// rows of gate and the same 64 of up, by 128 of K:
//   codes   [2 tiles][64 rows][64 bytes]
//   scales  [words of a row][32][2 tiles][2][4 bytes]: row r of a tile is entry r % 16 / 8 of
//           r / 16 * 8 + r % 8, so that the four rows of a thread lie together (decode.cuh)
// Rows and columns that fill up a unit are zero; so is one more unit of rows where their number is
// odd, for kernels with two consumers.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace hopyard::gemm {

inline constexpr int64_t kPackedTileRows = 64;
inline constexpr int64_t kPackedRowBytes = 64;  // 128 codes
inline constexpr int64_t kPackedTileBytes = kPackedTileRows * kPackedRowBytes;
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

[[nodiscard]] HOPYARD_HOST_DEVICE int64_t PackedUnitBytes(int32_t scale_bytes) {
  return 2 * kPackedTileBytes + scale_bytes / 4 * kPackedPlaneBytes;
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
  return at.unit + at.tile * kPackedTileBytes + at.row * kPackedRowBytes + byte % kPackedRowBytes;
}
// Byte `byte` of its block scales.
[[nodiscard]] HOPYARD_HOST_DEVICE uint8_t* PackedScale(const PackedOrder& order, int64_t row,
                                                       int64_t byte) {
  const PackedPlace at = PlaceInPacked(order, row, byte / order.scale_bytes);
  const int64_t in_group = byte % order.scale_bytes;
  const int64_t entry = at.row / 16 * 8 + at.row % 8;
  return at.unit + 2 * kPackedTileBytes + in_group / 4 * kPackedPlaneBytes + entry * 16 +
         at.tile * 8 + at.row % 16 / 8 * 4 + in_group % 4;
}

}  // namespace hopyard::gemm
