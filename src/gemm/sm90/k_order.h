// SPDX-License-Identifier: Apache-2.0
// Order of a token row's elements along K. Matrix instructions sum over K in any order as long as
// both operands agree; where weights are decoded in registers, a thread holds 32 contiguous codes
// of a weight row (one load, one MX scale), and the token rows are written in the order in which
// the instruction pairs them with those. The order is a permutation within each group of 128.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace hopyard::gemm::sm90 {

enum class KOrder : uint8_t {
  kNatural,
  kBf16Decoded,  // BF16 products with weights decoded in registers
  kFp8Decoded,   // FP8 products with weights decoded in registers
};

inline constexpr int kKGroup = 128;

// Position of element k. With q = the quarter of the group (a lane's 32 contiguous codes):
// kBf16Decoded: k = 32 q + 8 j + 4 h + 2 c + i stands at 32 j + 16 c + 8 i + 2 q + h: step 2 j + c
// of 16, where the lane's registers hold codes 2 c + i and 2 c + i + 4 of its 8-code word j side by
// side. kFp8Decoded: k = 32 q + 8 s + 4 i + c stands at 32 s + 16 i + 4 q + c.
HOPYARD_HOST_DEVICE int64_t PositionOf(KOrder order, int64_t k) {
  const int64_t group = k & ~int64_t{kKGroup - 1};
  const int64_t q = (k >> 5) & 3;
  if (order == KOrder::kBf16Decoded) {
    return group + (((k >> 3) & 3) << 5) + (((k >> 1) & 1) << 4) + ((k & 1) << 3) + (q << 1) +
           ((k >> 2) & 1);
  }
  if (order == KOrder::kFp8Decoded) {
    return group + (((k >> 3) & 3) << 5) + (((k >> 2) & 1) << 4) + (q << 2) + (k & 3);
  }
  return k;
}

}  // namespace hopyard::gemm::sm90
