// SPDX-License-Identifier: Apache-2.0
// Where FlashInfer's shuffle_matrix_a puts a row (spec 5.2), for host and device.
#pragma once

#include <cstdint>

#include "hopyard/weights.h"

#include "core/host_device.h"

namespace hopyard::formats {

// Stored row of the row at `position` of the order before the shuffle, which stays within blocks of
// 32 or 16 rows.
HOPYARD_HOST_DEVICE int64_t StoredPosition(RowMap map, int64_t position) {
  switch (map) {
    case RowMap::kNatural:
      return position;
    case RowMap::kShuffled64: {
      const int64_t old = position % 16;
      return position - old + 8 * (old % 2) + old / 2;
    }
    case RowMap::kShuffled128: {
      const int64_t old = position % 32;
      return position - old + 8 * (old % 4) + old / 4;
    }
  }
  return position;
}

}  // namespace hopyard::formats
