// SPDX-License-Identifier: Apache-2.0
// The orders along K against the fragment layouts that they serve.
#include "gemm/sm90/k_order.h"

#include <array>
#include <cstdint>

#include <gtest/gtest.h>

namespace hopyard::gemm::sm90 {
namespace {

TEST(KOrder, IsAPermutationOfEachGroup) {
  for (const KOrder order : {KOrder::kNatural, KOrder::kBf16Decoded, KOrder::kFp8Decoded}) {
    for (const int64_t group : {int64_t{0}, int64_t{1}, int64_t{57}, int64_t{1} << 40}) {
      std::array<bool, kKGroup> taken = {};
      for (int64_t k = 0; k < kKGroup; ++k) {
        const int64_t position = PositionOf(order, group * kKGroup + k) - group * kKGroup;
        ASSERT_GE(position, 0);
        ASSERT_LT(position, kKGroup);
        ASSERT_FALSE(taken[static_cast<size_t>(position)]) << k;
        taken[static_cast<size_t>(position)] = true;
      }
    }
  }
}

TEST(KOrder, NaturalIsTheIdentity) {
  for (int64_t k = 0; k < 1000; ++k) {
    ASSERT_EQ(PositionOf(KOrder::kNatural, k), k);
  }
}

// Step s = 2 j + c of 16: lane q of a quad feeds the register pairs of positions 2q, 2q + 1 and
// 2q + 8, 2q + 9. It holds codes 32 q .. 32 q + 31 in words j of 8, and a pair is made of codes
// 2 c + i and 2 c + i + 4 of a word, i = 0 for the first pair and 1 for the second.
TEST(KOrder, Bf16StepsTakeCodesFourApartOfALanesWord) {
  for (int64_t q = 0; q < 4; ++q) {
    for (int64_t step = 0; step < 8; ++step) {
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t position = 16 * step + 2 * q + 8 * i;
        const int64_t code = 32 * q + 8 * (step / 2) + 2 * (step % 2) + i;
        ASSERT_EQ(PositionOf(KOrder::kBf16Decoded, code), position);
        ASSERT_EQ(PositionOf(KOrder::kBf16Decoded, code + 4), position + 1);
      }
    }
  }
}

// Step s of 32: lane q feeds positions 4q .. 4q + 3 and 16 + 4q .. 16 + 4q + 3 with codes 8 s + 0
// .. 3 and 8 s + 4 .. 7 of its 32.
TEST(KOrder, Fp8StepsTakeALanesWord) {
  for (int64_t q = 0; q < 4; ++q) {
    for (int64_t at = 0; at < 16; ++at) {
      const int64_t s = at / 4;
      const int64_t i = at % 4;
      const int64_t code = 32 * q + 8 * s + i;
      ASSERT_EQ(PositionOf(KOrder::kFp8Decoded, code), 32 * s + 4 * q + i);
      ASSERT_EQ(PositionOf(KOrder::kFp8Decoded, code + 4), 32 * s + 16 + 4 * q + i);
    }
  }
}

}  // namespace
}  // namespace hopyard::gemm::sm90
