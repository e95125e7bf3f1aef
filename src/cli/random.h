// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "core/random_bits.h"

namespace hopyard::cli {

// Normal values by table: every draw picks one of 8192 equally likely quantiles, as bf16 bits. Good
// enough for test data, and fast enough to fill a full-size layer in a second.
class GaussianSource {
 public:
  explicit GaussianSource(double stddev);

  // out[0 .. count) from stream `seed`, on all threads.
  void Fill(uint16_t* out, int64_t count, uint64_t seed) const;
  void Fill(float* out, int64_t count, uint64_t seed) const;

 private:
  std::vector<uint16_t> quantiles_;
};

}  // namespace hopyard::cli
