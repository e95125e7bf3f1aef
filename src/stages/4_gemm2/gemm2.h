// SPDX-License-Identifier: Apache-2.0
// Stage 4: intermediate rows x W2 (+ bias) -> bf16 rows.
#pragma once

#include <cstdint>

#include "hopyard/spec.h"

#include "stages/3_gemm1/gemm1.h"

namespace hopyard::gemm2 {

struct Args {
  const MoeSpec* spec = nullptr;
  RowGroups groups;
  const float* h = nullptr;  // [rows][h_pitch], zero beyond I
  int64_t h_pitch = 0;
  uint16_t* y = nullptr;  // out [rows][H] bf16
};

// Every row in [0, expert_offsets.back()). Deterministic; no allocation.
void Gemm2Cpu(const Args& args);

}  // namespace hopyard::gemm2
