// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace hopyard {

// Counter-based random bits: value `index` of stream `seed`, so any part of a tensor can be made
// on any thread.
[[nodiscard]] constexpr uint64_t RandomBits(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

// A stream of its own for (purpose, item) under one user seed.
[[nodiscard]] constexpr uint64_t StreamSeed(uint64_t seed, uint64_t purpose, uint64_t item) {
  return RandomBits(RandomBits(seed, purpose), item);
}

// Uniform in (0, 1).
[[nodiscard]] inline double Uniform(uint64_t seed, uint64_t index) {
  return (static_cast<double>(RandomBits(seed, index) >> 11) + 0.5) * 0x1.0p-53;
}

}  // namespace hopyard
