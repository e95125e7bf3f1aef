// SPDX-License-Identifier: Apache-2.0
// Facts and ceilings of the machine that a result is reported against.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/buffer.h"
#include "core/cpu_features.h"

namespace hopyard::cli {

struct Machine {
  std::string cpu_model;
  int logical_cpus = 0;  // of the machine
  int threads = 0;       // that OpenMP gives this process
  int64_t memory_bytes = 0;
  int64_t memory_available_bytes = 0;
  int64_t last_level_cache_bytes = 0;
};

[[nodiscard]] Machine DescribeMachine();

// Throws Error{kOutOfMemory} naming need, have and `remedy` when `need` bytes do not fit.
void CheckMemory(const std::string& what, int64_t need, const std::string& remedy);

// Reads one large buffer again and again with all threads. The buffer exceeds the last-level cache
// where memory allows.
class ReadBandwidth {
 public:
  explicit ReadBandwidth(int threads);
  // GB/s of the best of a few passes over the buffer.
  [[nodiscard]] double Measure();

 private:
  int threads_;
  Buffer buffer_;
};

// FP32 multiply-add rate of `isa` on all threads, GFLOP/s, from registers.
[[nodiscard]] double MeasurePeakGflops(Isa isa, int threads);

}  // namespace hopyard::cli
