// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace hopyard {

// Integer shape arithmetic; always 64-bit (promise 10 of the architecture).
[[nodiscard]] constexpr int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
[[nodiscard]] constexpr int64_t RoundUp(int64_t a, int64_t b) {
  return CeilDiv(a, b) * b;
}

}  // namespace hopyard
