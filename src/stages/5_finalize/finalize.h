// SPDX-License-Identifier: Apache-2.0
// Stage 5: weight the rows of a token and add them in slot order (spec 4.9).
#pragma once

#include <cstdint>

namespace hopyard::finalize {

struct Args {
  const uint16_t* y = nullptr;           // [rows][hidden] bf16
  const int32_t* slot_to_row = nullptr;  // [tokens][slots], -1 = skipped
  const float* weights = nullptr;        // [tokens][slots]; null: all 1
  uint16_t* output = nullptr;            // [tokens][width] bf16
  int64_t tokens = 0;
  int64_t hidden = 0;
  int64_t width = 0;  // <= hidden
  int slots = 0;
  bool accumulate = false;  // output += sum
  int num_threads = 1;
};

// output[t] = bf16(sum over slots ascending of weight * row, each product and sum rounded to FP32);
// a token without rows gets exact zeros (or keeps its value when accumulating).
void FinalizeCpu(const Args& args);

}  // namespace hopyard::finalize
