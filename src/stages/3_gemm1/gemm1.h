// SPDX-License-Identifier: Apache-2.0
// Stage 3: rows x W1 (+ router weight, bias, LoRA delta) -> activation -> intermediate format.
#pragma once

#include <cstdint>

#include "hopyard/spec.h"

#include "gemm/cpu/weight_rows.h"

namespace hopyard {

// What GEMM stages share: the segments of rows, per-thread scratch, the kernels.
struct RowGroups {
  const gemm::cpu::KernelTable* kernels = nullptr;
  const gemm::cpu::ExpertRef* experts = nullptr;  // by segment: local experts, then shared ones
  const int32_t* active = nullptr;                // segments that have rows
  int num_active = 0;
  const int32_t* expert_offsets = nullptr;  // [segments + 1]
  const int32_t* row_to_slot = nullptr;     // [rows]
  int slots_per_token = 0;
  float* scratch = nullptr;  // num_threads * scratch_floats
  int64_t scratch_floats = 0;
  int num_threads = 1;
};

// Feature blocks that a thread takes at a time out of `total`: enough that neighbouring rows stay
// with one thread and the hand-out costs nothing, few enough that all threads end together.
[[nodiscard]] int64_t BlocksPerGrab(int64_t total, int num_threads);

// Scratch per thread that Gemm1Cpu and Gemm2Cpu need for this layer, a multiple of 64 floats.
[[nodiscard]] int64_t GemmScratchFloats(const MoeSpec& spec);

namespace gemm1 {

struct Args {
  const MoeSpec* spec = nullptr;
  RowGroups groups;
  const float* x = nullptr;  // [T][x_pitch] decoded hidden states, zero beyond H
  int64_t x_pitch = 0;       // RoundUp(H, 16)
  const float* slot_weights =
      nullptr;                      // [T * slots] scales GEMM1's result (router weight on input)
  const uint16_t* delta = nullptr;  // [T, top_k, 2I] bf16, up|gate, or null
  float* h = nullptr;  // out [rows][h_pitch]: activation in the intermediate format, zero beyond I
  int64_t h_pitch = 0;
  uint16_t* activation = nullptr;  // optional out [rows][I] bf16, before that format
};

// Every row in [0, expert_offsets.back()). Deterministic; no allocation.
void Gemm1Cpu(const Args& args);

}  // namespace gemm1
}  // namespace hopyard
