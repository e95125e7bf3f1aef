// SPDX-License-Identifier: Apache-2.0
// What the CPU backend and its instruction-set translation units share: one routing call as plain
// data, and one entry point per instruction set that routes one token.
#pragma once

#include <cstdint>

#include "hopyard/routing.h"

#include "core/cpu_features.h"

namespace hopyard::route {

// Where the ids of a call come from.
enum class IdSource : uint8_t { kSelect, kForced, kTable };

// Inputs of a call; rows are contiguous. `bias` is decoded to f32 once per call and null where the
// rule ranks by the bare score.
struct RowProblem {
  RoutingRule rule;
  int num_experts = 0;
  int top_k = 0;
  IdSource source = IdSource::kSelect;
  DType logits_dtype = DType::kFloat32;
  DType forced_dtype = DType::kInt32;
  DType token_dtype = DType::kInt32;
  const void* logits = nullptr;
  const float* bias = nullptr;
  const void* forced_ids = nullptr;
  const void* token_ids = nullptr;
  const int32_t* table = nullptr;
  int64_t table_rows = 0;
};

// The slots of one token. A skipped slot has id -1 and weight 0. Entries beyond top_k are scratch.
struct Slots {
  alignas(64) float logits[kMaxTopK];
  alignas(64) float weights[kMaxTopK];
  alignas(64) int32_t ids[kMaxTopK];
};

using RouteRowFn = void (*)(const RowProblem& problem, int64_t token, Slots& slots);

void RouteRowScalar(const RowProblem& problem, int64_t token, Slots& slots);
#if defined(__x86_64__)
void RouteRowAvx2(const RowProblem& problem, int64_t token, Slots& slots);
void RouteRowAvx512(const RowProblem& problem, int64_t token, Slots& slots);
#endif

// RouteCpu on a named instruction set, which the machine must have: all give the same bits.
void RouteCpuWith(Isa isa, const RoutingRule& rule, int top_k, const RouteInputs& inputs,
                  const RouteOutputs& outputs, int num_threads);

}  // namespace hopyard::route
