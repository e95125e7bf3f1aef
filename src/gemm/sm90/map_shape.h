// SPDX-License-Identifier: Apache-2.0
// A checkpoint matrix as five dimensions of which the copy engine takes a box of 64 natural rows:
// K, three dimensions that walk the rows in natural order, and the expert (or the block of K). Of
// MN-major ones it takes 64 rows of 64 K: the rows, K, two of one element, the expert.
#pragma once

#include <array>
#include <cstdint>

#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

struct MapDims {
  const uint8_t* begin = nullptr;
  std::array<int64_t, 5> size{};
  std::array<int64_t, 5> stride{};  // bytes; of dimension 0 the element's
  std::array<int64_t, 5> box{};
  int element_bytes = 1;
  bool swizzled = true;  // matrix instructions read the tile; decoders read plain rows
  int row_unit = 1;      // MatrixArgs::row_unit
};

// Precondition: MapProblem is empty.
[[nodiscard]] MapDims DimsOf(const MapShape& shape);

}  // namespace hopyard::gemm::sm90
