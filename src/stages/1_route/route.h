// SPDX-License-Identifier: Apache-2.0
// Stage 1: router logits [T, E] -> expert ids and weights [T, K].
#pragma once

#include "hopyard/routing.h"

namespace hopyard::route {

// Preconditions of all entry points: validated arguments (spec::ValidateRoute), CPU memory.
// Postconditions: RouteOutputs of hopyard/routing.h; ids in descending score order, ties by id.

// Oracle: scalar, double, own formulas; ignores the dtype of `outputs.weights` only in that it
// rounds once at the end. Scores are compared in double.
void RouteRef(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
              const RouteOutputs& outputs);

// CPU backend: FP32, the operation sequence of docs/numerics.md, vectorised, threads over tokens.
// `num_threads` threads; no allocation.
void RouteCpu(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
              const RouteOutputs& outputs, int num_threads);

// load[id] += 1 for every id of ids[0 .. num_slots) that is not negative; `load` is [num_experts]
// i32 or i64, ids are below num_experts. Atomic: concurrent calls may share the counters.
void CountLoad(const int32_t* ids, int64_t num_slots, const TensorView& load, int num_threads);

}  // namespace hopyard::route
