// SPDX-License-Identifier: Apache-2.0
// Stage 5 on Hopper: one launch, the bits of FinalizeCpu.
#pragma once

#include <cstdint>

#include "device/queue.h"

namespace hopyard::finalize {

// As Args of finalize.h, on the device.
struct FinalizeSm90Args {
  const uint16_t* y = nullptr;           // [rows][hidden] bf16
  const int32_t* slot_to_row = nullptr;  // [max_tokens][slots], -1 = skipped
  const float* weights = nullptr;        // [max_tokens][slots]; null: all 1
  uint16_t* output = nullptr;            // [max_tokens][width] bf16
  const int32_t* num_tokens = nullptr;   // read by the kernel; null: max_tokens
  int64_t max_tokens = 0;
  int64_t hidden = 0;
  int64_t width = 0;
  int slots = 0;
  bool accumulate = false;
};

// Enqueues the kernel. Throws Error{kCuda} when the launch fails.
void FinalizeSm90(const FinalizeSm90Args& args, const device::Queue& queue);

}  // namespace hopyard::finalize
