// SPDX-License-Identifier: Apache-2.0
// Stage 3: rows x W1 (+ router weight, bias, LoRA delta) -> activation -> intermediate format.
#pragma once

#include <algorithm>
#include <cstdint>

#include "hopyard/spec.h"

#include "core/parallel.h"
#include "core/shape.h"
#include "gemm/cpu/weight_rows.h"

namespace hopyard {

// What GEMM stages share: the segments of rows, per-thread scratch, the kernels.
struct RowGroups {
  const gemm::cpu::KernelTable* kernels = nullptr;
  const gemm::ExpertRef* experts = nullptr;  // by segment: local experts, then shared ones
  const int32_t* active = nullptr;           // segments that have rows
  int num_active = 0;
  const int32_t* expert_offsets = nullptr;  // [segments + 1]
  const int32_t* row_to_slot = nullptr;     // [rows]
  int slots_per_token = 0;
  float* scratch = nullptr;  // num_threads * scratch_floats
  int64_t scratch_floats = 0;
  int num_threads = 1;
};

// One expert's segment of rows, one block of features.
struct FeatureTask {
  int64_t segment = 0;
  int64_t feature_begin = 0;
  int num_features = 0;  // <= gemm::cpu::kFeatureBlock
};

// Calls run(task, scratch) for every block of `features` of every active segment, on the threads of
// `groups`; `scratch` is the thread's own.
template <class Run>
void ForFeatureBlocks(const RowGroups& groups, int64_t features, Run&& run) {
  constexpr int64_t kBlock = gemm::cpu::kFeatureBlock;
  // Blocks that a thread takes at a time: enough that neighbouring rows stay with one thread and
  // the hand-out costs nothing (a block of GEMM2 in 4 bits is 6 KiB at K = 768, under a
  // microsecond), few enough that all threads end together.
  constexpr int64_t kMaxGrain = 8;
  const int64_t blocks = CeilDiv(features, kBlock);
  const int64_t total = groups.num_active * blocks;
  const int64_t grain =
      std::clamp<int64_t>(total / (int64_t{groups.num_threads} * 4), 1, kMaxGrain);
  ParallelFor(0, total, grain, groups.num_threads, [&](int64_t i, int thread) {
    FeatureTask task;
    task.segment = groups.active[i / blocks];
    task.feature_begin = i % blocks * kBlock;
    task.num_features = static_cast<int>(std::min(kBlock, features - task.feature_begin));
    run(task, groups.scratch + thread * groups.scratch_floats);
  });
}

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
